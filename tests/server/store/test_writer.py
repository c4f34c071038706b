"""The thread that writes: what it does of what it is asked, and when the database counts as away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from octoai.server.store import Connection, Place
from octoai.server.store import writer as writer_module
from octoai.server.store.database import StoreAway
from octoai.server.store.writer import Writer
from tests.server.settling import run, until


@asynccontextmanager
async def begun(place: Place) -> AsyncIterator[tuple[Writer, asyncio.Task[None], threading.Event]]:
    """A writer in the middle of a transaction, what waits for that, and what ends it."""
    writer, has_begun, ends = Writer(place), threading.Event(), threading.Event()

    def wait(_: Connection) -> None:
        has_begun.set()
        ends.wait(20)

    writer.start()
    first = asyncio.create_task(writer.run(wait))
    await until(has_begun.is_set)
    try:
        yield writer, first, ends
    finally:
        ends.set()
        await asyncio.to_thread(writer.close)


def test_a_transaction_that_takes_too_long_is_a_database_that_is_away_until_it_has_ended(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "HANG_SECONDS", 0.4)

    async def main() -> None:
        async with begun(place) as (writer, first, ends):
            assert writer.away_seconds is None
            waiting = asyncio.create_task(writer.run(lambda _: "it came before that"))
            await until(lambda: writer.away_seconds is not None, 2)
            assert 0.4 < (writer.away_seconds or 0) < 2
            asked = time.monotonic()
            with pytest.raises(StoreAway):
                await writer.run(lambda _: None)
            assert time.monotonic() - asked < 1, "who asks now does not wait for it again"
            ends.set()
            await first
            assert await waiting == "it came before that"
            assert writer.away_seconds is None
            assert await writer.run(lambda _: 1) == 1

    run(main())


def test_a_transaction_that_takes_its_time_is_no_database_that_is_away(place: Place) -> None:
    async def main() -> None:
        async with begun(place) as (writer, first, ends):
            waiting = asyncio.create_task(writer.run(lambda _: 1))
            await asyncio.sleep(1.0)
            assert writer.away_seconds is None
            ends.set()
            await first
            assert await waiting == 1

    run(main())


def test_a_database_that_is_back_is_noticed_though_nobody_asks(place: Place) -> None:
    async def main() -> None:
        def fail(_: Connection) -> None:
            raise StoreAway("restarted")

        writer = Writer(place)
        writer.start()
        with pytest.raises(StoreAway):
            await writer.run(fail)
        assert writer.away_seconds is not None
        await until(lambda: writer.away_seconds is None, 3)
        await asyncio.to_thread(writer.close)

    run(main())


def test_what_nobody_waits_for_any_more_is_not_done_and_what_is_kept_is(place: Place) -> None:
    async def main() -> None:
        did: list[str] = []
        async with begun(place) as (writer, first, ends):
            for _ in range(3):
                with pytest.raises(StoreAway):
                    await writer.run(lambda _: did.append("in vain"), seconds=0.05)
            writer.later(lambda _: did.append("kept"), is_kept=True)
            ends.set()
            await first
            await writer.run(lambda _: did.append("asked"))
        assert did == ["kept", "asked"]

    run(main())


@pytest.mark.parametrize("fails", [False, True], ids=["it hangs", "it hangs and then fails"])
def test_what_is_kept_is_bounded_and_what_came_last_is_let_be_first_what_is_cheap(
    place: Place, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(writer_module, "MAX_KEPT", 20)
    monkeypatch.setattr(writer_module, "MAX_CHEAP", 10)
    monkeypatch.setattr(writer_module, "BATCH", 8)
    did, failures = list[int](), [StoreAway("locked")] * fails

    def do(number: int, _: Connection) -> None:
        if number == 6 and failures:  # in the middle of the first portion, of which nothing is done then
            raise failures.pop()
        did.append(number)

    async def main() -> None:
        async with begun(place) as (writer, first, ends):
            for number in range(40):
                writer.later(partial(do, number), is_kept=True, is_cheap=number < 15)
            ends.set()
            await first
            await until(lambda: 24 in did)
            writer.later(partial(do, 40), is_kept=True, is_cheap=True)  # there is room again
            await writer.run(lambda _: None)

    run(main())
    kept = [*range(10), *range(15, 25), 40]
    assert did == [*range(6), *kept] if fails else did == kept


def test_what_has_piled_up_is_done_in_portions_that_let_others_write_in_between(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "BATCH", 10)

    def transaction(db: Connection) -> int:
        (number,) = db.row("SELECT txid_current()") or (0,)
        return int(number)

    async def main() -> None:
        async with begun(Place(tmp_path, postgres_url)) as (writer, first, ends):
            waiting = [asyncio.create_task(writer.run(transaction)) for _ in range(35)]
            await asyncio.sleep(0)
            ends.set()
            await first
            done_together = Counter(await asyncio.gather(*waiting))
        assert sorted(done_together.values()) == [5, 10, 10, 10]

    run(main())
