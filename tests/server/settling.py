"""Settlements as a journal has them, and books that bring them into a database."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

from octoai.server import accounts
from octoai.server.journal import Journal
from octoai.server.ledger.books import Books, open_journal
from octoai.server.store import Connection, Place, connect
from octoai.server.store.audit import verify
from octoai.server.store.entries import balance_nanos
from octoai.server.times import now_us

COST = 30 * 150 + 16 * 600


def settlement(number: int) -> dict[str, Any]:
    at_us = now_us()
    return {
        "kind": "settlement",
        "id": f"{at_us:014x}{number:018x}",
        "request_id": f"req_{number}",
        **{"account": "default", "token_id": "tok_x", "model": "mock", "served_model": "mock"},
        **{"input_nanos": 150, "cached_input_nanos": 150, "output_nanos": 600},
        **{"opened_us": at_us, "journal": "j", "is_reserved": False, "lease_us": at_us + 60_000_000},
        **{"key": None, "key_body": None, "prompt_tokens": 30, "cached_tokens": 0, "completion_tokens": 16},
        **{"outcome": "finished", "settled_us": at_us, "answer": None},
    }


@asynccontextmanager
async def kept(place: Place, *, is_beside: bool = True) -> AsyncIterator[tuple[Books, Journal]]:
    """Books whose journal is brought in by a process beside this one, or by a thread."""
    with closing(connect(place)) as db, db.transaction():
        accounts.ensure_default(db)
    journal = open_journal(place)
    books = Books(place, journal, is_beside=is_beside)
    books.start()
    try:
        yield books, journal
    finally:
        await books.close()


def balance(place: Place) -> int:
    with closing(connect(place)) as db:
        verify(db)
        return balance_nanos(db, "default")


async def until(is_true: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not is_true():
            await asyncio.sleep(0.01)


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def process_of(books: Books) -> subprocess.Popen[bytes]:
    applier = books.writer._applier
    assert applier is not None
    assert applier._process is not None
    return applier._process


def num_steps(db: Connection, action: Any) -> int:
    """Of SQLite's own machine."""
    steps = [0]

    def count() -> int:
        steps[0] += 100
        return 0

    db._connection.set_progress_handler(count, 100)  # type: ignore[attr-defined]
    action()
    db._connection.set_progress_handler(None, 0)  # type: ignore[attr-defined]
    return steps[0]
