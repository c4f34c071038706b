"""Full disks and failing ones: nothing that a journal has acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from octoai.server.billing.money import Price
from octoai.server.engines.base import Usage
from octoai.server.journal import (
    Journal,
    JournalError,
    JournalFailed,
    JournalFull,
    Position,
    Tail,
    files,
)
from octoai.server.journal import writer as journal_writer
from octoai.server.ledger import ledger
from tests.server.journals import (
    SMALL,
    Opened,
    append_all,
    failing,
    file_of,
    numbers,
    only_orphan,
    record,
    run,
    until,
    written,
)


def test_on_a_full_disk_running_requests_go_on_in_what_is_allocated(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_writer, "_RETRY_SECONDS", 0.02)

    async def main() -> None:
        journal = opened()
        assert journal.has_room
        with monkeypatch.context() as full:
            full.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
            kept = 0
            with pytest.raises(JournalFull):
                while True:
                    await journal.append(record(kept, 100))
                    kept += 1
            assert not journal.has_room
            assert kept > SMALL // 150, "more than one segment"
            with pytest.raises(JournalFull):
                await journal.append(record(kept, 100))
            assert len(list(journal.directory.glob("*.journal"))) == 2, "a failed allocation leaves no file"
        await until(lambda: journal.has_room)
        await journal.append(record(kept, 100))
        assert numbers(journal.tail()) == list(range(kept + 1))
        journal.close()
        assert numbers(Tail(journal.directory, journal.instance)) == list(range(kept + 1))

    run(main())


def test_a_journal_that_finds_no_room_to_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        Journal.open(tmp_path / "journal")
    assert list((tmp_path / "journal").iterdir()) == []


FULL = """
import asyncio, resource, sys
from pathlib import Path
from octoai.server.journal import Journal, JournalFull

async def main():
    journal = Journal.open(Path(sys.argv[1]), segment_bytes=4096)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4095, resource.RLIM_INFINITY))
    n = 0
    try:
        while True:
            await journal.append({"n": n})
            n += 1
    except JournalFull:
        print(n, journal.has_room)
    journal.close()

asyncio.run(main())
"""


def test_a_file_system_that_takes_no_more_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """A real refusal by the kernel, half-way through a write too: files may not grow, nor be written at their end."""
    answer = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    kept, has_room = answer.stdout.split()
    assert has_room == "False"
    orphan = only_orphan(tmp_path)
    read = numbers(orphan.tail())
    assert read[: int(kept)] == list(range(int(kept)))
    assert len(read) <= int(kept) + 1, "what was refused may be kept"
    orphan.remove()


@pytest.mark.usefixtures("by_thread")
@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
def test_a_segment_that_fails_is_given_up_and_its_batch_written_to_the_next(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def main() -> None:
        journal = opened()
        positions = await append_all(journal, range(3))
        working, num_calls = getattr(os, call), 0

        def fail_once(*args: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return working(*args) if num_calls > 1 else failing(errno.EIO)()

        monkeypatch.setattr(os, call, fail_once)
        positions += await append_all(journal, range(3, 6))
        positions += await append_all(journal, range(6, 9))
        assert {position.segment for position in positions[3:]} == {2}
        assert numbers(journal.tail()) == list(range(9)), "none of them twice"
        journal.close()
        assert numbers(Tail(journal.directory, journal.instance)) == list(range(9))
        assert numbers(Tail(journal.directory, journal.instance, positions[2])) == list(range(3, 9))

    run(main())


@pytest.mark.usefixtures("by_thread")
def test_a_disk_that_fails_throughout_is_told_and_may_recover(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "_RETRY_SECONDS", 0.02)

    async def main() -> None:
        journal = opened()
        await journal.append(record(0))
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", failing(errno.EIO))
            for n in (100, 101, 102):
                with pytest.raises(JournalFailed, match="Input/output error"):
                    await journal.append(record(n))
        await until(lambda: journal.has_room)
        await append_all(journal, range(1, 100), padding=100)
        assert numbers(journal.tail()) == list(range(100))
        journal.close()
        assert numbers(Tail(journal.directory, journal.instance)) == list(range(100))

    run(main())


@pytest.mark.usefixtures("by_thread")
def test_a_gap_goes_on_behind_a_segment_that_was_given_up(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest that is left failed before anything in it was durable; all of it is in the next."""
    monkeypatch.setattr(journal_writer, "_RETRY_SECONDS", 0.02)

    async def main() -> Journal:
        journal = opened()
        await append_all(journal, range(3))
        working, num_calls = os.fdatasync, 0

        def fail_twice(fd: int) -> None:
            nonlocal num_calls
            num_calls += 1
            return working(fd) if num_calls > 2 else failing(errno.EIO)()

        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", fail_twice)
            with contextlib.suppress(JournalFailed):  # who waited for the second is told
                await journal.append(record(3))
        await until(lambda: journal.has_room)
        await append_all(journal, range(4, 6))
        return journal

    journal = asyncio.run(main())
    journal.close()
    file_of(journal, 1).unlink()
    files.incomplete_path(journal.directory, journal.instance).touch()
    assert file_of(journal, 2).exists() and journal.durable.segment == 3
    orphan = only_orphan(journal.directory)
    assert numbers(orphan.tail())[-2:] == numbers(orphan.tail(Position(1, 1)))[-2:] == [4, 5]
    orphan.close()


@pytest.mark.usefixtures("by_thread")
def test_whoever_has_stopped_waiting_is_told_all_the_same(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        journal, refused = opened(), []

        def refuse(n: int, error: JournalError) -> None:
            assert "Input/output error" in str(error)
            refused.append(n)

        await journal.append(record(0), on_refused=lambda _: refused.append(0))
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", failing(errno.EIO))
            waiters = [journal.append(record(n), on_refused=partial(refuse, n)) for n in (1, 2)]
            waiters[0].cancel()
            with pytest.raises(JournalFailed):
                await waiters[1]
        assert refused == [1, 2]
        journal.close()

    run(main())


@pytest.mark.usefixtures("by_thread")
def test_a_settlement_that_nobody_waits_for_any_more_is_written_again(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller: Any = SimpleNamespace(account=SimpleNamespace(id="a"), token=SimpleNamespace(id="t"))
    writer: Any = None
    monkeypatch.setattr(ledger, "RETRY_SECONDS", 0.02)

    async def main() -> None:
        journal = opened()
        books = ledger.Ledger(journal, writer)
        tab = ledger.Tab(books, "1", "req_1", caller, "m", "m", Price(), lambda: Usage(3, 0, 5))
        tab.opened_us = 1
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", failing(errno.EIO))
            settling = asyncio.create_task(tab.settle("finished"))
            await asyncio.sleep(0)
            settling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await settling
            await tab.close("finished")  # as whoever leaves does; it does not wait either
            await until(lambda: not journal.has_room or bool(books._again))
        await until(lambda: not books._again)
        journal.close()
        [settled] = [orjson.loads(payload) for payload, _ in Tail(journal.directory, journal.instance).records(10)]
        assert (settled["request_id"], settled["completion_tokens"]) == ("req_1", 5)

    run(main())


@pytest.mark.usefixtures("by_thread")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_by_a_fault_leaves_nobody_waiting(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        journal._sync = failing(0)
        waiters = [journal.append(record(n)) for n in range(3)]
        outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [JournalFailed] * 3
        assert not journal.has_room
        with pytest.raises(JournalFailed):
            journal.append(record(3))

    run(main())


def test_what_is_allocated_is_written_too(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is only allocated takes a sync longer, when it is written for the first time."""
    pieces: list[tuple[int, int]] = []
    write = files.write

    def noted(fd: int, block: bytes, offset: int) -> None:
        pieces.append((offset, offset + len(block)))
        write(fd, block, offset)

    monkeypatch.setattr(files, "write", noted)
    first = opened(1_000_001)
    monkeypatch.undo()
    assert file_of(first, 1).read_bytes() == bytes(1_000_001)
    halves = len(pieces) // 2  # the segment in use, and the spare one
    for some in (pieces[:halves], pieces[halves:]):
        assert [start for start, _ in some] == [0, *(end for _, end in some[:-1])]
        assert some[-1][1] == 1_000_001


def test_without_a_call_to_allocate_zeros_are_written(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    first = opened()
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "fdatasync")
    second = opened(100_000)
    assert file_of(first, 1).read_bytes() == bytes(SMALL)
    assert file_of(second, 1).read_bytes() == bytes(100_000)
    positions = written(second, 3)
    assert numbers(Tail(second.directory, second.instance, positions[0])) == [1, 2]
