"""A disk without room: new requests are refused, running ones end, and nothing of them is lost."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from octoai.server import accounts
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.journal import files, writer
from octoai.server.store import Connection, Place, StoreAway, StoreFull, connect
from octoai.server.store import writer as applier
from octoai.server.store.entries import balance_nanos
from tests.load.accounts import Books, hold
from tests.load.clients import Load, Request, Target, mixed
from tests.load.upstream import MODEL, Order, Upstream
from tests.running import InProcess, Start
from tests.talking import Talk, ask, request, until

PATH = "/v1/chat/completions"
SEGMENT_BYTES = 48 * 1024  # for the records of some 30 requests
SLOW = tuple(step for number in range(60) for step in (f"w{number} ", 0.02))


class Disk:
    """Where the journal is kept: it may have no room for another segment, or take no bytes at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        self.is_broken = False
        self._write, self._new_segment = files.write, files.new_segment
        monkeypatch.setattr(files, "write", self.write)
        monkeypatch.setattr(files, "new_segment", self.new_segment)

    def new_segment(self, path: Path, num_bytes: int) -> int:
        if self.is_full or self.is_broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._new_segment(path, num_bytes)

    def write(self, fd: int, block: bytes | bytearray, offset: int) -> None:
        if self.is_broken:  # a part of it, as a disk that is nearly full does
            os.pwrite(fd, bytes(block[: len(block) // 2]), offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(fd, block, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    # Small segments, so that one is used up soon.
    opened = writer.Journal.open
    monkeypatch.setattr(writer.Journal, "open", lambda directory: opened(directory, segment_bytes=SEGMENT_BYTES))
    return Disk(monkeypatch)


@pytest.fixture
def over_engine(upstream: Upstream, in_process: Start) -> InProcess:
    return in_process(OpenAIEngine(upstream.url, model=MODEL, dialect="vllm"))


def refusal(service: InProcess) -> tuple[int, str | None, str | None]:
    status, headers, text = ask(service, PATH, request(service, max_tokens=1))
    return status, json.loads(text).get("code"), headers.get("retry-after")


@pytest.fixture
def begin() -> Iterator[Callable[[InProcess], Talk]]:
    """A stream that takes its time."""
    open_: list[Talk] = []

    def start(service: InProcess) -> Talk:
        open_.append(Talk(service))
        open_[-1].socket.settimeout(30)
        open_[-1].send(PATH, request(service, stream=True), head="connection: close\r\n")
        open_[-1].until(b"w1 ")
        return open_[-1]

    yield start
    for each in open_:
        each.close()


def test_new_requests_are_refused_and_running_ones_end(disk: Disk, in_process: Start, begin: Any) -> None:
    service = in_process(ScriptedEngine(SLOW, num_slots=64))
    streams = [begin(service) for _ in range(5)]
    disk.is_full = True
    until(lambda: refusal(service) == (503, "no_room", "5"), 10)
    assert all(stream.rest().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for stream in streams)
    disk.is_full = False
    until(lambda: refusal(service)[0] == 200, 5)
    rows = service.read(lambda db: db.rows("SELECT status, COUNT(*) FROM requests GROUP BY status"))
    assert [status for status, _ in rows] == ["settled"]
    Books.read(service.place)


@pytest.mark.slow
def test_what_cannot_be_written_is_written_when_there_is_room_again(disk: Disk, in_process: Start, begin: Any) -> None:
    service = in_process(ScriptedEngine(SLOW, num_slots=64))
    streams = [begin(service) for _ in range(5)]
    disk.is_broken = True
    # Whoever comes before the first write has failed waits for the record of what it used.
    reading = [
        *(threading.Thread(target=stream.rest) for stream in streams),
        threading.Thread(target=refusal, args=[service]),
    ]
    for each in reading:
        each.start()
    time.sleep(0.5)
    assert refusal(service)[:2] == (503, "no_room")
    time.sleep(2)  # by now all of them have come to their ends
    disk.is_broken = False
    for each in reading:
        each.join(20)
    assert all(b"[DONE]" in stream.received for stream in streams)
    until(lambda: refusal(service)[0] == 200, 5)
    until(lambda: {row.status for row in Books.read(service.place).rows} == {"settled"}, 5)
    rows = Books.read(service.place).rows
    assert sorted(row.completion_tokens for row in rows)[-5:] == [60] * 5


@pytest.mark.slow
def test_under_load_nothing_is_lost_while_the_disk_fills_up_and_is_cleared(
    disk: Disk, over_engine: InProcess, upstream: Upstream
) -> None:
    target = Target(over_engine.url, over_engine.token, over_engine.model)
    load = Load(target, mixed, numbers=itertools.count()).start()
    for fault in ("is_full", "is_broken", "is_full"):
        time.sleep(1)
        setattr(disk, fault, True)
        time.sleep(1.5)
        setattr(disk, fault, False)
    time.sleep(1.5)
    told = load.stop()
    until(lambda: refusal_of(over_engine) == 200, 5)
    over_engine.read(lambda db: None)
    found = hold(Books.read(over_engine.place), told, upstream.at_rest(), num_others=50)
    assert found.problems == []
    assert found.num_interrupted == 0
    assert found.num_finished > 20
    assert 503 in {each.status for each in told}


def refusal_of(service: InProcess) -> int:
    target = Target(service.url, service.token, service.model)
    body: Any = Request(Order(10**6, num_tokens=1), stream=False).body(target.model)
    return ask(service, PATH, body)[0]


def test_the_database_may_be_full_while_the_journal_has_room(in_process: Start, monkeypatch: Any) -> None:
    """Requests are refused before the journal fills up too."""
    service = in_process(ScriptedEngine())
    assert refusal(service)[0] == 200
    applied = applier.apply_in_portions
    is_full = True

    def apply(*arguments: Any) -> int:
        if is_full:
            raise StoreFull("database or disk is full")
        return applied(*arguments)

    monkeypatch.setattr(applier, "apply_in_portions", apply)
    until(lambda: refusal(service)[:2] == (503, "no_room"), 5)
    is_full = False
    until(lambda: refusal(service)[0] == 200, 5)
    rows = service.read(lambda db: db.rows("SELECT status FROM requests"))
    assert {status for (status,) in rows} == {"settled"}


def health(service: InProcess) -> tuple[int, str]:
    """Status, and what is said of the ledger."""
    status, _, text = ask(service, "/health")
    return status, json.loads(text)["ledger"]


def test_readiness_says_that_there_is_no_room_and_that_there_is_again(disk: Disk, in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    assert health(service) == (200, "ready")
    disk.is_full = True
    until(lambda: refusal(service)[:2] == (503, "no_room"), 10)
    assert health(service) == (503, "no_room")
    assert ask(service, "/health/live")[0] == 200
    disk.is_full = False
    until(lambda: health(service) == (200, "ready"), 5)  # without a request: who looks here sends none meanwhile


@pytest.mark.parametrize(("failure", "code"), [(StoreFull, "no_room"), (StoreAway, "database_away")])
def test_what_is_wrong_with_the_database_is_said_by_readiness_and_to_who_administers(
    in_process: Start, monkeypatch: pytest.MonkeyPatch, failure: type[Exception], code: str
) -> None:
    service = in_process(ScriptedEngine(), database_away_seconds=1)

    def apply(*arguments: Any) -> int:
        raise failure("as the database says it, with its path")

    with monkeypatch.context() as patch:
        patch.setattr(applier, "apply_in_portions", apply)
        until(lambda: refusal(service)[:2] == (503, code), 10)
        assert health(service) == (503, code)
        status, headers, text = ask(service, "/v1/admin/accounts")
        assert (status, json.loads(text)["code"], headers["retry-after"]) == (503, code, "5")
        assert b"path" not in text
    until(lambda: health(service) == (200, "ready"), 5)
    assert ask(service, "/v1/admin/accounts")[0] == 200


def fill(db: Connection) -> None:
    db.execute_many("INSERT INTO filler VALUES (zeroblob(?))", [(4000,)] * 100)


def fill_and_say_it_otherwise(db: Connection) -> None:
    try:
        fill(db)
    except StoreFull:
        raise ZeroDivisionError from None


@pytest.mark.parametrize("fill", [fill, fill_and_say_it_otherwise])
def test_who_comes_after_one_that_found_the_disk_full_is_written_whole_or_not_at_all(
    tmp_path: Path, fill: Callable[[Connection], None]
) -> None:
    """SQLite undoes the whole transaction then, by itself."""
    place = Place(tmp_path)
    with closing(connect(place)) as db, db.transaction():
        accounts.create(db, "acme")
        db.execute("CREATE TABLE filler (block BLOB NOT NULL)")  # where that finds no room, SQLite undoes it alone

    async def main() -> None:
        writer = applier.Writer(place)
        writer.start()
        gate = threading.Event()
        try:
            most = "PRAGMA max_page_count = {}".format(*await writer.run(lambda db: db.row("PRAGMA page_count")) or ())
            first = asyncio.create_task(writer.run(lambda db: (db.row(most), gate.wait(5))))
            await asyncio.sleep(0.2)  # so that the next two share a transaction
            both = [asyncio.create_task(writer.run(do)) for do in (fill, lambda db: accounts.credit(db, "acme", 5))]
            await asyncio.sleep(0.1)
            gate.set()
            await first
            assert [type(each) for each in await asyncio.gather(*both, return_exceptions=True)] == [StoreAway] * 2
            assert writer.is_full
            assert await writer.run(lambda db: balance_nanos(db, "acme")) == 0
            assert not writer.is_full
        finally:
            writer.close()

    asyncio.run(main())


def test_what_finds_no_room_without_undoing_the_transaction_fails_alone(place: Place) -> None:
    with closing(connect(place)) as db, db.transaction():
        accounts.create(db, "acme")

    def sort(db: Connection) -> None:
        accounts.credit(db, "acme", 3)
        raise StoreFull("the database has no room: a sort could not write its temporary file")

    async def main() -> None:
        writer = applier.Writer(place)
        writer.start()
        began, gate = threading.Event(), threading.Event()
        try:
            first = asyncio.create_task(writer.run(lambda _: (began.set(), gate.wait(5))))
            await asyncio.to_thread(began.wait, 5)  # so that the next two share a transaction
            both = [asyncio.create_task(writer.run(do)) for do in (sort, lambda db: accounts.credit(db, "acme", 5))]
            await asyncio.sleep(0.1)
            gate.set()
            await first
            failed, credited = await asyncio.gather(*both, return_exceptions=True)
            assert isinstance(failed, StoreAway)
            assert not isinstance(credited, BaseException)
            assert (writer.is_full, writer.away_seconds) == (False, None)
            assert await writer.run(lambda db: balance_nanos(db, "acme")) == 5
        finally:
            writer.close()

    asyncio.run(main())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a file system of its own cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_real_disk_that_is_full(small_disk: Path, upstream: Upstream, in_process: Start) -> None:
    service = InProcess(OpenAIEngine(upstream.url, model=MODEL, dialect="vllm"), small_disk)
    target = Target(service.url, service.token, service.model)
    try:
        load = Load(target, mixed, numbers=itertools.count()).start()
        time.sleep(1)
        filler = small_disk / "filler"
        # Unbuffered: a buffer with a rest that found no room would fail once more as it is closed.
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 65536)
        time.sleep(4)
        filler.unlink()
        time.sleep(3)
        told = load.stop()
        until(lambda: refusal_of(service) == 200, 10)
        service.read(lambda db: None)
        found = hold(Books.read(service.place), told, upstream.at_rest(), num_others=50)
    finally:
        service.close()
    assert found.problems == []
    assert found.num_finished > 20
    assert 503 in {each.status for each in told}
