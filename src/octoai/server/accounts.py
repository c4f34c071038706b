"""Accounts: who pays. Opened, changed and closed here, for the command line and the administration API alike.

Functions take a database connection and run inside the caller's transaction. What is wrong with an argument is raised
as `BadAccount`, in one line that names it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from octoai.server.store import accounts as table
from octoai.server.store import entries
from octoai.server.store.accounts import LIMIT_NAMES, AccountRow, Limits
from octoai.server.store.database import Conflict, Connection
from octoai.server.store.entries import Entry
from octoai.server.store.tokens import TokenRow
from octoai.server.times import now_us

DEFAULT_ACCOUNT = "default"
# OctoAI's own figures for the first two.
PLANS = {"free": Limits(requests_per_minute=10), "pro": Limits(requests_per_minute=240), "unlimited": Limits()}
_ID = re.compile(r"(?!tok_)[a-z0-9][a-z0-9._-]{0,63}")
MAX_NAME = 200
MAX_AMOUNT_NANOS = 10**18
MAX_BALANCE_NANOS = 4 * 10**18  # what a database can add to and take from without an end


class BadAccount(ValueError):
    """It cannot be done as asked; the text is one line for whoever asked, `param` the argument that is wrong.

    BadAccount
    ├── UnknownAccount   there is no such account
    ├── UnknownToken     there is no such token
    └── AccountExists    the id is taken
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownAccount(BadAccount):
    pass


class UnknownToken(BadAccount):
    pass


class AccountExists(BadAccount):
    pass


@dataclass(frozen=True)
class Caller:
    """Who is asking, and pays: an account, by one of its tokens."""

    account: AccountRow
    token: TokenRow

    @cached_property
    def is_limited(self) -> bool:
        """Whether its requests must be reserved before they run."""
        return self.account.is_limited or self.token.limits.is_any

    @property
    def needs_prompt_tokens(self) -> bool:
        """Whether a limit depends on how long the prompt is, so that it must be counted before the request runs."""
        of_both = (self.account.limits, self.token.limits)
        return self.account.is_prepaid or any(
            limits.hard_budget_nanos is not None or limits.prompt_tokens_per_minute is not None for limits in of_both
        )

    @property
    def max_completion_tokens(self) -> int | None:
        """The most that one request may generate within a minute's limit."""
        bounds = (self.account.limits.completion_tokens_per_minute, self.token.limits.completion_tokens_per_minute)
        return min((bound for bound in bounds if bound is not None), default=None)


def create(
    db: Connection,
    account_id: str,
    *,
    name: str | None = None,
    plan: str = "free",
    is_prepaid: bool = False,
    limits: Mapping[str, int | None] | None = None,
) -> AccountRow:
    """`limits` are by the names of `Limits`, over what the plan has."""
    if not _ID.fullmatch(account_id):
        raise BadAccount(
            f"an account's id is lower-case letters, digits, '.', '_' and '-', at most 64, not {account_id!r:.80}",
            param="id",
        )
    chosen = replace(_plan(plan), **checked_limits(limits or {}))
    row = AccountRow(account_id, checked_name(name or account_id), plan, is_prepaid, chosen, int(time.time()))
    try:
        table.add(db, row)
    except Conflict:
        raise AccountExists(f"there is an account {account_id!r} already", param="id") from None
    return row


def ensure_default(db: Connection) -> AccountRow:
    """The operator's own account, without limits; made when it is missing."""
    return table.find(db, DEFAULT_ACCOUNT) or create(db, DEFAULT_ACCOUNT, plan="unlimited")


def find(db: Connection, account_id: str) -> AccountRow:
    """Raises UnknownAccount."""
    row = table.find(db, account_id) if account_id.isprintable() else None  # no database takes every character
    if row is None:
        raise UnknownAccount(f"there is no account {account_id!r:.80}", param="account")
    return row


def update(
    db: Connection,
    account_id: str,
    *,
    name: str | None = None,
    plan: str | None = None,
    is_prepaid: bool | None = None,
    limits: Mapping[str, int | None] | None = None,
) -> AccountRow:
    """Only what is given changes; a new plan brings its own limits, and `limits` are over those."""
    find(db, account_id)
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = checked_name(name)
    if plan is not None:
        changes |= {"plan": plan, **_rates(_plan(plan))}
    if is_prepaid is not None:
        changes["is_prepaid"] = is_prepaid
    changes |= checked_limits(limits or {})
    if changes:
        table.update(db, account_id, changes)
    return find(db, account_id)


def close(db: Connection, account_id: str) -> AccountRow:
    """Its tokens are refused from now on; its entries stay."""
    if find(db, account_id).closed_at is None:
        table.update(db, account_id, {"closed_at": int(time.time())})
    return find(db, account_id)


def reopen(db: Connection, account_id: str) -> AccountRow:
    find(db, account_id)
    table.update(db, account_id, {"closed_at": None})
    return find(db, account_id)


def credit(db: Connection, account_id: str, nanos: int, *, note: str = "", kind: str = "grant") -> Entry:
    """Add to an account's balance ("grant"), or put it right by so much ("adjustment", which may be negative)."""
    find(db, account_id)
    if kind not in ("grant", "adjustment"):
        raise BadAccount(f'kind: "grant" or "adjustment", not {kind!r:.40}', param="kind")
    if kind == "grant" and nanos <= 0:
        raise BadAccount("a grant must be more than nothing; an adjustment may be negative", param="amount")
    if nanos == 0 or abs(nanos) > MAX_AMOUNT_NANOS:
        raise BadAccount("an amount is not zero, and at most a billion dollars", param="amount")
    if abs(entries.balance_nanos(db, account_id) + nanos) > MAX_BALANCE_NANOS:
        raise BadAccount("a balance is at most four billion dollars, on either side of zero", param="amount")
    (entry,) = entries.post(db, [Entry(now_us(), account_id, kind, nanos, note=checked_note(note) or None)])
    return entry


def checked_note(note: str) -> str:
    if len(note) > MAX_NAME or not note.isprintable():
        raise BadAccount(f"note: at most {MAX_NAME} printable characters", param="note")
    return note


def checked_limits(limits: Mapping[str, int | None]) -> dict[str, int | None]:
    """The same limits by name. Raises BadAccount for a name or a number that is none."""
    for name, value in limits.items():
        if name not in LIMIT_NAMES:
            raise BadAccount(f"{name}: there is no such limit; there are {', '.join(LIMIT_NAMES)}", param=name)
        if value is not None and not 0 <= value < 2**62:
            raise BadAccount(f"{name}: a limit is from 0 to {2**62 - 1}, not {value}", param=name)
    return dict(limits)


def _plan(plan: str) -> Limits:
    if plan not in PLANS:
        raise BadAccount(f"plan: one of {', '.join(PLANS)}, not {plan!r:.40}", param="plan")
    return PLANS[plan]


def _rates(limits: Limits) -> dict[str, int | None]:
    """What a plan decides: budgets are an account's own."""
    return {name: value for name, value in asdict(limits).items() if not name.endswith("_budget_nanos")}


def checked_name(name: str) -> str:
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise BadAccount(f"name: 1 to {MAX_NAME} printable characters", param="name")
    return name
