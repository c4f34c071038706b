"""Requests as rows, and the one place where what the journal says becomes rows and entries.

A request is `open` from its intent on, `settled` once it has ended, `interrupted` when its process died (or was not
heard of for the length of its lease) and it was billed by its last checkpoint, `refunded` when it was given back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from octoai.server.store import keys, reservations, tokens
from octoai.server.store.database import Connection, chunks
from octoai.server.store.entries import Entry, post

REST_SECONDS = 0.00002
PAGE = 1000


class RequestRow(NamedTuple):
    """One request. Prices are nano-dollars per token, fixed when it was opened; `cost_nanos` is what it was charged,
    `waived_nanos` what its tokens would have cost beyond that. `request_id` is the answer's `x-request-id`."""

    id: str
    request_id: str
    account: str
    token_id: str
    model: str
    served_model: str
    input_nanos: int
    cached_input_nanos: int
    output_nanos: int
    opened_us: int
    journal: str
    is_reserved: bool
    lease_us: int
    status: str = "open"
    outcome: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_nanos: int = 0
    waived_nanos: int = 0
    settled_us: int | None = None

    @property
    def worth_nanos(self) -> int:
        """What its tokens cost at its price."""
        return (
            (self.prompt_tokens - self.cached_tokens) * self.input_nanos
            + self.cached_tokens * self.cached_input_nanos
            + self.completion_tokens * self.output_nanos
        )


_NAMES = RequestRow._fields
COLUMNS = ", ".join(_NAMES)
_OPENED = attrgetter("opened_us")
_INTENT = _NAMES[: _NAMES.index("status")]
_opening = itemgetter(*_INTENT)
_CHANGING = ("lease_us", *_NAMES[_NAMES.index("status") :])
_UPSERT = (
    f"INSERT INTO requests ({COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))}) ON CONFLICT (id) DO UPDATE SET "  # noqa: S608
    + ", ".join(f"{name} = excluded.{name}" for name in _CHANGING)
)

Record = dict[str, Any]
WAIVED = "%d nano-dollars of usage are waived: beyond what the requests held, no more was left under hard limits"


def apply_in_portions(db: Connection, records: Sequence[Record], now_us: int) -> int:
    """As `apply`, with a rest after each portion. A process that computes for milliseconds keeps its core that long
    from threads that wait for it, one that syncs the journal among them, even while another core is idle: one client's
    99th percentile was 3.5 ms without, and is 2.6 to 3.1 (two cores, an engine that answers at once)."""
    waived_nanos = 0
    for start in range(0, len(records), db.portion):
        if start:
            time.sleep(REST_SECONDS)
        waived_nanos += apply(db, records[start : start + db.portion], now_us)
    return waived_nanos


def apply(db: Connection, records: Iterable[Record], now_us: int) -> int:
    """Bring intents, checkpoints and settlements into the books, inside the caller's transaction. Returns how many
    nano-dollars were waived.

    Records that were applied before change nothing, so a journal may be replayed from anywhere.
    """
    records = list(records)
    ended = {record["id"] for record in records if record["kind"] == "settlement"}
    records = [each for each in records if each["kind"] == "settlement" or each["id"] not in ended]  # it says it all
    rows = _found(db, {record["id"] for record in records})
    reservations.hold_again(db, [record for record in records if record["id"] not in rows], now_us)
    changed: dict[str, RequestRow] = {}
    due: list[Entry] = []
    waived_nanos = 0
    for record in records:
        before = rows.get(record["id"])
        after = _after(db, before, record, due, now_us)
        if after is not None and after != before:
            rows[after.id] = changed[after.id] = after
            waived_nanos += after.waived_nanos - (before.waived_nanos if before else 0)
    _write(db, changed.values())
    post(db, due)
    _note_keys(db, records, now_us)
    leases = [(row.lease_us, row.id) for row in changed.values() if row.is_reserved and row.status == "open"]
    reservations.renew(db, leases)
    tokens.used(db, {row.token_id: row.opened_us // 1_000_000 for row in changed.values()})
    return waived_nanos


def _note_keys(db: Connection, records: Sequence[Record], now_us: int) -> None:
    """A request that is made again under its Idempotency-Key is not billed twice: what it was charged when it ended
    without an answer is given back. Only now that the new one runs: until then it might not."""
    for record in records:
        row = None if record.get("key") is None else charged(db, keys.note(db, record))
        if row is not None:
            asked = f"asked again under its Idempotency-Key, as {record['request_id']}"
            refund(db, row, "answered before under its Idempotency-Key" if row.id == record["id"] else asked, now_us)


def interrupt(db: Connection, rows: Sequence[RequestRow], now_us: int) -> int:
    """Settle requests that nobody will settle any more, by their last checkpoints. Returns as `apply`."""
    return _bill(db, [(row, row._replace(status="interrupted", settled_us=now_us)) for row in rows], now_us)


def correct(db: Connection, records: Iterable[Record], now_us: int) -> int:
    """Bill what a dead process's checkpoints say beyond what its requests were interrupted by: their leases had run out
    before it came in, and no settlement will come. Returns as `apply`."""
    last = {record["id"]: record for record in records if record["kind"] == "checkpoint"}
    found = _found(db, set(last)).values()
    after = [(row, row._replace(**_counts(last[row.id]), settled_us=now_us)) for row in found]
    more = [(row, late) for row, late in after if late.completion_tokens > row.completion_tokens]
    return _bill(db, [(row, late) for row, late in more if row.status == "interrupted"], now_us)


def _bill(db: Connection, interrupted: Sequence[tuple[RequestRow, RequestRow]], now_us: int) -> int:
    """Rows as they were and as they are to be, but for what they are charged."""
    due: list[Entry] = []
    ended = [_settled(db, before, after, due, now_us) for before, after in interrupted]
    _write(db, ended)
    post(db, due)
    return sum(row.waived_nanos for row in ended) - sum(before.waived_nanos for before, _ in interrupted)


def open_of_journal(db: Connection, journal: str) -> list[RequestRow]:
    """What a process that is no more had not settled."""
    return _selected(db, "journal = ? AND status = 'open'", (journal,))


def expired(db: Connection, now_us: int) -> list[RequestRow]:
    """Open requests whose process was not heard of for a whole lease."""
    return _selected(db, "status = 'open' AND lease_us < ?", (now_us,))


def named(db: Connection, name: str) -> list[RequestRow]:
    """By the `x-request-id` of its answer, which clients may choose and use again, or by our own id."""
    return _selected(db, "id = ? OR request_id = ?", (name, name))


def of_id(db: Connection, id_: str) -> RequestRow | None:
    """By our own id."""
    rows = _selected(db, "id = ?", (id_,))
    return rows[0] if rows else None


def between(
    db: Connection,
    since_us: int | None,
    until_us: int | None,
    *,
    statuses: Sequence[str],
    account: str | None = None,
) -> Iterator[RequestRow]:
    """Those that were opened in [since, until), oldest first, in bounded memory. Each page is read by itself: while a
    reader takes its time, as a pager does, the log of what is written meanwhile must not grow."""
    conditions = {"opened_us < ?": until_us, "account = ?": account}
    given = {condition: value for condition, value in conditions.items() if value is not None}
    where = " AND ".join([f"status IN ({', '.join('?' * len(statuses))})", *given, "(opened_us, id) > (?, ?)"])
    query = f"SELECT {COLUMNS} FROM requests WHERE {where} ORDER BY opened_us, id LIMIT {PAGE}"  # noqa: S608
    last: tuple[int, str] = (since_us or 0, "")
    while rows := [RequestRow(*row) for row in db.rows(query, [*statuses, *given.values(), *last])]:
        yield from rows
        last = (rows[-1].opened_us, rows[-1].id)


def charged(db: Connection, id_: str | None) -> RequestRow | None:
    """By our own id, where it has been charged something."""
    row = None if id_ is None else of_id(db, id_)
    return row if row is not None and row.status in ("settled", "interrupted") and row.cost_nanos > 0 else None


def is_known(db: Connection, request_id: str) -> bool:
    return db.row("SELECT 1 FROM requests WHERE request_id = ? LIMIT 1", (request_id,)) is not None


class NotRefundable(ValueError):
    """The text is one line that says why not."""


def refund(db: Connection, row: RequestRow, note: str, at_us: int) -> RequestRow:
    """Give back what an ended request was charged. Its tokens stay on record. Raises NotRefundable."""
    if row.status == "open":
        raise NotRefundable(f"request {row.request_id} has not ended yet: it was not charged")
    if row.status == "refunded":
        raise NotRefundable(f"request {row.request_id} was refunded before")
    refunded = row._replace(status="refunded", cost_nanos=0, waived_nanos=row.worth_nanos)
    _write(db, [refunded])
    given_back = Entry(at_us, row.account, "refund", row.cost_nanos, row.token_id, row.id, row.model, note=note)
    post(db, [given_back])
    return refunded


def _after(
    db: Connection, before: RequestRow | None, record: Record, due: list[Entry], now_us: int
) -> RequestRow | None:
    """The row after one record; entries that it makes due are added to `due`."""
    if record["kind"] == "intent":
        return before or _opened(record)
    if record["kind"] == "checkpoint":
        if before is None or before.status != "open":
            return before
        if record["completion_tokens"] < before.completion_tokens:
            return before  # read again, from before others that count
        return before._replace(**_counts(record), lease_us=max(before.lease_us, record["lease_us"]))
    if before is None:
        before = _opened(record)
    if before.status not in ("open", "interrupted"):
        return before
    facts = {"status": "settled", "outcome": record["outcome"], "settled_us": record["settled_us"]}
    return _settled(db, before, before._replace(**facts, **_counts(record)), due, now_us)


def _settled(db: Connection, before: RequestRow, ended: RequestRow, due: list[Entry], now_us: int) -> RequestRow:
    """`ended` with what it is charged; the entry for what is new since `before`.

    What would go over a hard limit is waived. Where it came to less than it was billed for before, what was waived
    goes first, and only then is something given back.
    """
    owed = ended.worth_nanos - before.cost_nanos - before.waived_nanos
    at_us, most = ended.settled_us or 0, owed
    if before.is_reserved:
        at_us, most = _room(db, ended, owed, due, now_us)
    charged = min(owed, most) if owed > 0 else min(0, ended.worth_nanos - before.cost_nanos)
    is_first = before.status == "open"
    due.append(
        Entry(
            *(at_us, ended.account, "charge" if is_first else "correction", -charged),
            *(ended.token_id, ended.id, ended.model),
            prompt_tokens=ended.prompt_tokens - (0 if is_first else before.prompt_tokens),
            cached_tokens=ended.cached_tokens - (0 if is_first else before.cached_tokens),
            completion_tokens=ended.completion_tokens - (0 if is_first else before.completion_tokens),
        )
    )
    cost_nanos = before.cost_nanos + charged
    return ended._replace(cost_nanos=cost_nanos, waived_nanos=ended.worth_nanos - cost_nanos)


def _room(db: Connection, ended: RequestRow, owed: int, due: list[Entry], now_us: int) -> tuple[int, int]:
    """When a limited request is charged, and the most that it can be. It holds nothing from now on.

    What it held is its own. Beyond that, and where that has lapsed and may be promised to others, it is what is left:
    no account goes over a hard limit for our own being late or wrong.
    """
    at_us, most = ended.settled_us or 0, 0
    held = reservations.close(db, ended.id, ended.prompt_tokens, ended.completion_tokens)
    if held is not None:
        at_us = max(at_us, held.at_us)  # never in a month before the one whose budget it was held from
        most = held.nanos
    if owed > most:
        post(db, due)  # what is left depends on them
        due.clear()
        reservations.lapse(db, ended.account, now_us)
        most = max(most, reservations.left_nanos(db, ended.account, ended.token_id, now_us, at_us))
    return at_us, most


def _opened(record: Record) -> RequestRow:
    return RequestRow(*_opening(record))


def _counts(record: Record) -> dict[str, Any]:
    return {name: record[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens")}


def _found(db: Connection, ids: set[str]) -> dict[str, RequestRow]:
    return {row.id: row for marks, chunk in chunks(ids) for row in _selected(db, f"id IN ({marks})", chunk)}


def _selected(db: Connection, condition: str, values: Sequence[Any]) -> list[RequestRow]:
    # Sorted here: where it is asked to, SQLite goes through all requests there ever were to have a few in their order.
    query = f"SELECT {COLUMNS} FROM requests WHERE {condition}"  # noqa: S608
    return sorted([RequestRow(*row) for row in db.rows(query, values)], key=_OPENED)


def _write(db: Connection, rows: Iterable[RequestRow]) -> None:
    db.execute_many(_UPSERT, sorted(rows))  # by their ids
