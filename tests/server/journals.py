"""Journals of a test's own, and what is written to them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import orjson

from octoai.server.journal import (
    Journal,
    Orphan,
    Position,
    Tail,
    orphans,
)

SMALL = 4096  # bytes in a segment, where rotation matters
Opened = Callable[..., Journal]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


class HeldSyncs:
    """In the kernel's place: a sync ends when the test says so, and how."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.running: list[Callable[[OSError | None], None]] = []
        HeldSyncs.newest = self

    newest: HeldSyncs

    def submit(self, _: int, done: Callable[[OSError | None], None]) -> None:
        self.running.append(done)

    def collect(self) -> None:
        """Nothing is done before the test says so."""


def record(n: int, padding: int = 0) -> dict[str, Any]:
    return {"n": n, "padding": "x" * padding}


def numbers(tail: Tail, limit: int = 7) -> list[int]:
    """All that is there, read a few at a time."""
    found: list[int] = []
    while batch := tail.records(limit):
        assert len(batch) <= limit
        assert batch[-1][1] == tail.position
        found += [orjson.loads(payload)["n"] for payload, _ in batch]
    return found


async def append_all(journal: Journal, wanted: range, padding: int = 0) -> list[Position]:
    return await asyncio.gather(*(journal.append(record(n, padding)) for n in wanted))


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.005)


def only_orphan(directory: Path) -> Orphan:
    (orphan,) = orphans(directory)
    return orphan


def file_of(journal: Journal, number: int) -> Path:
    return journal.directory / f"{journal.instance}-{number:06}.journal"


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def written(journal: Journal, num_records: int, padding: int = 0) -> list[Position]:
    """Records each in a batch of its own; the journal is closed."""

    async def main() -> list[Position]:
        return [await journal.append(record(n, padding)) for n in range(num_records)]

    positions = asyncio.run(main())
    journal.close()
    return positions
