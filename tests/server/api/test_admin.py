"""The administration API over a real socket, on both databases: what it does, who may, and what it refuses."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from octoai.server import accounts, directory, tokens
from octoai.server.accounts import PLANS
from octoai.server.api import admin
from octoai.server.api.admin.bodies import BODIES
from octoai.server.api.docs import document
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.params.bodies import MAX_PROBLEMS
from octoai.server.store import Place, keys, requests
from octoai.server.tokens import SCOPES, is_well_formed
from tests.running import InProcess
from tests.server.settling import settlement
from tests.talking import LONG, ask


@pytest.fixture
def service(place: Place) -> Iterator[InProcess]:
    running = InProcess(ScriptedEngine(), place.data_dir, url=place.url)
    yield running
    running.close()


def call(
    service: InProcess, method: str, path: str, body: Any = None, *, expect: int = 200, **headers: str
) -> dict[str, Any]:
    status, said, text = ask(service, f"/v1/admin/{path}", body, method, **headers)
    assert status == expect, (status, text)
    assert said["content-type"] == "application/json"
    assert "x-request-id" in said
    answer: dict[str, Any] = json.loads(text)
    return answer


def refused(service: InProcess, method: str, path: str, body: Any = None, *, status: int, **headers: str) -> Any:
    """(param, code, message) of a refusal."""
    error = call(service, method, path, body, expect=status, **headers)["error"]
    return error["param"], error["code"], error["message"]


def status_with(service: InProcess, token: str, path: str = "/v1/models") -> int:
    return ask(service, path, authorization=f"Bearer {token}")[0]


# ── accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_account_is_opened_shown_changed_closed_and_opened_again(service: InProcess) -> None:
    made = call(service, "POST", "accounts", {"id": "acme", "plan": "pro", "prepaid": True, "hard_budget": "20.5"})
    assert made["created_at"] == pytest.approx(time.time(), abs=5)
    assert made == {
        "id": "acme",
        "object": "account",
        "name": "acme",
        "plan": "pro",
        "prepaid": True,
        "balance": "0.00",
        "spent_this_month": "0.00",
        "active_tokens": 0,
        "soft_budget": None,
        "hard_budget": "20.50",
        "requests_per_minute": 240,
        "prompt_tokens_per_minute": None,
        "completion_tokens_per_minute": None,
        "concurrent_requests": None,
        "created_at": made["created_at"],
        "closed_at": None,
    }
    assert call(service, "GET", "accounts/acme") == made
    changed = call(service, "PATCH", "accounts/acme", {"name": "Acme ✓", "hard_budget": None, "concurrent_requests": 2})
    assert changed == {**made, "name": "Acme ✓", "hard_budget": None, "concurrent_requests": 2}
    assert call(service, "PATCH", "accounts/acme", {}) == changed

    token = call(service, "POST", "tokens", {"name": "t", "account": "acme"})["token"]
    assert status_with(service, token) == 200
    for close, reopen in (("DELETE", {"closed": False}), ("PATCH", {"closed": False})):
        body = {"closed": True} if close == "PATCH" else None
        closed = call(service, close, "accounts/acme", body)
        assert closed["closed_at"] == pytest.approx(time.time(), abs=5)
        assert status_with(service, token) == 401
        assert call(service, "PATCH", "accounts/acme", reopen)["closed_at"] is None
        assert status_with(service, token) == 200


def test_accounts_are_listed_a_page_at_a_time(service: InProcess) -> None:
    for name in ("b", "a", "c"):
        call(service, "POST", "accounts", {"id": name})
    every = [each["id"] for each in call(service, "GET", "accounts")["data"]]
    assert sorted(every) == ["a", "b", "c", "default"]
    seen, after = [], ""
    for is_last in (False, True):
        page = call(service, "GET", f"accounts?limit=2{after}")
        assert (page["object"], page["has_more"]) == ("list", not is_last)
        seen += [each["id"] for each in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        after = f"&after={page['last_id']}"
    assert seen == every
    assert call(service, "GET", f"accounts?limit=2{after}") == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    for wrong in (
        "limit=0",
        "limit=101",
        "limit=000000001000",
        f"limit=1{'0' * 5000}",
        "limit=x",
        "limit=-1",
        "limit=",
        "after=nobody",
    ):
        assert refused(service, "GET", f"accounts?{wrong}", status=400)[0] == wrong.partition("=")[0]


def test_an_id_that_is_taken_is_a_conflict_no_retry_helps(service: InProcess) -> None:
    call(service, "POST", "accounts", {"id": "acme"})
    status, headers, text = ask(service, "/v1/admin/accounts", {"id": "acme"})
    assert (status, headers["x-should-retry"]) == (409, "false")
    assert json.loads(text)["error"]["param"] == "id"


def test_credit_is_granted_adjusted_and_listed_newest_first(service: InProcess) -> None:
    call(service, "POST", "accounts", {"id": "acme", "prepaid": True})
    first = call(service, "POST", "accounts/acme/credit", {"amount": "25.00", "note": "first"})
    assert (first["object"], first["kind"], first["amount"], first["balance"]) == (
        "ledger.entry",
        "grant",
        "25.00",
        "25.00",
    )
    adjustment = {"amount": "-5.000000001", "kind": "adjustment", "note": "wrong"}
    second = call(service, "POST", "accounts/acme/credit", adjustment)
    assert (second["amount"], second["balance"]) == ("-5.000000001", "19.999999999")
    assert call(service, "GET", "accounts/acme")["balance"] == "19.999999999"
    listed = call(service, "GET", "accounts/acme/credit?limit=1")
    assert ([each["id"] for each in listed["data"]], listed["has_more"]) == ([second["id"]], True)
    rest = call(service, "GET", f"accounts/acme/credit?after={second['id']}")
    assert ([each["note"] for each in rest["data"]], rest["has_more"]) == (["first"], False)
    call(service, "POST", "accounts", {"id": "other"})
    others = call(service, "POST", "accounts/other/credit", {"amount": "1"})
    for after in ("x", "", "999999", "9" * 30, others["id"]):
        assert refused(service, "GET", f"accounts/acme/credit?after={after}", status=400)[0] == "after"


def test_what_is_on_disk_is_not_said_to_have_failed_where_the_database_goes_away_after_it(
    service: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(service, "POST", "accounts", {"id": "acme", "prepaid": True})
    with monkeypatch.context() as away:
        away.setattr(directory, "PATIENCE_SECONDS", 0.0)
        given = call(service, "POST", "accounts/acme/credit", {"amount": "25"})
        made = call(service, "POST", "tokens", {"name": "t", "account": "acme"})
    assert given["balance"] == "25.00"
    assert call(service, "GET", "accounts/acme")["balance"] == "25.00"
    assert status_with(service, made["token"]) == 200


def test_credit_with_an_idempotency_key_is_given_once(service: InProcess) -> None:
    call(service, "POST", "accounts", {"id": "acme"})
    body = {"amount": "25", "note": "november"}
    answers = [call(service, "POST", "accounts/acme/credit", body, idempotency_key="k1") for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert call(service, "GET", "accounts/acme")["balance"] == "25.00"
    other = {"amount": "26", "note": "november"}
    _, code, _ = refused(service, "POST", "accounts/acme/credit", other, status=409, idempotency_key="k1")
    assert code == "idempotency_key_conflict"
    call(service, "POST", "accounts/acme/credit", body, idempotency_key="k2")
    assert call(service, "GET", "accounts/acme")["balance"] == "50.00"
    refused(service, "POST", "accounts/acme/credit", body, status=400, idempotency_key="é" * 300)
    # A key whose work was refused is free for the next.
    refused(service, "POST", "accounts/acme/credit", {"amount": "-1"}, status=400, idempotency_key="k3")
    call(service, "POST", "accounts/acme/credit", {"amount": "1"}, idempotency_key="k3")


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_is_made_used_changed_and_revoked(service: InProcess) -> None:
    soon = int(time.time()) + 3600
    wanted = {
        "name": "laptop",
        "scopes": ["inference"],
        "models": [service.model],
        "expires_at": soon,
        "soft_budget": "1.5",
        "requests_per_minute": 3,
    }
    made = call(service, "POST", "tokens", wanted)
    text = made.pop("token")
    assert is_well_formed(text)
    assert made == {
        **wanted,
        "id": made["id"],
        "object": "token",
        "account": "default",
        "hint": made["hint"],
        "soft_budget": "1.50",
        "hard_budget": None,
        "prompt_tokens_per_minute": None,
        "completion_tokens_per_minute": None,
        "concurrent_requests": None,
        "created_at": made["created_at"],
        "revoked_at": None,
        "last_used_at": None,
    }
    assert call(service, "GET", f"tokens/{made['id']}") == made
    assert status_with(service, text) == 200
    changes = {"models": None, "expires_at": None, "scopes": ["admin"], "requests_per_minute": None}
    changed = call(service, "PATCH", f"tokens/{made['id']}", changes)
    assert changed == {**made, **changes}
    assert status_with(service, text, "/v1/admin/accounts") == 200
    for _ in range(2):  # once or twice is the same
        gone = call(service, "DELETE", f"tokens/{made['id']}")
        assert gone["revoked_at"] == pytest.approx(time.time(), abs=5)
        assert status_with(service, text) == 401
    assert text not in json.dumps(call(service, "GET", "tokens"))


def test_a_token_with_an_idempotency_key_is_made_once_and_its_text_kept_nowhere(service: InProcess) -> None:
    made = call(service, "POST", "tokens", {"name": "backend"}, idempotency_key="k1")
    assert is_well_formed(made["token"])
    for _ in range(2):
        _, code, message = refused(service, "POST", "tokens", {"name": "backend"}, status=409, idempotency_key="k1")
        assert code == "conflict"
        assert f"{made['id']} was made under this Idempotency-Key" in message
    _, code, _ = refused(service, "POST", "tokens", {"name": "other"}, status=409, idempotency_key="k1")
    assert code == "idempotency_key_conflict"
    assert [row["id"] for row in call(service, "GET", "tokens")["data"] if row["name"] == "backend"] == [made["id"]]
    kept = service.books(lambda db: keys.find(db, "default", "k1"))
    assert kept is not None and kept.answer is not None
    assert json.loads(kept.answer)["id"] == made["id"]
    assert made["token"].encode() not in kept.answer
    call(service, "POST", "tokens", {"name": "backend"}, idempotency_key="k2")


def test_tokens_are_listed_by_account(service: InProcess) -> None:
    call(service, "POST", "accounts", {"id": "acme"})
    ids = [call(service, "POST", "tokens", {"name": str(n), "account": "acme"})["id"] for n in range(3)]
    listed = call(service, "GET", "tokens?account=acme")
    assert sorted(each["id"] for each in listed["data"]) == sorted(ids)
    assert len(call(service, "GET", "tokens")["data"]) == 4
    page = call(service, "GET", "tokens?account=acme&limit=2")
    rest = call(service, "GET", f"tokens?account=acme&after={page['last_id']}")
    assert [*page["data"], *rest["data"]] == listed["data"]
    assert call(service, "GET", "accounts/acme")["active_tokens"] == 3
    refused(service, "GET", "tokens?account=nobody", status=404)


@pytest.mark.parametrize("scopes", [["inference"], ["usage"], ["inference", "usage"]])
def test_only_admin_tokens_may_do_anything_here(service: InProcess, scopes: list[str]) -> None:
    token = service.mint("other", scopes=scopes).text
    for operation in admin.OPERATIONS:
        path = operation.path.replace("{id}", "default")
        body = None if operation.method in ("GET", "DELETE") else {}
        for authorization, status in ((f"Bearer {token}", 403), ("Bearer nonsense", 401)):
            got, _, text = ask(service, path, body, operation.method, authorization=authorization)
            assert (got, json.loads(text)["error"]["type"]) == (status, "invalid_request_error"), operation
    assert service.books(lambda db: accounts.find(db, "default")).closed_at is None


# ── prices and requests ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_price_is_set_from_now_on_or_from_a_moment_to_come(service: InProcess) -> None:
    first = next(row for row in call(service, "GET", "prices")["data"] if row["model"] == service.model)
    assert (first["valid_from"], first["origin"]) == (0, "catalogue")
    body = {"model": "SmolLM2", "input": "0.10", "cached_input": "0.05", "output": "0.3"}
    row = call(service, "POST", "prices", body)
    assert row == {
        "object": "price",
        "model": service.model,
        "input": "0.10",
        "cached_input": "0.05",
        "output": "0.30",
        "valid_from": row["valid_from"],
        "origin": "operator",
    }
    assert row["valid_from"] == pytest.approx(time.time(), abs=5)
    tomorrow = int(time.time()) + 86400
    call(service, "POST", "prices", {**body, "input": "9", "valid_from": tomorrow})
    assert refused(service, "POST", "prices", {**body, "valid_from": tomorrow}, status=400)[0] == "valid_from"
    param, _, message = refused(service, "POST", "prices", {**body, "valid_from": tomorrow - 90000}, status=400)
    assert (param, "never changes" in message) == ("valid_from", True)
    assert refused(service, "POST", "prices", {**body, "model": "smollm9"}, status=404)[0] == "model"
    # In force at once, and public.
    listed = json.loads(ask(service, "/v1/pricing", authorization="")[2])
    shown = next(each for each in listed["data"] if each["id"] == service.model)
    assert (shown["input"], shown["cached_input"], shown["output"]) == ("0.10", "0.05", "0.30")
    assert [each["input"] for each in shown["upcoming"]] == ["9.00"]


def test_a_request_is_shown_and_refunded_once(service: InProcess) -> None:
    call(service, "POST", "accounts", {"id": "acme", "prepaid": True, "plan": "unlimited"})
    call(service, "POST", "accounts/acme/credit", {"amount": "1"})
    call(service, "POST", "prices", {"model": service.model, "input": "1000", "output": "1000"})
    token = call(service, "POST", "tokens", {"name": "t", "account": "acme"})["token"]
    status, headers, answer = _chat(service, token)
    assert status == 200
    path = f"requests/{headers['x-request-id']}"
    row = call(service, "GET", path)
    usage = answer["usage"]
    assert (row["status"], row["account"], row["model"]) == ("settled", "acme", service.model)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    cost = (usage["prompt_tokens"] + usage["completion_tokens"]) / 1000
    assert float(row["cost"]) == pytest.approx(cost)
    account = call(service, "GET", "accounts/acme")
    assert account["spent_this_month"] == row["cost"]
    assert float(account["balance"]) == pytest.approx(1 - cost)
    for _ in range(2):
        refund = call(service, "POST", f"{path}/refund", {"note": "our fault"})
        assert (refund["status"], refund["cost"], refund["waived"]) == ("refunded", "0.00", row["cost"])
    assert call(service, "GET", "accounts/acme")["balance"] == "1.00"
    kinds = [each["kind"] for each in call(service, "GET", "accounts/acme/credit")["data"]]
    assert kinds == ["refund", "charge", "grant"]


def test_of_several_requests_with_one_name_none_is_refunded_by_it(service: InProcess) -> None:
    first, second = ({**settlement(number), "request_id": "chosen"} for number in (1, 2))
    service.books(lambda db: requests.apply(db, [first, second], 0))
    _, _, message = refused(service, "POST", "requests/chosen/refund", {"note": "x"}, status=409)
    assert first["id"] in message and second["id"] in message
    assert call(service, "POST", f"requests/{first['id']}/refund", {"note": "x"})["status"] == "refunded"


def _chat(service: InProcess, token: str) -> tuple[int, dict[str, str], Any]:
    body = {"model": service.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
    status, headers, text = ask(service, "/v1/chat/completions", body, authorization=f"Bearer {token}")
    return status, headers, json.loads(text)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["nobody", "%00", "%0a", "%ff", "x" * 1000, "..", "'%20OR%201=1"])
def test_what_is_not_there_is_not_found(service: InProcess, name: str) -> None:
    for operation in admin.OPERATIONS:
        if "{id}" not in operation.path:
            continue
        body = {"NewCredit": {"amount": "1"}, "NewRefund": {"note": "x"}}.get(operation.body or "", {})
        path = operation.path.removeprefix("/v1/admin/").replace("{id}", name)
        sent = None if operation.body is None else body
        _, code, message = refused(service, operation.method, path, sent, status=404)
        assert code in ("not_found", "unknown_url")
        assert len(message) < 300
    _, code, _ = refused(service, "POST", "tokens", {"name": "t", "account": "nobody"}, status=404)
    assert code == "not_found"


BAD = [
    ("accounts", {}, "id"),
    ("accounts", {"id": 5}, "id"),
    ("accounts", {"id": ""}, "id"),
    ("accounts", {"id": "x" * 65}, "id"),
    ("accounts", {"id": "a", "plan": "gold"}, "plan"),
    ("accounts", {"id": "a", "plan": None}, "plan"),
    ("accounts", {"id": "a", "prepaid": "yes"}, "prepaid"),
    ("accounts", {"id": "a", "prepaid": 1}, "prepaid"),
    ("accounts", {"id": "a", "name": ""}, "name"),
    ("accounts", {"id": "a", "name": "x" * 201}, "name"),
    ("accounts", {"id": "a", "hard_budget": 25}, "hard_budget"),
    ("accounts", {"id": "a", "hard_budget": "-1"}, "hard_budget"),
    ("accounts", {"id": "a", "hard_budget": "1e3"}, "hard_budget"),
    ("accounts", {"id": "a", "hard_budget": "0.0000000001"}, "hard_budget"),
    ("accounts", {"id": "a", "hard_budget": "٣"}, "hard_budget"),
    ("accounts", {"id": "a", "requests_per_minute": -1}, "requests_per_minute"),
    ("accounts", {"id": "a", "requests_per_minute": 1.5}, "requests_per_minute"),
    ("accounts", {"id": "a", "requests_per_minute": "9"}, "requests_per_minute"),
    ("accounts", {"id": "a", "requests_per_minute": True}, "requests_per_minute"),
    ("accounts", {"id": "a", "requests_per_minute": 10**13}, "requests_per_minute"),
    ("accounts", {"id": "a", "hard_budget_nanos": 1}, "hard_budget_nanos"),
    ("accounts", {"id": "a", "version": 1}, "version"),
    ("accounts", [], None),
    ("accounts", "x", None),
    ("accounts/default/credit", {}, "amount"),
    ("accounts/default/credit", {"amount": 25}, "amount"),
    ("accounts/default/credit", {"amount": "$25"}, "amount"),
    ("accounts/default/credit", {"amount": "9" * 10}, "amount"),
    ("accounts/default/credit", {"amount": "1", "kind": "charge"}, "kind"),
    ("accounts/default/credit", {"amount": "1", "note": "x" * 201}, "note"),
    ("tokens", {}, "name"),
    ("tokens", {"name": "t", "scopes": []}, "scopes"),
    ("tokens", {"name": "t", "scopes": ["root"]}, "scopes.0"),
    ("tokens", {"name": "t", "models": []}, "models"),
    ("tokens", {"name": "t", "models": "all"}, "models"),
    ("tokens", {"name": "t", "models": ["m"] * 1001}, "models"),
    ("tokens", {"name": "t", "expires_at": "tomorrow"}, "expires_at"),
    ("tokens", {"name": "t", "expires_at": 10**15}, "expires_at"),
    ("tokens", {"name": "t", "token": "octoai_mine"}, "token"),
    ("prices", {"model": "smollm2", "input": "1"}, "output"),
    ("prices", {"model": "smollm2", "input": "1", "output": 1}, "output"),
    ("prices", {"model": "smollm2", "input": "1", "output": "0.0001"}, "output"),
    ("prices", {"model": "smollm2", "input": "-1", "output": "1"}, "input"),
    ("requests/req_1/refund", {}, "note"),
]
# Well-formed, and still not possible.
IMPOSSIBLE = [
    ("accounts", {"id": "Not An Id"}, "id"),
    ("accounts", {"id": "a", "name": "nul\0"}, "name"),
    ("accounts/default/credit", {"amount": "0"}, "amount"),
    ("accounts/default/credit", {"amount": "-1"}, "amount"),
    ("accounts/default/credit", {"amount": "1", "note": "nul\0"}, "note"),
    ("tokens", {"name": "t", "expires_at": 5}, "expires_at"),
    ("tokens", {"name": "t", "models": ["nul\0"]}, "models"),
    ("tokens", {"name": "\n"}, "name"),
]


def test_a_bad_body_is_refused_naming_the_field(service: InProcess) -> None:
    for path, body, param in BAD:
        answer = call(service, "POST", path, body, expect=422)
        assert (answer["error"]["param"], answer["error"]["code"]) == (param, "invalid_value"), (path, body)
        assert answer["detail"][0]["loc"][0] == "body"
        assert set(answer["detail"][0]) == {"loc", "msg", "type"}
    for path, body, param in IMPOSSIBLE:
        named, _, message = refused(service, "POST", path, body, status=400)
        assert named == param, (path, body)
        assert param.capitalize() + ":" not in message  # a field is written as it is
    for path in ("accounts/default", f"tokens/{service.mint('t').id}"):
        for body in ({"id": "x"}, {"name": None}, {"created_at": 1}, {"requests_per_minute": "none"}):
            refused(service, "PATCH", path, body, status=422)
    for body in (b"", b"{", b"\xff", b'{"id": "\\ud800"}'):
        assert refused(service, "POST", "accounts", body, status=400)[1] == "invalid_json"
    assert [each["id"] for each in call(service, "GET", "accounts")["data"]] == ["default"]


def test_what_a_refusal_repeats_is_bounded(service: InProcess) -> None:
    many = {str(number) + "x" * 1000: 1 for number in range(200)}
    status, _, text = ask(service, "/v1/admin/accounts", many)
    assert (status, len(text) < 30_000) == (422, True)
    assert len(json.loads(text)["detail"]) == MAX_PROBLEMS
    assert refused(service, "POST", "accounts", {"id": "x" * 300_000}, status=413)[1] == "body_too_large"


def test_a_method_that_is_not_offered_is_told_which_are(service: InProcess) -> None:
    status, headers, _ = ask(service, "/v1/admin/accounts/default", {}, "PUT")
    assert status == 405
    assert {"GET", "PATCH", "DELETE"} <= set(headers["allow"].split(", "))
    assert ask(service, "/v1/admin/accounts", method="HEAD")[0] == 200


def test_a_running_request_is_not_refunded(place: Place) -> None:
    service = InProcess(ScriptedEngine(LONG), place.data_dir, url=place.url)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
        body = {"model": service.model, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        headers = {"authorization": f"Bearer {service.token}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        path = f"requests/{response.headers['x-request-id']}"
        assert call(service, "GET", path)["status"] == "open"
        assert refused(service, "POST", f"{path}/refund", {"note": "x"}, status=409)[1] == "conflict"
        connection.close()
    finally:
        service.close()


# ── what is said of it ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_operation_is_documented() -> None:
    described = document()
    for operation in admin.OPERATIONS:
        entry = described["paths"][operation.path][operation.method.lower()]
        assert entry["summary"] == operation.summary
        if operation.body is not None:
            reference = entry["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            schema = described["components"]["schemas"][reference.rsplit("/", 1)[-1]]
            assert schema["additionalProperties"] is False
    assert described["paths"]["/v1/pricing"]["get"]["security"] == []


def test_the_types_of_bodies_know_the_same_plans_and_scopes_as_the_service() -> None:
    assert set(BODIES["NewAccount"].json_schema()["properties"]["plan"]["enum"]) == set(PLANS)
    scopes = BODIES["NewToken"].json_schema()["properties"]["scopes"]["items"]["enum"]
    assert set(scopes) == set(SCOPES)
    assert set(tokens.DEFAULT_SCOPES) < set(SCOPES)
