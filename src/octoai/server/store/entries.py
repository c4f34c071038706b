"""The ledger itself: entries that are only ever added, each holding the hash of the one before.

`post` is the only way in. It keeps, in the same transaction, what follows from the entries: balances, the spending of
a month, and usage by the minute. `ledger verify` computes all of these again from the entries.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import add, attrgetter
from typing import NamedTuple

import orjson

from octoai.server.store.database import Connection, Row
from octoai.server.times import DAY_US, MINUTE_US

# What a request's price is about. "charge" comes once for each request; "correction" adds what became known later.
OF_REQUESTS = frozenset({"charge", "correction", "refund"})


class Entry(NamedTuple):
    """`amount_nanos` is what it adds to the account's balance: charges are negative. `seq` 0: not posted yet."""

    at_us: int
    account: str
    kind: str
    amount_nanos: int
    token_id: str | None = None
    request: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    note: str | None = None
    seq: int = 0
    hash: str = ""

    def chained(self, before: str) -> str:
        """The hash that this entry must have after one with the hash `before`."""
        return _chained(before, _values(self)[:-1])


_NAMES = (
    *("seq", "at_us", "account", "token_id", "kind", "amount_nanos", "request", "model"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "note", "hash"),
)
COLUMNS = ", ".join(_NAMES)
_values = attrgetter(*_NAMES)
_facts = attrgetter(*_NAMES[2:-1])  # all but what an entry gets when it is posted


def row_of(row: Row) -> Entry:
    seq, at_us, account, token_id, kind, amount, request, model, prompt, cached, completion, note, digest = row
    return Entry(at_us, account, kind, amount, token_id, request, model, prompt, cached, completion, note, seq, digest)


def _chained(before: str, values: Row) -> str:
    return hashlib.sha256(orjson.dumps([before, *values])).hexdigest()


def post(db: Connection, entries: Sequence[Entry]) -> list[Entry]:
    """Append to the ledger, inside the caller's transaction. Returns the entries as written.

    Times never go back, whatever the clock does: a month that has been billed stays as it was.
    """
    if not entries:
        return []
    head = db.row("SELECT seq, at_us, hash FROM head WHERE id = 1")
    assert head is not None
    seq, at_us, digest = head
    posted = []
    for entry in entries:
        seq, at_us = seq + 1, max(at_us, entry.at_us)
        values = (seq, at_us, *_facts(entry))
        digest = _chained(digest, values)
        posted.append(row_of((*values, digest)))
    db.execute_many(
        f"INSERT INTO entries ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
        map(_values, posted),
    )
    db.execute("UPDATE head SET seq = ?, at_us = ?, hash = ? WHERE id = 1", (seq, at_us, digest))
    _add_to_balances(db, posted)
    _add_to_spending(db, posted)
    _add_to_usage(db, posted)
    return posted


def of_account(db: Connection, account: str, limit: int, before_seq: int | None = None) -> list[Entry]:
    """An account's newest entries, or those before one of them, newest first."""
    condition = "account = ?"
    values: list[str | int] = [account]
    if before_seq is not None:  # the times let the index find the place
        condition += " AND seq < ? AND at_us <= (SELECT at_us FROM entries WHERE seq = ?)"
        values += [before_seq, before_seq]
    query = f"SELECT {COLUMNS} FROM entries WHERE {condition} ORDER BY at_us DESC, seq DESC LIMIT ?"  # noqa: S608
    return [row_of(row) for row in db.rows(query, (*values, limit))]


def is_of_account(db: Connection, account: str, seq: int) -> bool:
    return db.row("SELECT 1 FROM entries WHERE seq = ? AND account = ?", (seq, account)) is not None


def ledger_us(db: Connection, now_us: int) -> int:
    """When an entry would be written that is posted now: not before the newest one."""
    row = db.row("SELECT at_us FROM head WHERE id = 1")
    return now_us if row is None else max(now_us, int(row[0]))


def month_of(at_us: int) -> str:
    """The calendar month in UTC: "2026-11"."""
    return _month_of_day(at_us // DAY_US)


@lru_cache(maxsize=64)
def _month_of_day(day: int) -> str:
    return datetime.fromtimestamp(day * DAY_US // 1_000_000, UTC).strftime("%Y-%m")


def balance_nanos(db: Connection, account: str) -> int:
    row = db.row("SELECT nanos FROM balances WHERE account = ?", (account,))
    return 0 if row is None else int(row[0])


def spent_nanos(db: Connection, payer: str, month: str) -> int:
    """What an account, or a token, was charged in that month."""
    row = db.row("SELECT nanos FROM spending WHERE payer = ? AND month = ?", (payer, month))
    return 0 if row is None else int(row[0])


def _add_to_balances(db: Connection, posted: Sequence[Entry]) -> None:
    sums: defaultdict[str, int] = defaultdict(int)
    for entry in posted:
        sums[entry.account] += entry.amount_nanos
    db.execute_many(
        "INSERT INTO balances (account, nanos) VALUES (?, ?) "
        "ON CONFLICT (account) DO UPDATE SET nanos = balances.nanos + excluded.nanos",
        sorted(sums.items()),  # in one order everywhere, or two writers could wait for each other
    )


def _add_to_spending(db: Connection, posted: Sequence[Entry]) -> None:
    sums: defaultdict[tuple[str, str], int] = defaultdict(int)
    for entry in posted:
        if entry.kind in OF_REQUESTS:
            month = month_of(entry.at_us)
            sums[entry.account, month] -= entry.amount_nanos
            if entry.token_id is not None:
                sums[entry.token_id, month] -= entry.amount_nanos
    db.execute_many(
        "INSERT INTO spending (payer, month, nanos) VALUES (?, ?, ?) "
        "ON CONFLICT (payer, month) DO UPDATE SET nanos = spending.nanos + excluded.nanos",
        [(payer, month, nanos) for (payer, month), nanos in sorted(sums.items())],
    )


def usage_key(entry: Entry) -> tuple[int, str, str, str]:
    """(start of its minute in Unix seconds, account, token, model): the row of `usage` that it belongs to."""
    return (entry.at_us // MINUTE_US * 60, entry.account, entry.token_id or "", entry.model or "")


def usage_values(entry: Entry) -> tuple[int, int, int, int, int]:
    """(requests, prompt, cached and completion tokens, nano-dollars) that it adds to `usage`."""
    requests = 1 if entry.kind == "charge" else 0
    return (requests, entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens, -entry.amount_nanos)


def _add_to_usage(db: Connection, posted: Sequence[Entry]) -> None:
    sums: dict[tuple[int, str, str, str], tuple[int, ...]] = {}
    for entry in posted:
        if entry.kind in OF_REQUESTS:
            key, values = usage_key(entry), usage_values(entry)
            before = sums.get(key)
            sums[key] = values if before is None else tuple(map(add, before, values))
    db.execute_many(
        """
        INSERT INTO usage (minute_at, account, token_id, model,
                           num_requests, prompt_tokens, cached_tokens, completion_tokens, cost_nanos)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (minute_at, account, token_id, model) DO UPDATE SET
            num_requests = usage.num_requests + excluded.num_requests,
            prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens,
            cached_tokens = usage.cached_tokens + excluded.cached_tokens,
            completion_tokens = usage.completion_tokens + excluded.completion_tokens,
            cost_nanos = usage.cost_nanos + excluded.cost_nanos
        """,
        [(*key, *values) for key, values in sorted(sums.items())],
    )
