"""What was used, summed over time and over who used what: questions about the table `usage`, which has whole minutes.

It is filled where entries are posted, from charges, corrections and refunds. Nothing here knows of months or of dates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octoai.server.store.database import Connection

DIMENSIONS = ("account", "token_id", "model")
MAX_VALUES = 200  # of one filter: together they stay below SQLite's older limit of 999 parameters
_SUMS = ("num_requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")


@dataclass(frozen=True, slots=True)
class Filters:
    """None lets everything pass, an empty sequence nothing. At most MAX_VALUES of each."""

    accounts: Sequence[str] | None = None
    token_ids: Sequence[str] | None = None
    models: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class UsageSum:
    """`start_at` is the beginning of its time bucket in Unix seconds, 0 where time was not divided. A dimension that
    was not asked for is None. Cached tokens are among the prompt tokens; refunds and corrections are in the cost."""

    start_at: int
    account: str | None
    token_id: str | None
    model: str | None
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nanos: int


def sums(
    db: Connection,
    start_at: int,
    end_at: int,
    *,
    width: int | None = None,
    by: Sequence[str] = (),
    filters: Filters | None = None,
    limit: int | None = None,
) -> list[UsageSum]:
    """One row for each bucket of `width` seconds and each combination of the dimensions `by` that has usage.

    Minutes count that begin in [start_at, end_at), Unix seconds. Buckets begin at multiples of `width`: those of an
    hour or a day are of UTC. Rows come in the order of time, then of the dimensions in the order of DIMENSIONS, at most
    `limit` of them.
    """
    places = ("start_at", *(name for name in DIMENSIONS if name in by))
    query, values = _query(start_at, end_at, width, places, filters)
    if limit is not None:
        query, values = f"{query} LIMIT ?", [*values, limit]
    return [UsageSum(*row) for row in db.rows(query, values)]


def stream(
    db: Connection,
    start_at: int,
    end_at: int,
    *,
    width: int | None = None,
    by: Sequence[str] = (),
    filters: Filters | None = None,
) -> Iterator[UsageSum]:
    """The same as they are read, in bounded memory and in the order of `by`, where `start_at` is the time; inside a
    transaction."""
    query, values = _query(start_at, end_at, width, by or ("start_at",), filters)
    return (UsageSum(*row) for row in db.stream(query, values))


def _query(
    start_at: int, end_at: int, width: int | None, by: Sequence[str], filters: Filters | None
) -> tuple[str, list[object]]:
    """For the rows of `UsageSum` in the order of `by`, and its parameters."""
    condition, values = _condition(start_at, end_at, filters or Filters())
    # Numbers of our own making are in the text, not among the parameters: PostgreSQL has to see what it groups by.
    bucket = "0" if width is None else f"minute_at / {width:d} * {width:d}"
    columns = [bucket, *(name if name in by else "NULL" for name in DIMENSIONS)]
    order = ", ".join(str(("start_at", *DIMENSIONS).index(name) + 1) for name in by)
    query = (
        f"SELECT {', '.join(columns)}, {', '.join(f'SUM({name})' for name in _SUMS)} "  # noqa: S608  # constants only
        f"FROM usage WHERE {condition} GROUP BY {order} ORDER BY {order}"
    )
    return query, values


def _condition(start_at: int, end_at: int, filters: Filters) -> tuple[str, list[object]]:
    """What rows must be like, and its parameters."""
    condition, values = "minute_at >= ? AND minute_at < ?", list[object]([start_at, end_at])
    for name, allowed in zip(DIMENSIONS, (filters.accounts, filters.token_ids, filters.models), strict=True):
        if allowed is None:
            continue
        if not allowed:
            return "1 = 0", []
        condition += f" AND {name} IN ({', '.join('?' * len(allowed))})"
        values += allowed
    return condition, values
