"""Whether the books are whole: everything that follows from the entries is computed again and compared.

`verify` reads one snapshot, so the service goes on writing beside it, and streams it, so its memory does not grow with
the books. Sums are the database's; here is only what they are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from octoai.server.store import entries, requests
from octoai.server.store.database import Connection
from octoai.server.store.entries import OF_REQUESTS, Entry, month_of
from octoai.server.store.requests import RequestRow
from octoai.server.times import MINUTE_US

_KINDS = OF_REQUESTS | {"grant", "adjustment"}
_ENDED = ("settled", "interrupted", "refunded")
_OF_REQUESTS = ", ".join(f"'{kind}'" for kind in sorted(OF_REQUESTS))


class BrokenBooks(Exception):
    """The first row that is not as it must be, and what is wrong with it, on one line for the operator."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found whole."""

    num_entries: int
    num_requests: int
    num_open: int
    num_accounts: int


@dataclass(slots=True)
class _Month:
    """Consecutive entries of one calendar month: times never go back."""

    name: str
    first_seq: int
    last_seq: int


def verify(db: Connection) -> Verified:
    """Raises BrokenBooks."""
    with db.snapshot():
        num_entries, months = _chain(db)
        num_accounts = _balances(db)
        _spending(db, months)
        _usage(db)
        _entries_without_request(db)
        num_requests, num_open = _requests(db)
    return Verified(num_entries, num_requests, num_open, num_accounts)


def _chain(db: Connection) -> tuple[int, list[_Month]]:
    """How many entries there are, and in which months."""
    before, months = Entry(0, "", "", 0), list[_Month]()
    for row in db.stream(f"SELECT {entries.COLUMNS} FROM entries ORDER BY seq"):  # noqa: S608  # constants only
        entry = entries.row_of(row)
        _check_link(before, entry)
        month = month_of(entry.at_us)
        if not months or months[-1].name != month:
            months.append(_Month(month, entry.seq, entry.seq))
        months[-1].last_seq = entry.seq
        before = entry
    heads = db.rows("SELECT id, seq, at_us, hash FROM head ORDER BY id")
    if heads != [(1, before.seq, before.at_us, before.hash)]:
        of = f"is at entry {heads[0][1]}" if heads else "is missing"
        raise BrokenBooks(f"head {of}, but the last entry is {before.seq}: entries were cut off or changed")
    return before.seq, months


def _check_link(before: Entry, entry: Entry) -> None:
    name = f"entry {entry.seq} of account {entry.account}"
    if entry.seq != before.seq + 1:
        raise BrokenBooks(f"{name}: it follows entry {before.seq}; what was between is gone")
    if entry.hash != entry.chained(before.hash):
        raise BrokenBooks(f"{name}: its hash does not fit; it was changed, or the one before it")
    if entry.at_us < before.at_us:
        raise BrokenBooks(f"{name}: it is from {_time(entry.at_us)}, before entry {before.seq}")
    if entry.kind not in _KINDS:
        raise BrokenBooks(f"{name}: there is no kind {entry.kind!r}")
    if (entry.request is None) == (entry.kind in OF_REQUESTS):
        raise BrokenBooks(f"{name}: a {entry.kind} {'without' if entry.request is None else 'with'} a request")


def _balances(db: Connection) -> int:
    """How many accounts have one."""
    bad = db.row(
        """
        SELECT account, SUM(said), SUM(found), MAX(is_said), MAX(is_found)
        FROM (
            SELECT account, nanos AS said, 0 AS found, 1 AS is_said, 0 AS is_found FROM balances
            UNION ALL SELECT account, 0, amount_nanos, 0, 1 FROM entries
        ) AS both_sides
        GROUP BY account HAVING SUM(said) <> SUM(found) OR MAX(is_said) <> MAX(is_found) ORDER BY account LIMIT 1
        """
    )
    if bad is not None:
        account, said, found, is_said, is_found = bad
        raise BrokenBooks(f"balance of account {account}: {_sides(said, found, is_said, is_found)} nano-dollars")
    counted = db.row("SELECT COUNT(*) FROM balances")
    return int(counted[0]) if counted else 0


def _spending(db: Connection, months: list[_Month]) -> None:
    for month in months:
        between = (month.first_seq, month.last_seq)
        bad = db.row(
            f"""
            SELECT payer, SUM(said), SUM(found), MAX(is_said), MAX(is_found)
            FROM (
                SELECT payer, nanos AS said, 0 AS found, 1 AS is_said, 0 AS is_found FROM spending WHERE month = ?
                UNION ALL SELECT account, 0, -amount_nanos, 0, 1 FROM entries
                    WHERE seq BETWEEN ? AND ? AND kind IN ({_OF_REQUESTS})
                UNION ALL SELECT token_id, 0, -amount_nanos, 0, 1 FROM entries
                    WHERE seq BETWEEN ? AND ? AND kind IN ({_OF_REQUESTS}) AND token_id IS NOT NULL
            ) AS both_sides
            GROUP BY payer HAVING SUM(said) <> SUM(found) OR MAX(is_said) <> MAX(is_found) ORDER BY payer LIMIT 1
            """,  # noqa: S608  # constants only
            (month.name, *between, *between),
        )
        if bad is not None:
            payer, said, found, is_said, is_found = bad
            sides = _sides(said, found, is_said, is_found)
            raise BrokenBooks(f"spending of {payer} in {month.name}: {sides} nano-dollars")
    known = {month.name for month in months}
    for payer, name in db.stream("SELECT MIN(payer), month FROM spending GROUP BY month ORDER BY month"):
        if name not in known:
            raise BrokenBooks(f"spending of {payer} in {name}: there are no entries of that month")


_USAGE = ("num_requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")


def _usage(db: Connection) -> None:
    said = ", ".join(f"SUM({name}) AS said_{name}" for name in _USAGE)
    found = ", ".join(f"SUM(found_{name}) AS sum_{name}" for name in _USAGE)
    differs = " OR ".join(f"SUM({name}) <> SUM(found_{name})" for name in _USAGE)
    bad = db.row(
        f"""
        SELECT minute_at, account, token_id, model, {said}, {found}, MAX(is_said), MAX(is_found)
        FROM (
            SELECT minute_at, account, token_id, model, {", ".join(_USAGE)},
                {", ".join(f"0 AS found_{name}" for name in _USAGE)}, 1 AS is_said, 0 AS is_found
            FROM usage
            UNION ALL
            SELECT at_us / {MINUTE_US} * 60, account, COALESCE(token_id, ''), COALESCE(model, ''), 0, 0, 0, 0, 0,
                CASE kind WHEN 'charge' THEN 1 ELSE 0 END, prompt_tokens, cached_tokens, completion_tokens,
                -amount_nanos, 0, 1
            FROM entries WHERE kind IN ({_OF_REQUESTS})
        ) AS both_sides
        GROUP BY minute_at, account, token_id, model
        HAVING {differs} OR MAX(is_said) <> MAX(is_found)
        ORDER BY minute_at, account, token_id, model LIMIT 1
        """  # noqa: S608  # constants only
    )
    if bad is None:
        return
    name = f"usage of account {bad[1]}, token {bad[2]}, model {bad[3]} in the minute {_time(bad[0] * 1_000_000)}"
    for column, row_says, entries_say in zip(_USAGE, bad[4:9], bad[9:14], strict=True):
        if row_says != entries_say:
            raise BrokenBooks(f"{name}: {_sides(row_says, entries_say, bad[14], bad[15])} {column}")
    raise BrokenBooks(f"{name}: {'there is no row' if bad[15] else 'there are no entries'}")


def _entries_without_request(db: Connection) -> None:
    bad = db.row(
        "SELECT e.seq, e.account, e.request FROM entries e LEFT JOIN requests r ON r.id = e.request "
        "WHERE e.request IS NOT NULL AND r.id IS NULL ORDER BY e.seq LIMIT 1"
    )
    if bad is not None:
        raise BrokenBooks(f"entry {bad[0]} of account {bad[1]}: its request {bad[2]} is missing")


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of a request's entries. `num_foreign` are those of another account, token or model than its row has."""

    num_charges: int
    num_corrections: int
    num_refunds: int
    amount_nanos: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    num_foreign: int


def _requests(db: Connection) -> tuple[int, int]:
    """How many requests there are, and how many of them are open."""
    num_requests = num_open = 0
    for row, sums in _requests_with_sums(db):
        wrong = next(_faults(row, sums), None)
        if wrong is not None:
            raise BrokenBooks(f"request {row.request_id} (id {row.id}) of account {row.account}: {wrong}")
        num_requests += 1
        num_open += row.status == "open"
    return num_requests, num_open


def _requests_with_sums(db: Connection) -> Iterator[tuple[RequestRow, _Sums]]:
    columns = ", ".join(f"r.{name}" for name in requests.COLUMNS.split(", "))
    kinds = ", ".join(f"COUNT(CASE e.kind WHEN '{kind}' THEN 1 END)" for kind in ("charge", "correction", "refund"))
    summed = ("amount_nanos", "prompt_tokens", "cached_tokens", "completion_tokens")
    sums = ", ".join(f"COALESCE(SUM(e.{name}), 0)" for name in summed)
    foreign = " OR ".join(f"COALESCE(e.{name}, '') <> r.{name}" for name in ("account", "token_id", "model"))
    query = (
        f"SELECT {columns}, {kinds}, {sums}, COUNT(CASE WHEN e.seq IS NOT NULL AND ({foreign}) THEN 1 END) "  # noqa: S608  # constants only
        "FROM requests r LEFT JOIN entries e ON e.request = r.id GROUP BY r.id ORDER BY r.id"
    )
    width = len(requests.COLUMNS.split(", "))
    for row in db.stream(query):
        yield RequestRow(*row[:width]), _Sums(*row[width:])


def _faults(row: RequestRow, sums: _Sums) -> Iterator[str]:
    """What is wrong between a request and its entries, each fault in words."""
    if row.status not in ("open", *_ENDED):
        yield f"there is no status {row.status!r}"
    if sums.num_foreign:
        yield "its entries are of another account, token or model than its row"
    is_ended, is_refunded = row.status in _ENDED, row.status == "refunded"
    if sums.num_charges != int(is_ended):
        yield f"it is {row.status} and was charged {_times(sums.num_charges)}"
    if sums.num_refunds != int(is_refunded):
        yield f"it is {row.status} and was refunded {_times(sums.num_refunds)}"
    if not is_ended and sums.num_corrections:
        yield f"it is {row.status} and was corrected {_times(sums.num_corrections)}"
    if sums.amount_nanos != -row.cost_nanos:
        yield f"entries say {-sums.amount_nanos} nano-dollars, the row {row.cost_nanos}"
    if is_ended:
        for label in ("prompt", "cached", "completion"):
            said, found = getattr(row, f"{label}_tokens"), getattr(sums, f"{label}_tokens")
            if said != found:
                yield f"entries say {found} {label} tokens, the row {said}"
    yield from _faults_alone(row, is_ended)


def _faults_alone(row: RequestRow, is_ended: bool) -> Iterator[str]:
    """What is wrong in a request's row itself."""
    worth = row.worth_nanos if is_ended else 0  # until it ends it has cost nothing
    if row.cost_nanos + row.waived_nanos != worth:
        yield f"it cost {row.cost_nanos} and waived {row.waived_nanos}, but its tokens are worth {worth} nano-dollars"
    if not 0 <= row.cached_tokens <= row.prompt_tokens:
        yield f"{row.cached_tokens} of its {row.prompt_tokens} prompt tokens were cached"
    if min(row.cost_nanos, row.waived_nanos, row.completion_tokens) < 0:
        yield "it has a cost or tokens below zero"
    if (row.settled_us is not None) != is_ended:
        yield f"it is {row.status} and was {'never settled' if row.settled_us is None else 'settled'}"


def _sides(said: int, found: int, is_said: Any, is_found: Any) -> str:
    if not is_said:
        return f"there is no row, entries say {found}"
    return f"the row says {said}, entries {found if is_found else 'nothing, there are none:'}"


def _times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number} times")


def _time(at_us: int) -> str:
    try:
        return datetime.fromtimestamp(at_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):  # a number that is no time at all
        return f"{at_us} µs"
