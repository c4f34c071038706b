"""The monthly statement of an account, and usage as a person asks for it: rows and sums, not how they look.

A statement is computed from the entries of the ledger alone, so that its opening balance and everything on it add up
to its closing balance, to the nano-dollar. Read it in one snapshot, or what happens meanwhile is in one half of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, reduce

from octoai.server import accounts
from octoai.server.store import statements as table
from octoai.server.store import tokens, usage
from octoai.server.store.accounts import all_ as all_accounts
from octoai.server.store.database import Connection
from octoai.server.store.statements import Charged, Movement
from octoai.server.store.usage import Filters, UsageSum
from octoai.server.times import DAY, HOUR, MINUTE

GIVEN = ("grant", "adjustment")
# What usage may be told by: spans of time by how they are written, and who and what.
TIMES = {"hour": (HOUR, "%Y-%m-%d %H:00"), "day": (DAY, "%Y-%m-%d"), "month": (DAY, "%Y-%m")}
_DIMENSIONS = {"account": "account", "token": "token_id", "model": "model"}
BY = (*TIMES, *_DIMENSIONS)


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Counts and nano-dollars of whatever `key` says. Cached tokens are among the prompt tokens."""

    key: tuple[str, ...]
    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_nanos: int = 0


@dataclass(frozen=True, slots=True)
class Statement:
    """An account's month, [start_us, end_us) in microseconds. Amounts are what they add to the balance.

    `until_us` is the moment that it tells of: the end of the month, or when it was read where the month is not over.
    """

    account: str
    name: str
    start_us: int
    end_us: int
    until_us: int
    opening_nanos: int
    charged: tuple[Charged, ...]
    movements: tuple[Movement, ...]

    @property
    def is_over(self) -> bool:
        return self.until_us >= self.end_us

    @property
    def given(self) -> tuple[Movement, ...]:
        """Grants and adjustments."""
        return tuple(each for each in self.movements if each.kind in GIVEN)

    @property
    def corrected(self) -> tuple[Movement, ...]:
        """Corrections and refunds of requests, on the day when they were made."""
        return tuple(each for each in self.movements if each.kind not in GIVEN)

    @property
    def usage(self) -> UsageLine:
        """All that was charged in the month, before corrections and refunds."""
        return total(self.by_model)

    @property
    def by_model(self) -> list[UsageLine]:
        return added(_usage(each, (each.model,)) for each in self.charged)

    @property
    def by_token(self) -> list[UsageLine]:
        return added(_usage(each, (each.token_id,)) for each in self.charged)

    @property
    def closing_nanos(self) -> int:
        charged = sum(each.amount_nanos for each in self.charged)
        return self.opening_nanos + charged + sum(each.amount_nanos for each in self.movements)


def statement(db: Connection, account_id: str, month: tuple[int, int], now_us: int) -> Statement:
    """Of a month from when to when in microseconds. Raises UnknownAccount."""
    account = accounts.find(db, account_id)
    return _statement(db, account.id, account.name, month, now_us)


def _statement(db: Connection, account_id: str, name: str, month: tuple[int, int], now_us: int) -> Statement:
    start_us, end_us = month
    return Statement(
        account_id,
        name,
        start_us,
        end_us,
        max(start_us, min(end_us, now_us)),
        table.balance_nanos(db, account_id, start_us),
        tuple(table.charged(db, account_id, start_us, end_us)),
        tuple(table.movements(db, account_id, start_us, end_us)),
    )


def statements(db: Connection, month: tuple[int, int], now_us: int) -> list[Statement]:
    """Of every account that had an entry before the end of the month; of one that the database does not have any more,
    having gone back to before it was made, by its id alone."""
    names = {row.id: row.name for row in all_accounts(db)}
    ids = table.accounts_with_entries(db, month[1])
    return [_statement(db, each, names.get(each, each), month, now_us) for each in ids]


def usage_by(
    db: Connection, start_us: int, end_us: int, by: Sequence[str], account_ids: Sequence[str] | None = None
) -> Generator[UsageLine]:
    """Usage by any of BY, in that order, of [start_us, end_us) widened to whole minutes. Refunds and corrections are in
    the cost, when they were made. Rows come as they are read, inside a transaction. Raises ValueError, in one line, for
    what cannot be."""
    unknown = [name for name in by if name not in BY]
    if unknown:
        raise ValueError(f"usage can be told by {', '.join(BY)}, not by {unknown[0]!r:.40}")
    times = [name for name in by if name in TIMES]
    if len(times) > 1:
        raise ValueError(f"usage can be told by {times[0]} or by {times[1]}, not by both")
    found = usage.stream(
        db,
        start_us // 1_000_000 // MINUTE * MINUTE,
        -(-end_us // (MINUTE * 1_000_000)) * MINUTE,
        width=TIMES[times[0]][0] if times else None,
        by=[_DIMENSIONS.get(name, "start_at") for name in by],
        filters=Filters(accounts=account_ids),
    )
    rows = (
        UsageLine(
            tuple(_written(each, name) for name in by),
            *(each.num_requests, each.prompt_tokens, each.cached_tokens, each.completion_tokens, each.cost_nanos),
        )
        for each in found
    )
    return (each for each in added(rows)) if "month" in times else rows  # the database knows of days, not of months


def added(rows: Iterable[UsageLine]) -> list[UsageLine]:
    """One for each key, in the order of keys."""
    sums: dict[tuple[str, ...], UsageLine] = {}
    for row in rows:
        sums[row.key] = _sum(sums[row.key], row) if row.key in sums else row
    return [sums[key] for key in sorted(sums)]


def total(rows: Iterable[UsageLine]) -> UsageLine:
    return reduce(_sum, rows, UsageLine(()))


def token_names(db: Connection) -> dict[str, str]:
    """What tokens are called, by id."""
    return {row.id: row.name for row in tokens.all_(db)}


def _sum(one: UsageLine, other: UsageLine) -> UsageLine:
    """Under the key of the first."""
    return UsageLine(
        one.key,
        one.num_requests + other.num_requests,
        one.prompt_tokens + other.prompt_tokens,
        one.cached_tokens + other.cached_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cost_nanos + other.cost_nanos,
    )


def _usage(of: Charged, key: tuple[str, ...]) -> UsageLine:
    counts = (of.num_requests, of.prompt_tokens, of.cached_tokens, of.completion_tokens)
    return UsageLine(key, *counts, -of.amount_nanos)


def _written(of: UsageSum, name: str) -> str:
    return _time(of.start_at, name) if name in TIMES else str(getattr(of, _DIMENSIONS[name]))


@lru_cache(maxsize=1000)
def _time(start_at: int, name: str) -> str:
    return datetime.fromtimestamp(start_at, UTC).strftime(TIMES[name][1])
