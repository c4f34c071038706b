"""When a journal's records are on the disk, and who is told: by the kernel, or by a thread where that does not sync."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from octoai.server.journal import (
    Position,
)
from octoai.server.journal import writer as journal_writer
from tests.server.journals import (
    HeldSyncs,
    Opened,
    append_all,
    file_of,
    numbers,
    record,
    run,
    until,
)


@pytest.mark.usefixtures("by_thread")
def test_many_appends_share_a_sync(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    num_syncs = 0
    sync = os.fdatasync

    def count(fd: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        sync(fd)

    async def main() -> None:
        journal = opened(1024 * 1024)
        monkeypatch.setattr(os, "fdatasync", count)
        await append_all(journal, range(1000))
        assert num_syncs < 50

    run(main())


@pytest.mark.usefixtures("by_thread")
def test_what_is_not_synced_is_neither_acknowledged_nor_read(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    may_sync, sync = threading.Event(), os.fdatasync

    def held_back(fd: int) -> None:
        assert may_sync.wait(20)
        sync(fd)

    async def main() -> None:
        journal = opened()
        await journal.append(record(0))
        monkeypatch.setattr(os, "fdatasync", held_back)
        waiter = journal.append(record(1))
        await until(lambda: b'"n":1' in file_of(journal, 1).read_bytes())
        await asyncio.sleep(0.05)
        assert not waiter.done()
        tail = journal.tail()
        assert numbers(tail) == [0]
        may_sync.set()
        await waiter
        assert numbers(tail) == [1]

    run(main())


def test_every_sync_is_told(opened: Opened) -> None:
    async def main() -> None:
        journal, seen = opened(), list[Position]()
        journal.on_durable = lambda: seen.append(journal.durable)
        positions = [await journal.append(record(n)) for n in range(3)]
        await until(lambda: seen == positions)

    run(main())


def test_a_waiter_may_leave(opened: Opened) -> None:
    async def main() -> None:
        problems = list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        journal = opened()
        waiters = [journal.append(record(n)) for n in range(10)]
        for waiter in waiters[::2]:
            waiter.cancel()
        await asyncio.gather(*waiters[1::2])
        await asyncio.sleep(0.01)
        assert numbers(journal.tail()) == list(range(10))
        assert problems == []

    run(main())


def test_a_loop_that_is_closed_stops_nothing(opened: Opened) -> None:
    journal = opened()

    async def leave() -> None:
        journal.append(record(0))

    asyncio.run(leave())
    journal.stop()
    assert numbers(journal.tail()) == [0]


def test_what_is_written_is_there_after_a_kill_and_durable_once_it_is_synced(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        written = journal.append(record(1), soon=None)
        assert journal.written > journal.durable
        (segment,) = journal.directory.glob("*000001.journal")
        assert b'"n":1' in segment.read_bytes()
        await asyncio.sleep(0.02)
        assert journal.tail().records(10) == []  # a tail reads what is durable
        journal.sync_soon()
        await written
        assert journal.durable == journal.written == written.result()
        assert len(journal.tail().records(10)) == 1

    run(main())


def test_what_comes_during_a_sync_waits_for_the_next(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "Syncs", HeldSyncs)

    async def main() -> None:
        journal = opened()
        first = journal.append(record(1), soon=True)
        second, third = journal.append(record(2), soon=True), journal.append(record(3), soon=True)
        (sync,) = HeldSyncs.newest.running
        sync(None)
        assert (first.done(), second.done(), third.done()) == (True, False, False)
        assert journal.durable == first.result()
        _, sync = HeldSyncs.newest.running
        sync(None)
        assert (second.done(), third.done()) == (True, True)
        assert numbers(journal.tail()) == [1, 2, 3]

    run(main())


def test_a_sync_that_the_kernel_fails_gives_the_segment_up(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "Syncs", HeldSyncs)

    async def main() -> None:
        journal = opened()
        waiters = [journal.append(record(n), soon=True) for n in range(3)]
        HeldSyncs.newest.running[0](OSError(errno.EIO, "broken"))
        assert [(await waiter).segment for waiter in waiters] == [2, 2, 2]
        assert numbers(journal.tail()) == [0, 1, 2]

    run(main())


def test_a_segment_that_fills_while_it_is_synced_is_whole(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "Syncs", HeldSyncs)

    async def main() -> None:
        journal = opened()
        waiters = [journal.append(record(n, padding=1500), soon=True) for n in range(3)]
        assert [waiter.done() for waiter in waiters] == [True, True, False]  # the full one was synced at once
        HeldSyncs.newest.running[0](None)
        assert not waiters[2].done(), "that sync was of another segment"
        HeldSyncs.newest.running[1](None)
        assert waiters[2].done()
        assert numbers(journal.tail()) == [0, 1, 2]

    run(main())


def test_a_sync_that_fails_when_the_journal_is_closed_closes_nobodys_file(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_writer, "Syncs", HeldSyncs)

    async def main() -> None:
        journal = opened()
        journal.append(record(1), soon=True)
        await asyncio.to_thread(journal.stop)
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]  # they take the numbers that are free again
        HeldSyncs.newest.running[0](OSError(errno.EIO, "broken"))
        for fd in others:
            os.close(fd)

    run(main())


def test_a_sync_that_is_done_at_once_leaves_nothing_waiting(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a ring does where the file is in memory."""

    class Immediate(HeldSyncs):
        def submit(self, _: int, done: Callable[[OSError | None], None]) -> None:
            done(None)

    monkeypatch.setattr(journal_writer, "Syncs", Immediate)

    async def main() -> None:
        journal = opened()
        for n in range(3):
            assert journal.append(record(n), soon=True).done()
        assert numbers(journal.tail()) == [0, 1, 2]

    run(main())


def test_where_the_kernel_refuses_a_sync_the_thread_does_it(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(HeldSyncs):
        def submit(self, _: int, done: Callable[[OSError | None], None]) -> None:
            raise OSError(errno.EINVAL, "not this file")

    monkeypatch.setattr(journal_writer, "Syncs", Refusing)

    async def main() -> None:
        journal = opened()
        await append_all(journal, range(20))
        assert numbers(journal.tail()) == list(range(20))

    run(main())
