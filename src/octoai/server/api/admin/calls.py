"""One call of an operation, and what operations have in common: pages, and what must be done once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import orjson
from starlette.requests import Request

from octoai.server.accounts import Caller
from octoai.server.errors import BadRequest, KeyConflict, StateConflict
from octoai.server.idempotency import Key
from octoai.server.service import Service
from octoai.server.store import keys
from octoai.server.store.database import Connection
from octoai.server.store.keys import KeyRow

DEFAULT_PAGE, MAX_PAGE = 20, 100

Json = dict[str, Any]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operation: who calls, what with, and where it is done."""

    request: Request
    service: Service
    caller: Caller
    raw: bytes
    body: Json
    now_us: int

    @property
    def id(self) -> str:
        """The account, token or request that the path names."""
        return str(self.request.path_params["id"])

    @property
    def limit(self) -> int:
        """How many rows a page has at most."""
        text = self.request.query_params.get("limit", str(DEFAULT_PAGE))
        if not (re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= MAX_PAGE):
            raise BadRequest(f"limit: a number from 1 to {MAX_PAGE}", param="limit")
        return int(text)

    @property
    def after(self) -> str | None:
        """The id of the last row of the page before."""
        return self.request.query_params.get("after")

    @property
    def key(self) -> Key | None:
        text = self.request.headers.get("idempotency-key")
        return None if text is None else Key.of(text, self.request.url.path, self.raw)


def page(rows: Sequence[tuple[str, R]], limit: int, after: str | None) -> tuple[list[R], bool]:
    """(at most so many of the rows that come after the one with that id, whether there are more)."""
    start = 0
    if after is not None:
        start = next((number for number, (key, _) in enumerate(rows, 1) if key == after), 0)
        if not start:
            raise BadRequest("after: the `id` of a row of the page before", param="after")
    return [row for _, row in rows[start : start + limit]], len(rows) > start + limit


def listed(data: list[Json], has_more: bool) -> Json:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0].get("id") if data else None,
        "last_id": data[-1].get("id") if data else None,
        "has_more": has_more,
    }


def once(db: Connection, call: Call, write: Callable[[Connection], Json], *, shown_once: str | None = None) -> Json:
    """Do it, and keep the answer in the same transaction under the call's Idempotency-Key, if it has one; or give the
    answer that is kept. Raises KeyConflict where the key was used for something else.

    `shown_once` names what of the answer is a secret and not kept: who asks again is told so by a StateConflict."""
    key, account, request_id = call.key, call.caller.account.id, str(call.request.state.request_id)
    if key is None:
        return write(db)
    claimed = KeyRow(key.body_hash, request_id, request_id, journal="", claimed_us=call.now_us)
    before = keys.claim(db, account, key.value, claimed)
    if before is None:
        answer = write(db)
        kept = {name: value for name, value in answer.items() if name != shown_once}
        keys.keep(db, account, key.value, request_id, orjson.dumps(kept))
        return answer
    if before.body_hash != key.body_hash or before.answer is None:
        raise KeyConflict("This Idempotency-Key was used for another request.")
    stored = cast("Json", orjson.loads(before.answer))
    if shown_once is not None:
        raise StateConflict(
            f"{stored['id']} was made under this Idempotency-Key; its `{shown_once}` was shown then and is not kept. "
            "If it did not arrive, revoke that one and make another under another key."
        )
    return stored
