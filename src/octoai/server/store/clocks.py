"""Clocks that do not agree with this machine's: the database's own, and the one of the newest entry."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta

from octoai.server.store.database import Connection
from octoai.server.store.entries import ledger_us

log = logging.getLogger("octoai.store")

MAX_AHEAD_SECONDS = 300.0
MAX_OFFSET_SECONDS = 5.0


def compare(db: Connection) -> None:
    """PostgreSQL's clock with ours: leases that one machine writes are judged by the clocks of others."""
    before = time.time()
    (theirs,) = db.row("SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)") or (0,)
    offset = (before + time.time()) / 2 - theirs / 1_000_000
    if abs(offset) > MAX_OFFSET_SECONDS:
        log.warning(
            "this machine's clock is %.0f s %s the database's: machines that share a database must agree within "
            "seconds, or hard limits do not hold; see to it that each is set by NTP",
            *(abs(offset), "ahead of" if offset > 0 else "behind"),
        )


def ahead(db: Connection, now_us: int) -> str | None:
    """In one line, that the ledger's newest entry is of a moment to come; None where it is not, by minutes."""
    newest_us = ledger_us(db, now_us)
    by = timedelta(seconds=round((newest_us - now_us) / 1_000_000))
    if by.total_seconds() <= MAX_AHEAD_SECONDS:
        return None
    moment = datetime.fromtimestamp(newest_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return (
        f"the ledger's newest entry is of {moment}, {by} ahead of this machine's clock: entries never go back in time, "
        "so all that is charged until then is of that moment, in usage, budgets and statements; either this clock is "
        "behind, or one was ahead"
    )
