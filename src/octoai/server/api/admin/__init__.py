"""The administration API, `/v1/admin/…`: accounts, credit, tokens, prices and the ledger's rows, for tokens with the
scope `admin`. The same as `octoai account`, `octoai token` and `octoai price`.

Every operation is a line of `OPERATIONS`, from which the routes and /openapi.json are made. What it changes is on disk
and in force when the answer leaves. What may be done is decided in `server.accounts`, `tokens` and `prices`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from octoai.server.accounts import AccountExists, BadAccount, UnknownAccount, UnknownToken
from octoai.server.api.admin import accounts, ledger, tokens
from octoai.server.api.admin.bodies import BODIES, checked
from octoai.server.api.admin.calls import MAX_PAGE, Call, Json
from octoai.server.api.text_gen import body_of, caller_of
from octoai.server.errors import BadRequest, NotFound, StateConflict
from octoai.server.service import Service
from octoai.server.times import now_us

_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Operation:
    """`body` is the type of its body, `query` what it takes in the address, `conflict` when it answers 409."""

    method: str
    path: str
    run: Callable[[Call], Awaitable[Json]]
    summary: str
    body: str | None = None
    query: tuple[str, ...] = ()
    conflict: str | None = None


_ACCOUNTS, _TOKENS, _PRICES = "/v1/admin/accounts", "/v1/admin/tokens", "/v1/admin/prices"
_ACCOUNT, _TOKEN, _REQUEST = f"{_ACCOUNTS}/{{id}}", f"{_TOKENS}/{{id}}", "/v1/admin/requests/{id}"
_CREDIT = f"{_ACCOUNT}/credit"
_PAGE = ("limit", "after")
OPERATIONS = (
    Operation("GET", _ACCOUNTS, accounts.list_accounts, "Every account, oldest first.", query=_PAGE),
    Operation("POST", _ACCOUNTS, accounts.create_account, "Open an account.", "NewAccount", conflict="The id is taken"),
    Operation("GET", _ACCOUNT, accounts.show_account, "An account, its balance, and what it has spent this month."),
    Operation("PATCH", _ACCOUNT, accounts.update_account, "Change what is given, nothing else.", "AccountChanges"),
    Operation("DELETE", _ACCOUNT, accounts.close_account, "Close it: its tokens are refused, its entries stay."),
    Operation("GET", _CREDIT, accounts.list_entries, "Its entries in the ledger, newest first.", query=_PAGE),
    Operation(
        "POST",
        _CREDIT,
        accounts.add_credit,
        "Add to its balance, or put it right. With an `Idempotency-Key`, once.",
        "NewCredit",
        conflict="The `Idempotency-Key` was used for another request",
    ),
    Operation(
        "GET", _TOKENS, tokens.list_tokens, "Every token, oldest first, without its text.", query=("account", *_PAGE)
    ),
    Operation(
        "POST",
        _TOKENS,
        tokens.create_token,
        "A new token. `token` is its text, shown this once. With an `Idempotency-Key`, one only.",
        "NewToken",
        conflict="The `Idempotency-Key` was used for another request, or for this one: the text is not shown again",
    ),
    Operation("GET", _TOKEN, tokens.show_token, "A token, without its text."),
    Operation("PATCH", _TOKEN, tokens.update_token, "Change what is given, nothing else.", "TokenChanges"),
    Operation("DELETE", _TOKEN, tokens.revoke_token, "Revoke it: it is refused from now on."),
    Operation("GET", _PRICES, ledger.list_prices, "Every price there was, is and will be."),
    Operation(
        "POST", _PRICES, ledger.set_price, "Set a model's price, from now on or from a moment to come.", "NewPrice"
    ),
    Operation("GET", _REQUEST, ledger.show_request, "A request in the ledger, by the `x-request-id` of its answer."),
    Operation(
        "POST",
        f"{_REQUEST}/refund",
        ledger.refund_request,
        "Give back what it cost: once, however often it is asked.",
        "NewRefund",
        conflict="The request is still running",
    ),
)


def routes() -> list[BaseRoute]:
    return [_route(path, operations) for path, operations in _by_path().items()]


def paths() -> dict[str, Any]:
    """For /openapi.json."""
    return {
        path: {method.lower(): _described(operation) for method, operation in operations.items()}
        for path, operations in _by_path().items()
    }


def schemas() -> dict[str, Any]:
    """For /openapi.json: the types of the bodies."""
    found: dict[str, Any] = {}
    for name, body in BODIES.items():
        schema = body.json_schema(ref_template=_REF)
        found |= schema.pop("$defs", {})
        found[name] = schema
    return found


def _by_path() -> dict[str, dict[str, Operation]]:
    found: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        found.setdefault(operation.path, {})[operation.method] = operation
    return found


def _route(path: str, operations: Mapping[str, Operation]) -> Route:
    async def admin(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await _answered(request, operations[method])

    return Route(path, admin, methods=list(operations))


async def _answered(request: Request, operation: Operation) -> Response:
    service: Service = request.state.service
    caller = await caller_of(request)
    service.require(caller, "admin")
    raw = b"" if operation.body is None else await body_of(request.scope, request.receive)
    body = {} if operation.body is None else checked(operation.body, raw)
    try:
        return JSONResponse(await operation.run(Call(request, service, caller, raw, body, now_us())))
    except (UnknownAccount, UnknownToken) as error:
        raise NotFound(_sentence(error), param=error.param) from None
    except AccountExists as error:
        raise StateConflict(_sentence(error), param=error.param) from None
    except BadAccount as error:
        raise BadRequest(_sentence(error), param=error.param) from None


def _sentence(error: BadAccount) -> str:
    text = str(error)
    if text.startswith(f"{error.param}: "):  # the name of a field, which has its own spelling
        return text
    return f"{text[:1].upper()}{text[1:]}."


def _described(operation: Operation) -> dict[str, Any]:
    refusals = {"401": "No API token, or not a valid one", "403": "The token lacks the scope `admin`"}
    if "{id}" in operation.path or operation.body == "NewToken":
        refusals["404"] = "There is nothing of that id"
    if operation.conflict is not None:
        refusals["409"] = operation.conflict
    if operation.body is not None:
        refusals |= {"400": "It cannot be done as asked; `param` names what is wrong", "422": "As for chat completions"}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "As said"},
            **{code: {"description": refusals[code]} for code in sorted(refusals)},
        },
    }
    if operation.body is not None:
        schema = {"$ref": _REF.format(model=operation.body)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    parameters = [_parameter("id", "path")] if "{id}" in operation.path else []
    parameters += [_parameter(name, "query") for name in operation.query]
    return {**described, "parameters": parameters} if parameters else described


def _parameter(name: str, place: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE} if name == "limit" else {"type": "string"}
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
