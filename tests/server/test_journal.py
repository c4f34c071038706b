"""The journal: what was acknowledged is read back in order, whatever dies, fills up or fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from octoai.server.journal import (
    START,
    Journal,
    JournalDamaged,
    JournalFailed,
    JournalFull,
    Orphan,
    Position,
    Tail,
    orphans,
)
from octoai.server.journal import writer as journal_writer

SMALL = 4096  # bytes in a segment, where rotation matters
Opened = Callable[..., Journal]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    journals: list[Journal] = []

    def open_one(segment_bytes: int = SMALL) -> Journal:
        journals.append(Journal.open(tmp_path / "journal", segment_bytes=segment_bytes))
        return journals[-1]

    yield open_one
    for journal in journals:
        journal.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "journal"]


@pytest.fixture
def by_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel does not sync by itself."""

    def none(_: Any) -> None:
        raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(journal_writer, "Syncs", none)


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


# ── what is written is read ────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_appended_is_read_back_in_order(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        positions = [await journal.append({"n": 0, "text": "zwölf\n"}), await journal.append(b'{"n":1}')]
        positions += await append_all(journal, range(2, 50))
        assert positions == sorted(set(positions))
        read = []
        tail = journal.tail()
        while batch := tail.records(7):
            read += batch
        assert read[:2] == [('{"n":0,"text":"zwölf\\n"}'.encode(), positions[0]), (b'{"n":1}', positions[1])]
        assert [position for _, position in read] == positions
        assert journal.durable == positions[-1]

    run(main())


def test_a_tail_goes_on_from_any_position(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        positions = await append_all(journal, range(200), padding=50)
        assert positions[-1].segment > 3
        for n, position in enumerate(positions):
            assert numbers(journal.tail(position), limit=1000) == list(range(n + 1, 200))

    run(main())


def test_files_are_for_their_owner_alone(opened: Opened) -> None:
    journal = opened()
    assert stat.S_IMODE(journal.directory.stat().st_mode) == 0o700
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in journal.directory.iterdir()}
    assert modes == {".lock": 0o600, ".journal": 0o600}


def test_what_would_break_the_format_is_refused_at_once(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        with pytest.raises(ValueError, match="does not fit"):
            journal.append(record(1, SMALL))
        with pytest.raises(ValueError, match="newline"):
            journal.append(b'{\n"n":1}')
        with pytest.raises(TypeError):
            journal.append({"n": object()})
        await journal.append(record(1, SMALL - 300))
        assert numbers(journal.tail()) == [1]

    run(main())


def test_a_record_that_nobody_waits_for_is_kept_before_the_next(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        journal.append(record(0))
        await journal.append(record(1))
        assert numbers(journal.tail()) == [0, 1]

    run(main())


# ── syncs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── segments ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_there_is_always_a_spare_and_what_was_applied_is_deleted(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        positions = await append_all(journal, range(200), padding=100)
        last = positions[-1].segment
        await until(lambda: file_of(journal, last + 1).exists())
        journal.release(positions[100])
        left = sorted(journal.directory.glob("*.journal"))
        assert left == [file_of(journal, n) for n in range(positions[100].segment, last + 2)]
        assert numbers(journal.tail(positions[100])) == list(range(101, 200))
        journal.release(Position(999, 0))
        assert sorted(journal.directory.glob("*.journal")) == [file_of(journal, last), file_of(journal, last + 1)]
        assert {path.stat().st_size for path in journal.directory.glob("*.journal")} == {SMALL}

    run(main())


def test_released_records_are_missed_when_they_are_asked_for(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        positions = await append_all(journal, range(200), padding=100)
        journal.release(positions[-1])
        with pytest.raises(JournalDamaged, match=r"000000\.journal at byte 0"):
            journal.tail().records(10)

    run(main())


def test_closing_writes_what_was_appended_and_ends_the_thread(opened: Opened) -> None:
    async def main() -> None:
        journal = opened()
        waiters = [journal.append(record(n)) for n in range(100)]
        journal.stop()
        journal.stop()
        await asyncio.gather(*waiters)
        with pytest.raises(JournalFailed, match="closed"):
            journal.append(record(100))
        assert not journal.has_room
        assert numbers(journal.tail()) == list(range(100))
        assert orphans(journal.directory) == []
        journal.close()
        orphan = only_orphan(journal.directory)
        assert numbers(orphan.tail()) == list(range(100))
        orphan.close()

    run(main())


def test_removing_leaves_nothing(opened: Opened) -> None:
    journal, other = opened(), opened()
    journal.remove()
    journal.remove()
    assert {path.name[:16] for path in journal.directory.iterdir()} == {other.instance}


# ── tears and damage ───────────────────────────────────────────────────────────────────────────────────────────────


def written(journal: Journal, num_records: int, padding: int = 0) -> list[Position]:
    """Records each in a batch of its own; the journal is closed."""

    async def main() -> list[Position]:
        return [await journal.append(record(n, padding)) for n in range(num_records)]

    positions = asyncio.run(main())
    journal.close()
    return positions


@pytest.mark.parametrize("garbage", [b"\0", b"\xff", b"0"])
def test_a_torn_last_record_is_as_if_it_had_never_been(opened: Opened, garbage: bytes) -> None:
    journal = opened()
    positions = written(journal, 5)
    path, whole = file_of(journal, 1), file_of(journal, 1).read_bytes()
    begin, end = positions[-2].offset, positions[-1].offset
    for cut in range(begin, end):
        torn = whole[:cut] + garbage * (end - cut) + whole[end:]
        path.write_bytes(torn)
        tail = Tail(journal.directory, journal.instance)
        assert numbers(tail) == [0, 1, 2, 3] + [4] * (torn == whole)
        path.write_bytes(whole[:cut])
        assert numbers(Tail(journal.directory, journal.instance)) == [0, 1, 2, 3]


def test_a_batch_torn_in_its_middle_is_cut_there(opened: Opened) -> None:
    journal = opened(64 * 1024)

    async def main() -> list[Position]:
        await journal.append(record(0))
        return await append_all(journal, range(1, 100), padding=100)

    positions = asyncio.run(main())
    journal.close()
    data = bytearray(file_of(journal, 1).read_bytes())
    assert data.count(b">{") == 2 + (positions[0].offset == 0), "two batches: otherwise this shows nothing"
    page = slice(4096, 8192)  # never came to the disk, though the page after it did
    data[page] = bytes(4096)
    file_of(journal, 1).write_bytes(data)
    read = numbers(Tail(journal.directory, journal.instance))
    assert read == list(range(len(read)))
    assert 10 < len(read) < 50


def test_damage_before_a_later_batch_is_told(opened: Opened) -> None:
    journal = opened()
    positions = written(journal, 5)
    whole = file_of(journal, 1).read_bytes()
    for at in range(len(whole[: positions[2].offset])):
        damaged = bytearray(whole)
        damaged[at] ^= 0x15
        file_of(journal, 1).write_bytes(damaged)
        tail = Tail(journal.directory, journal.instance)
        with pytest.raises(JournalDamaged, match=r"000001\.journal at byte \d+"):
            numbers(tail)


def test_what_comes_before_damage_is_read_first(opened: Opened) -> None:
    journal = opened()
    positions = written(journal, 5)
    data = file_of(journal, 1).read_bytes().replace(b'"n":3', b'"n":8')
    file_of(journal, 1).write_bytes(data)
    tail = Tail(journal.directory, journal.instance)
    assert len(tail.records(100)) == 3
    with pytest.raises(JournalDamaged, match=f"at byte {positions[2].offset}"):
        tail.records(100)


@pytest.mark.parametrize("how", ["cut", "gone", "zeros", "last byte", "header of the next"])
def test_a_damaged_segment_before_another_is_told(opened: Opened, how: str) -> None:
    journal = opened()
    positions = written(journal, 120, padding=50)
    end = max(position.offset for position in positions if position.segment == 2)
    path = file_of(journal, 3 if how == "header of the next" else 2)
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        broken = {"cut": data[: end - 1], "zeros": bytes(len(data)), "last byte": data[: end - 1] + b"\0"}
        path.write_bytes(broken.get(how, b"x" + data[1:]))
    with pytest.raises(JournalDamaged):
        numbers(Tail(journal.directory, journal.instance))


# ── full disks and failing ones ────────────────────────────────────────────────────────────────────────────────────


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


# ── other processes ────────────────────────────────────────────────────────────────────────────────────────────────

APPENDING = """
import asyncio, sys
from pathlib import Path
from octoai.server.journal import Journal

async def caller(journal, numbers):
    for n in numbers:
        position = await journal.append({"n": n, "padding": "x" * (n % 300)})
        print(n, position.segment, position.offset, flush=True)

async def main():
    journal = Journal.open(Path(sys.argv[1]), segment_bytes=65536)
    print(journal.instance, flush=True)
    numbers = iter(range(10**9))
    await asyncio.gather(*(caller(journal, numbers) for _ in range(8)))

asyncio.run(main())
"""


@contextlib.contextmanager
def appending(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", APPENDING, directory], stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    for _ in range(6):
        with appending(tmp_path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.uniform(0.01, 0.4))
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().decode().splitlines(keepends=True)
        told = {int(n): Position(int(segment), int(end)) for n, segment, end in map(str.split, lines[:-1])}
        orphan = only_orphan(tmp_path)
        read = []
        tail = orphan.tail()
        while batch := tail.records(500):
            read += [(orjson.loads(payload)["n"], position) for payload, position in batch]
        assert [n for n, _ in read] == list(range(len(read)))
        assert told.items() <= dict(read).items()
        orphan.remove()
        assert list(tmp_path.iterdir()) == []


def test_only_the_dead_leave_orphans_and_only_one_takes_each(tmp_path: Path) -> None:
    with appending(tmp_path) as living, appending(tmp_path) as dying:
        assert living.stdout is not None
        assert dying.stdout is not None
        names = [process.stdout.readline().decode().strip() for process in (living, dying)]  # type: ignore[union-attr]
        for process in (living, dying):
            process.stdout.readline()  # type: ignore[union-attr]
        assert orphans(tmp_path) == []
        dying.kill()
        dying.wait()
        orphan = only_orphan(tmp_path)
        assert orphan.instance == names[1]
        assert orphans(tmp_path) == [], "it is being replayed"
        orphan.close()
        orphan = only_orphan(tmp_path)
        assert orphan.instance == names[1]
        assert numbers(orphan.tail(), limit=10_000)
        orphan.remove()
        assert orphans(tmp_path) == []
        assert {path.name[:16] for path in tmp_path.iterdir()} == {names[0]}


def test_an_orphan_that_was_removed_meanwhile_is_not_taken(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between another's opening the lock file and locking it."""
    journal = opened()
    journal.close()
    lock = fcntl.flock

    def remove_first(fd: int, how: int) -> None:
        monkeypatch.undo()
        only_orphan(journal.directory).remove()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    assert orphans(journal.directory) == []


def test_a_journal_is_never_seen_unlocked_while_it_is_made(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, seen = fcntl.flock, list[Any]()

    def look_first(fd: int, how: int) -> None:
        monkeypatch.undo()
        seen.extend(orphans(directory))
        lock(fd, how)

    directory = opened().directory
    monkeypatch.setattr(fcntl, "flock", look_first)
    journal = opened()
    assert [*seen, *orphans(directory)] == []
    assert journal.tail().records(10) == []


def test_where_nothing_was_ever_kept_there_are_no_orphans(tmp_path: Path) -> None:
    assert orphans(tmp_path / "nowhere") == []
    assert Tail(tmp_path, "0" * 16, START).records(1) == []


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
