"""The journal: what was acknowledged is read back in order, whatever dies or is damaged."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from octoai.server.journal import (
    START,
    JournalDamaged,
    JournalFailed,
    Position,
    Tail,
    orphans,
)
from tests.server.journals import (
    SMALL,
    Opened,
    append_all,
    file_of,
    numbers,
    only_orphan,
    record,
    run,
    until,
    written,
)

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
