"""What the ledger says, held against what clients were told and what the engine wrote."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from octoai.server.billing.money import nanos
from octoai.server.store import Place, connect
from octoai.server.store.audit import verify
from octoai.server.store.requests import COLUMNS, RequestRow
from tests.load.clients import Told
from tests.load.upstream import Written

GRACE_SECONDS = 1.0  # of tokens that may be missing of a request whose process was killed


@dataclass
class Books:
    """The ledger's requests, once `octoai ledger verify` would pass."""

    by_request_id: dict[str, list[RequestRow]]
    num_charges: Counter[str]

    @property
    def rows(self) -> list[RequestRow]:
        return [row for rows in self.by_request_id.values() for row in rows]

    @classmethod
    def read(cls, place: Place) -> Books:
        with closing(connect(place)) as db:
            verify(db)
            rows = [RequestRow(*row) for row in db.rows(f"SELECT {COLUMNS} FROM requests")]
            charged = db.rows("SELECT request, COUNT(*) FROM entries WHERE kind = 'charge' GROUP BY request")
        by_request_id: defaultdict[str, list[RequestRow]] = defaultdict(list)
        for row in rows:
            by_request_id[row.request_id].append(row)
        return cls(dict(by_request_id), Counter(dict(charged)))


@dataclass
class Findings:
    """`lost` and the like are sentences about single requests. Shortfalls are of requests that were interrupted:
    tokens that their clients had and the ledger has not, and the seconds over which those came."""

    num_requests: int = 0
    num_finished: int = 0
    num_left: int = 0
    num_interrupted: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    short_tokens: int = 0
    short_seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [*self.lost, *self.doubled, *self.wrong]


def hold(books: Books, told: Sequence[Told], written: Mapping[int, Written], num_others: int = 0) -> Findings:
    """All the ledger has, and all that clients were told. Each request has a number of its own, and was sent once.

    `num_others` requests were made beside these.
    """
    found = Findings()
    for each in told:
        if not each.has_begun or each.request_id is None:
            continue
        found.num_requests += 1
        rows = books.by_request_id.get(each.request_id, [])
        if not rows:
            found.lost.append(f"{each.request_id}: {each.how}, {each.num_seen} tokens seen, not in the ledger")
        elif len(rows) > 1 or books.num_charges[rows[0].id] != 1:
            found.doubled.append(f"{each.request_id}: {len(rows)} rows, {books.num_charges[rows[0].id]} charges")
        else:
            _hold_one(rows[0], each, written[each.number], found)
    _hold_unknown(books, told, num_others, found)
    return found


def _hold_one(row: RequestRow, told: Told, written: Written, found: Findings) -> None:
    if told.is_finished:
        found.num_finished += 1
        found.wrong += _not_as_told(row, told)
    elif row.status == "interrupted":
        found.num_interrupted += 1
        _hold_interrupted(row, told, written, found)
    else:
        found.num_left += 1
        found.wrong += _not_as_written(row, told, written, is_whole=told.killed_at is None)


def _not_as_told(row: RequestRow, told: Told) -> Iterable[str]:
    assert told.usage is not None
    details = told.usage.get("prompt_tokens_details") or {}
    cost = told.usage.get("cost")
    said = (
        told.usage["prompt_tokens"],
        details.get("cached_tokens", 0),
        told.usage["completion_tokens"],
        row.cost_nanos if cost is None else nanos(cost),
    )
    has = (row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.cost_nanos)
    if row.status != "settled" or has != said or row.cost_nanos != row.worth_nanos:
        yield f"{told.request_id}: {row.status} with {has}, told {said}"


def _not_as_written(row: RequestRow, told: Told, written: Written, *, is_whole: bool) -> Iterable[str]:
    """A request that its client left: the engine's own count, unless the kill was what made an end of it."""
    if row.status != "settled":
        yield f"{told.request_id}: {row.status}"
    if row.completion_tokens != written.completion_tokens and (
        is_whole or not told.num_seen <= row.completion_tokens <= written.completion_tokens
    ):
        yield (
            f"{told.request_id}: {told.how} after {told.num_seen}, billed {row.completion_tokens}, "
            f"written {written.completion_tokens}"
        )
    if row.completion_tokens and (row.prompt_tokens, row.cached_tokens) != (
        written.prompt_tokens,
        written.cached_tokens,
    ):
        yield f"{told.request_id}: prompt {row.prompt_tokens}, written {written.prompt_tokens}"


def _hold_interrupted(row: RequestRow, told: Told, written: Written, found: Findings) -> None:
    killed_at = told.killed_at
    if killed_at is None:
        found.wrong.append(f"{told.request_id}: interrupted, though nothing was killed")
        return
    known = told.seen_by(killed_at - GRACE_SECONDS)
    if not known <= row.completion_tokens <= written.completion_tokens:
        found.wrong.append(
            f"{told.request_id}: interrupted with {row.completion_tokens}; {known} were seen {GRACE_SECONDS} s before, "
            f"{written.completion_tokens} written"
        )
    missing = [at for at, count in told.seen if count > row.completion_tokens and at <= killed_at]
    found.short_tokens = max(found.short_tokens, told.num_seen - row.completion_tokens)
    found.short_seconds = max(found.short_seconds, killed_at - missing[0] if missing else 0.0)


def _hold_unknown(books: Books, told: Sequence[Told], num_others: int, found: Findings) -> None:
    """What no client has an answer of may be in the ledger, once for each request at most."""
    known = {each.request_id for each in told if each.has_begun}
    unknown = [rows for name, rows in books.by_request_id.items() if name not in known]
    num_without = num_others + sum(not each.has_begun for each in told)
    found.doubled += [f"{rows[0].request_id}: {len(rows)} rows" for rows in unknown if len(rows) > 1]
    if len(unknown) > num_without:
        found.doubled.append(f"{len(unknown)} requests that nobody made, but for {num_without} without an answer")
