"""What limited requests come to in each second, by account and by token: rate limits count the last minute from these
sums, and single requests only of the seconds at its two ends. To count them all took a millisecond for each thousand.

What is in `reservations` changes only together with its second here; what is too old to count goes before that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from octoai.server.store.database import Connection
from octoai.server.times import MINUTE_US, SECOND_US

PRUNED_AT_ONCE = 500
Payer = Literal["account", "token_id"]

# Rows a little ahead are another machine's, or from before a clock was put back; those further ahead are a clock's
# that was wrong, which must not lock anyone out until their time comes.
AHEAD_US = MINUTE_US

_ADD = """
    INSERT INTO rates (payer, second, num_requests, prompt_tokens, completion_tokens, newest_us)
    VALUES (?, ?, 1, ?, ?, ?), (?, ?, 1, ?, ?, ?)
    ON CONFLICT (payer, second) DO UPDATE SET
        num_requests = rates.num_requests + 1,
        prompt_tokens = rates.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = rates.completion_tokens + excluded.completion_tokens,
        newest_us = CASE WHEN excluded.newest_us > rates.newest_us THEN excluded.newest_us ELSE rates.newest_us END
"""


@dataclass(frozen=True, slots=True)
class Past:
    """Requests that came at `at_us`, or one, and the tokens they count for."""

    at_us: int
    num_requests: int
    prompt_tokens: int
    completion_tokens: int


def add(db: Connection, payers: tuple[str, str], at_us: int, prompt_tokens: int, completion_tokens: int) -> None:
    """One request more, of an account and a token."""
    sums = (at_us // SECOND_US, prompt_tokens, completion_tokens, at_us)
    db.execute(_ADD, (payers[0], *sums, payers[1], *sums))


def change(db: Connection, payers: tuple[str, str], at_us: int, prompt_tokens: int, completion_tokens: int) -> None:
    """A request counts for so many tokens more."""
    db.execute(
        "UPDATE rates SET prompt_tokens = prompt_tokens + ?, completion_tokens = completion_tokens + ? "
        "WHERE payer IN (?, ?) AND second = ?",
        (prompt_tokens, completion_tokens, *payers, at_us // SECOND_US),
    )


def remove(db: Connection, payers: tuple[str, str], at_us: int, prompt_tokens: int, completion_tokens: int) -> None:
    """One request, which is not among the reservations any more."""
    second = at_us // SECOND_US
    columns: tuple[Payer, Payer] = ("account", "token_id")
    for column, payer in zip(columns, payers, strict=True):
        db.execute(
            "UPDATE rates SET num_requests = num_requests - 1, prompt_tokens = prompt_tokens - ?, "  # noqa: S608
            "completion_tokens = completion_tokens - ?, newest_us = COALESCE((SELECT MAX(at_us) FROM reservations "
            f"WHERE {column} = ? AND at_us >= ? AND at_us < ?), 0) WHERE payer = ? AND second = ?",
            (
                *(prompt_tokens, completion_tokens),
                *(payer, second * SECOND_US, (second + 1) * SECOND_US),
                *(payer, second),
            ),
        )


def prune(db: Connection, before_us: int) -> bool:
    """Some of the seconds before that one, oldest first, once their requests are gone; whether there may be more."""
    oldest = "SELECT payer, second FROM rates WHERE second < ? ORDER BY second LIMIT ?"
    sql = f"DELETE FROM rates WHERE (payer, second) IN ({oldest})"  # noqa: S608  # constants only
    return db.execute(sql, (before_us // SECOND_US, PRUNED_AT_ONCE)) == PRUNED_AT_ONCE


def recent(column: Payer, payer: str, now_us: int) -> tuple[str, tuple[str | int, ...]]:
    """A query, and its parameters: how many requests the last minute had, their tokens, and when the newest came."""
    after_us, before_us = now_us - MINUTE_US, now_us + AHEAD_US
    first, end = after_us // SECOND_US + 1, before_us // SECOND_US
    query = f"""
        SELECT COALESCE(SUM(num), 0), COALESCE(SUM(prompts), 0), COALESCE(SUM(completions), 0), COALESCE(MAX(newest), 0)
        FROM (
            SELECT num_requests AS num, prompt_tokens AS prompts, completion_tokens AS completions, newest_us AS newest
            FROM rates WHERE payer = ? AND second >= ? AND second < ?
            UNION ALL
            SELECT 1, prompt_tokens, completion_tokens, at_us
            FROM reservations WHERE {column} = ? AND at_us > ? AND at_us < ?
            UNION ALL
            SELECT 1, prompt_tokens, completion_tokens, at_us
            FROM reservations WHERE {column} = ? AND at_us >= ? AND at_us < ?
        ) AS counted
    """  # noqa: S608  # a column of ours
    begins = (payer, after_us, first * SECOND_US)
    return query, (payer, first, end, *begins, payer, end * SECOND_US, before_us)


def past(db: Connection, column: Payer, payer: str, now_us: int) -> Iterator[tuple[Past, Iterator[Past]]]:
    """The last minute's requests, oldest first: those of each second together, and one by one."""
    after_us, before_us = now_us - MINUTE_US, now_us + AHEAD_US
    first, last = after_us // SECOND_US, before_us // SECOND_US
    seconds = db.rows(
        "SELECT second, num_requests, prompt_tokens, completion_tokens FROM rates "
        "WHERE payer = ? AND second >= ? AND second <= ? ORDER BY second",
        (payer, first, last),
    )
    for second, *sums in seconds:
        begin_us, end_us = max(second * SECOND_US, after_us + 1), min((second + 1) * SECOND_US, before_us)
        singly = _singly(db, column, payer, begin_us, end_us)
        if second in (first, last):  # a part of it: one by one
            for each in singly:
                yield each, iter((each,))
        else:
            yield Past(second * SECOND_US, *sums), singly


def _singly(db: Connection, column: Payer, payer: str, begin_us: int, end_us: int) -> Iterator[Past]:
    query = (
        f"SELECT at_us, 1, prompt_tokens, completion_tokens FROM reservations "  # noqa: S608  # a column of ours
        f"WHERE {column} = ? AND at_us >= ? AND at_us < ? ORDER BY at_us"
    )
    for row in db.rows(query, (payer, begin_us, end_us)):
        yield Past(*row)
