"""Accounts as rows, and the limits that accounts and tokens have alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any

from octoai.server.store.database import Connection, Row


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit. Budgets are nano-dollars a calendar month (UTC): over the soft one answers carry a warning,
    over the hard one there are none. Tokens a minute are counted apart for prompts and completions."""

    soft_budget_nanos: int | None = None
    hard_budget_nanos: int | None = None
    requests_per_minute: int | None = None
    prompt_tokens_per_minute: int | None = None
    completion_tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    @property
    def is_any(self) -> bool:
        return self != _NO_LIMITS


_NO_LIMITS = Limits()
LIMIT_NAMES = tuple(each.name for each in fields(Limits))


@dataclass(frozen=True, slots=True)
class AccountRow:
    """`plan` is where its limits came from. A prepaid account spends its credit and no more; times are Unix seconds."""

    id: str
    name: str
    plan: str
    is_prepaid: bool
    limits: Limits = field(default_factory=Limits)
    created_at: int = 0
    closed_at: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether its requests must be reserved before they run."""
        return self.is_prepaid or self.limits.is_any


COLUMNS = f"id, name, plan, is_prepaid, {', '.join(LIMIT_NAMES)}, created_at, closed_at"


def row_of(row: Row) -> AccountRow:
    id_, name, plan, is_prepaid, *limits, created_at, closed_at = row
    return AccountRow(id_, name, plan, bool(is_prepaid), Limits(*limits), created_at, closed_at)


def next_version(db: Connection) -> int:
    """The number of the change being made: those who keep copies ask for what has a higher one than they have."""
    counted = db.row("UPDATE versions SET value = value + 1 WHERE name = 'directory' RETURNING value")
    assert counted is not None
    return int(counted[0])


def add(db: Connection, account: AccountRow) -> None:
    """Raises Conflict where the id is taken."""
    values = (
        *(account.id, account.name, account.plan, int(account.is_prepaid)),
        *astuple(account.limits),
        *(account.created_at, account.closed_at, next_version(db)),
    )
    marks = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO accounts ({COLUMNS}, version) VALUES ({marks})", values)  # noqa: S608  # constants only


def find(db: Connection, account_id: str) -> AccountRow | None:
    row = db.row(f"SELECT {COLUMNS} FROM accounts WHERE id = ?", (account_id,))  # noqa: S608
    return None if row is None else row_of(row)


def all_(db: Connection) -> list[AccountRow]:
    return [row_of(row) for row in db.rows(f"SELECT {COLUMNS} FROM accounts ORDER BY created_at, id")]  # noqa: S608


def update(db: Connection, account_id: str, changes: Mapping[str, Any]) -> bool:
    """`changes` by the names of columns. False where there is no such account."""
    return update_row(db, "accounts", account_id, changes)


def update_row(db: Connection, table: str, key: str, changes: Mapping[str, Any]) -> bool:
    """Change one row of `accounts` or `tokens`, under a new version. The names are of our own making, not a user's."""
    names = [*changes, "version"]
    assignments = ", ".join(f"{name} = ?" for name in names)
    values = [int(value) if isinstance(value, bool) else value for value in changes.values()]
    sql = f"UPDATE {table} SET {assignments} WHERE id = ?"  # noqa: S608
    return db.execute(sql, (*values, next_version(db), key)) == 1
