"""How several processes end: killed, hanging, or told to by a signal; and what is in the ledger then."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from octoai.server.store import Place, connect, requests
from tests.load.clients import Load, Request, Target, Told, ask
from tests.load.crashes import Crashes
from tests.load.places import serve
from tests.load.upstream import MODEL, Order, Upstream
from tests.running import Serve, ledger_verifies
from tests.server.settling import run
from tests.talking import until

_numbers = itertools.count(1_000_000)


def open_requests(service: Serve) -> list[requests.RequestRow]:
    with closing(connect(Place(service.data_dir))) as db:
        return requests.expired(db, 2**62)


def brief(number: int) -> Request:
    """Streams of a third of a second, and whole answers at once."""
    if number % 3 == 0:
        return Request(Order(number, num_tokens=2), stream=False)
    return Request(Order(number, num_tokens=30, pace=0.01))


def kill_one(crashes: Crashes, load: Load) -> None:
    """And wait for the one that is started for it."""
    pid = crashes.service.workers()[0]
    crashes.kill_worker(load, pid)
    until(lambda: pid not in crashes.service.workers() and len(crashes.service.workers()) == 2, 20)


def test_one_is_killed_and_then_all_with_their_supervisor_and_nothing_is_lost_or_doubled(
    tmp_path: Path, upstream: Upstream
) -> None:
    crashes = Crashes(tmp_path, upstream, settings="workers = 2\n")
    try:
        load = crashes.load(brief)
        time.sleep(0.7)
        kill_one(crashes, load)
        until(lambda: len(crashes.service.appliers()) == 2, 20)
        crashes.told += load.stop()
        until(lambda: not open_requests(crashes.service), 5)  # what was killed did not wait for the next start
        assert crashes.findings().num_interrupted > 0
        load = crashes.load(brief)
        processes = crashes.service.workers() + crashes.service.appliers()
        assert len(processes) == 4
        time.sleep(0.5)
        crashes.kill(load)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), 5)
        crashes.service = crashes.started()
        found = crashes.findings()
        assert found.problems == []
        assert found.num_finished > 50
        ledger_verifies(crashes.service)
    finally:
        crashes.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_one_after_the_other_killed_under_all_kinds_of_requests(
    tmp_path: Path, upstream: Upstream, database: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres_url") if database == "postgres" else None
    settings = "workers = 2\n" + ("" if url is None else f"database = {json.dumps(url)}\n")
    crashes = Crashes(tmp_path, upstream, settings=settings, num_clients=24)
    try:
        load = crashes.load()
        for _ in range(8):
            time.sleep(1)
            kill_one(crashes, load)
        crashes.told += load.stop()
        ledger_verifies(crashes.service)
        found = crashes.findings(Place(crashes.service.data_dir, url))
        assert found.problems == []
        assert found.num_interrupted > 8
    finally:
        crashes.close()


@pytest.mark.parametrize("num_workers", ["1", "2"])
@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM,),
        pytest.param((signal.SIGHUP, signal.SIGHUP), marks=pytest.mark.slow),
        pytest.param((signal.SIGHUP, signal.SIGTERM), marks=pytest.mark.slow),
    ],
)
def test_a_signal_drains_all_even_where_all_are_sent_it(
    tmp_path: Path, upstream: Upstream, signals: tuple[signal.Signals, ...], num_workers: str
) -> None:
    """As a service manager sends it to every process of a service; that a terminal closes, each is told twice, or by
    that and by the end of its session."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it is ignored, by what we start as well
    service = serve(tmp_path, upstream, "--workers", num_workers)
    signal.signal(signal.SIGHUP, before)
    target = Target(service.url, service.token, MODEL)
    told = [Told(next(_numbers), "stream") for _ in range(12)]

    def one(each: Told) -> None:
        run(ask(target, Request(Order(each.number, num_tokens=20, pace=0.05)), each))

    threads = [threading.Thread(target=one, args=(each,)) for each in told]
    for thread in threads:
        thread.start()
    until(lambda: all(each.num_seen > 0 for each in told), 10)
    pids = (service.process.pid, *service.workers())
    for number in signals:
        for pid in pids:
            os.kill(pid, number)
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    assert service.process.wait(20) == 0
    service.stop()
    assert all(each.is_finished and each.num_seen == 20 for each in told)
    assert list((service.data_dir / "journal").iterdir()) == []
    assert service.lines.count(f"octoai ready on {service.url}") == 1


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_who_stops_it_at_once_finds_what_was_generated_in_the_ledger(
    tmp_path: Path, upstream: Upstream, num_workers: str
) -> None:
    service = serve(tmp_path, upstream, "--workers", num_workers)
    told = [Told(next(_numbers), "stream" if number % 2 else "whole") for number in range(6)]
    target = Target(service.url, service.token, MODEL)

    def one(each: Told) -> None:
        run(ask(target, Request(Order(each.number, num_tokens=100, pace=0.2), stream=each.how == "stream"), each))

    threads = [threading.Thread(target=one, args=(each,)) for each in told]
    for thread in threads:
        thread.start()
    until(lambda: all(each.num_seen > 2 for each in told if each.how == "stream"), 10)
    for _ in range(2):
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert service.process.wait(10) == 0
    for thread in threads:
        thread.join(20)
    service.stop()
    assert "Traceback" not in service.log.read_text()
    with closing(connect(Place(service.data_dir))) as db:
        rows = db.rows("SELECT status, completion_tokens FROM requests")
    assert len(rows) == len(told)
    assert all(status == "settled" and num_tokens > 0 for status, num_tokens in rows), rows


@pytest.mark.slow
def test_a_terminal_that_closes_is_no_matter_where_that_signal_is_ignored(tmp_path: Path, upstream: Upstream) -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        service = serve(tmp_path, upstream)
    finally:
        signal.signal(signal.SIGHUP, before)
    service.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    target, told = Target(service.url, service.token, MODEL), Told(next(_numbers), "stream")
    run(ask(target, Request(Order(told.number, num_tokens=2)), told))
    assert told.is_finished
    assert service.stop() == 0


@pytest.mark.slow
def test_a_signal_drains_where_nobody_reads_what_is_said(tmp_path: Path, upstream: Upstream) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    service = serve(tmp_path, upstream)
    target, told = Target(service.url, service.token, MODEL), Told(next(_numbers), "stream")
    request = Request(Order(told.number, num_tokens=20, pace=0.05))
    asking = threading.Thread(target=lambda: run(ask(target, request, told)))
    asking.start()
    until(lambda: told.num_seen > 0, 10)
    assert service.stop() == 0
    asking.join(20)
    assert told.is_finished


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_another_serves(tmp_path: Path, upstream: Upstream) -> None:
    service = serve(tmp_path, upstream, "--workers", "2", settings="worker_stall_seconds = 2")
    target = Target(service.url, service.token, MODEL)
    hung, other = service.workers()
    os.kill(hung, signal.SIGSTOP)
    until(lambda: hung not in service.workers() and len(service.workers()) == 2, 20)
    assert other in service.workers(), "it answers all the time"
    for told in [Told(next(_numbers), "stream") for _ in range(12)]:
        run(ask(target, Request(Order(told.number, num_tokens=2)), told))
        assert told.is_finished
    assert f"worker 0 (process {hung}) did not answer for 2 s" in service.log.read_text()
    assert service.stop() == 0
    ledger_verifies(service)


def test_a_signal_ends_all_even_where_one_hangs_in_its_start(tmp_path: Path, upstream: Upstream) -> None:
    service = serve(tmp_path, upstream, "--workers", "2", settings="worker_stall_seconds = 1")
    first = service.workers()
    os.kill(first[0], signal.SIGKILL)
    until(lambda: len(set(service.workers()) - set(first)) == 1, 10)
    (hung,) = set(service.workers()) - set(first)
    os.kill(hung, signal.SIGSTOP)
    time.sleep(1.5)
    assert hung in service.workers(), "a start may take longer"
    assert service.stop(seconds=10) == 0
    assert f"worker 0 (process {hung}) did not answer for" in service.log.read_text()


@pytest.mark.slow
def test_a_second_signal_ends_all_at_once(tmp_path: Path, upstream: Upstream) -> None:
    service = serve(tmp_path, upstream, "--workers", "2")
    target, told = Target(service.url, service.token, MODEL), Told(next(_numbers), "stream")
    request = Request(Order(told.number, num_tokens=3000, pace=0.02))
    asking = threading.Thread(target=lambda: run(ask(target, request, told)))
    asking.start()
    until(lambda: told.num_seen > 0, 10)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    until(lambda: "finishing 1 requests" in service.log.read_text(), 5)
    assert service.stop() == 0
    assert time.monotonic() - began < 10
    asking.join(10)
    ledger_verifies(service)
