"""`kill -9` at any moment, under load: what a client got a byte of is in the ledger, once, and to the token."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from octoai.server.store import Place
from octoai.server.store.sqlite import FILENAME
from tests.load.accounts import Books, Findings
from tests.load.clients import Request
from tests.load.crashes import Crashes
from tests.load.places import serve
from tests.load.upstream import Order, Upstream
from tests.running import Serve
from tests.talking import until

Start = Callable[..., Crashes]


@pytest.fixture
def crashing(upstream: Upstream, tmp_path: Path) -> Iterator[Start]:
    running: list[Crashes] = []

    def start(**options: Any) -> Crashes:
        running.append(Crashes(tmp_path / f"place{len(running)}", upstream, **options))
        return running[-1]

    yield start
    for each in running:
        each.close()


def quick(number: int) -> Request:
    return Request(Order(number, num_tokens=2), stream=number % 2 == 0)


def ledger_verifies(service: Serve) -> None:
    ran = service.run("ledger", "verify")
    assert ran.returncode == 0, ran.stderr


def held(crashes: Crashes) -> Findings:
    found = crashes.findings()
    assert found.problems == []
    ledger_verifies(crashes.service)
    return found


@contextmanager
def write_lock(data_dir: Path) -> Iterator[None]:
    """Nobody else writes to the database meanwhile."""
    with closing(sqlite3.connect(data_dir / FILENAME, timeout=10, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def is_taken(lock: Path) -> bool:
    """Whether a process holds a journal's lock, or is done with it."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
        return False
    except (BlockingIOError, FileNotFoundError):
        return True


def test_killed_at_any_moment_nothing_is_lost_and_nothing_is_charged_twice(crashing: Start) -> None:
    crashes, chance = crashing(), random.Random()
    for _ in range(4):
        crashes.round(chance)
    found = held(crashes)
    assert found.num_requests > 20
    assert found.num_interrupted > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_thirty_times(crashing: Start) -> None:
    crashes, chance = crashing(num_clients=24), random.Random()
    for _ in range(30):
        crashes.round(chance)
    found = held(crashes)
    assert min(found.num_finished, found.num_left, found.num_interrupted) > 30


def test_killed_while_the_database_is_behind_its_journal(crashing: Start) -> None:
    crashes = crashing()
    with write_lock(crashes.service.data_dir):
        load = crashes.load(quick)
        until(lambda: len(load.told) > 300, 30)
        crashes.kill(load)
        with closing(sqlite3.connect(crashes.service.data_dir / FILENAME)) as db:
            assert db.execute("SELECT COUNT(*) FROM requests").fetchone() < (300,)
    crashes.service = crashes.started()
    assert held(crashes).num_finished > 250


@pytest.mark.slow
def test_killed_in_its_recovery_and_again_in_the_next(crashing: Start) -> None:
    crashes = crashing()
    data_dir = crashes.service.data_dir
    with write_lock(data_dir):
        load = crashes.load(quick)
        until(lambda: len(load.told) > 700, 60)
        crashes.kill(load)
        (lock,) = (data_dir / "journal").glob("*.lock")
        waiting = serve(crashes.place, crashes.upstream, wait=False)
        until(lambda: is_taken(lock), 30)
        waiting.stop(signal.SIGKILL)
    applying = serve(crashes.place, crashes.upstream, wait=False)
    with closing(sqlite3.connect(data_dir / FILENAME)) as db:
        before = db.execute("SELECT MAX(segment), MAX(byte) FROM journals").fetchone()
        until(lambda: db.execute("SELECT MAX(segment), MAX(byte) FROM journals").fetchone() != before, 30)
    applying.stop(signal.SIGKILL)
    crashes.service = crashes.started()
    assert held(crashes).num_finished > 650


@pytest.mark.slow
def test_killed_before_it_ever_answered(crashing: Start) -> None:
    crashes, chance = crashing(), random.Random()
    crashes.kill(crashes.load(quick))
    for _ in range(3):
        starting = serve(crashes.place, crashes.upstream, wait=False)
        time.sleep(chance.uniform(0.2, 1.5))
        starting.stop(signal.SIGKILL)
    crashes.service = crashes.started()
    held(crashes)


def test_stopped_in_order_it_leaves_no_journal(crashing: Start) -> None:
    crashes = crashing()
    load = crashes.load(total=60)
    load.join()
    crashes.told += load.told
    assert crashes.service.stop() == 0
    assert list((crashes.service.data_dir / "journal").iterdir()) == []
    crashes.service = crashes.started()
    assert held(crashes).num_interrupted == 0


@pytest.mark.slow
def test_killed_soon_after_it_stood_still(crashing: Start) -> None:
    crashes = crashing()
    load = crashes.load()
    time.sleep(1)
    os.kill(crashes.service.process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(crashes.service.process.pid, signal.SIGCONT)
    time.sleep(0.5)
    crashes.kill(load)
    crashes.service = crashes.started()
    held(crashes)


@pytest.mark.slow
def test_commands_beside_the_service_take_nothing_from_it(crashing: Start) -> None:
    """Another process that opens and closes the database must not part it from what the service still writes."""
    crashes = crashing()
    for round_ in range(3):
        load = crashes.load(quick, total=40)
        crashes.told += load.join()
        ran = crashes.service.run("token", "create", "--name", f"made beside it {round_}")
        assert ran.returncode == 0, ran.stderr
    books = Books.read(Place(crashes.service.data_dir))
    assert len(books.rows) == 120, "what has ended is in the database, for every process to see"
    crashes.kill(crashes.load(quick))
    crashes.service = crashes.started()
    assert held(crashes).num_finished >= 120
    assert crashes.service.run("token", "list").stdout.count("made beside it") == 3
