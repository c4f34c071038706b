"""`octoai serve --workers`: several processes on one port are one service, whatever becomes of any of them."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from octoai.server import accounts, tokens
from octoai.server.books import Books, open_journal
from octoai.server.errors import OutOfCredit
from octoai.server.limits import standings
from octoai.server.remaining import Remaining
from octoai.server.store import Connection, Place, connect, requests
from octoai.server.store.reservations import Reservation
from tests.load.clients import Load, Request, Target, Told, ask
from tests.load.crashes import Crashes
from tests.load.places import serve
from tests.load.upstream import MODEL, Order, Upstream
from tests.running import Serve
from tests.server.settling import run, settlement
from tests.talking import until

PATH = "/v1/chat/completions"
NUM_CONNECTIONS = 24  # that all of them come to one of two is a chance of one in eight million
ONE = 7 * 500 + 20 * 1500  # nano-dollars that a request for 20 tokens may come to
T = TypeVar("T")
_numbers = itertools.count(1_000_000)


class Workers:
    """The service as two processes, and its database."""

    def __init__(self, place: Path, upstream: Upstream, url: str | None = None) -> None:
        database = "" if url is None else f"database = {json.dumps(url)}\n"
        self.service = serve(place, upstream, "--workers", "2", settings=database)
        self.place = Place(self.service.data_dir, url)
        self.address = Target(self.service.url, "", MODEL).address
        self.open: list[http.client.HTTPConnection] = []

    def books(self, action: Callable[[Connection], T]) -> T:
        with closing(connect(self.place)) as db, db.transaction():
            return action(db)

    def client(self, name: str, **options: Any) -> tokens.Minted:
        self.books(lambda db: accounts.create(db, name, plan="unlimited", **options))
        return self.books(lambda db: tokens.mint(db, name, name))

    def connections(self, token: str, number: int = NUM_CONNECTIONS) -> list[Connected]:
        return [Connected(self, token) for _ in range(number)]

    def metrics(self, token: str) -> str:
        return Connected(self, token).asked("GET", "/metrics")[2].decode()

    def metric(self, name: str) -> float:
        text = self.metrics(self.service.token)
        found = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(map(float, found))


class Connected:
    """One connection, kept: to the same process as long as that lives."""

    def __init__(self, workers: Workers, token: str) -> None:
        self.token = token
        self._connection = http.client.HTTPConnection(*workers.address, timeout=30)
        self._connection.connect()
        workers.open.append(self._connection)

    def asked(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        said = {"authorization": f"Bearer {self.token}", **(headers or {})}
        self._connection.request(method, path, None if body is None else json.dumps(body), said)
        answer = self._connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def chat(self, order: Order | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        order = order or Order(next(_numbers), num_tokens=2)
        body = {"model": MODEL, "max_tokens": 20, "messages": order.messages}
        return self.asked("POST", PATH, body, {name.replace("_", "-"): value for name, value in headers.items()})


def at_once(connections: list[Connected], what: Callable[[Connected], T]) -> list[T]:
    answers: list[T] = []
    together = threading.Barrier(len(connections))

    def one(connection: Connected) -> None:
        together.wait(10)
        answers.append(what(connection))

    threads = [threading.Thread(target=one, args=(each,)) for each in connections]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(answers) == len(connections)
    return answers


@pytest.fixture(scope="module")
def engine() -> Iterator[Upstream]:
    running = Upstream()
    yield running
    running.close()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def serving(request: pytest.FixtureRequest, engine: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Shared: a test leaves two workers behind."""
    server = request.getfixturevalue("postgres_server") if request.param == "postgres" else None
    running = Workers(tmp_path_factory.mktemp("workers"), engine, None if server is None else server.new_database())
    yield running
    assert running.service.stop() == 0
    if server is not None:
        server.drop_database(running.place.url)


@pytest.fixture
def workers(serving: Workers) -> Iterator[Workers]:
    yield serving
    for connection in serving.open:
        connection.close()
    serving.open.clear()


def ledger_verifies(service: Serve) -> None:
    ran = service.run("ledger", "verify")
    assert ran.returncode == 0, ran.stderr


# ── one service ──


def test_all_serve_and_the_metrics_are_those_of_all(workers: Workers) -> None:
    client = workers.client("all")
    name = 'http_requests_total{handler="chat_completions",method="POST",status="200"}'
    before = workers.metric(name)
    answers = at_once(workers.connections(client.text), lambda connection: connection.chat())
    assert {status for status, _, _ in answers} == {200}
    for _ in range(6):  # whichever is asked
        assert workers.metric(name) == before + NUM_CONNECTIONS
    assert workers.metric("octoai_workers") == 2
    assert workers.metric("vllm:cache_config_info") == 1
    assert workers.metric(f'octoai_tokens_total{{kind="prompt",token_id="{client.id}"}}') > 0
    assert "octoai_workers" in workers.metrics(client.text) and client.id not in workers.metrics(client.text)
    until(lambda: workers.metric("octoai_ledger_behind_bytes") == 0, 5)
    journals = workers.books(lambda db: db.rows("SELECT journal FROM requests WHERE account = 'all'"))
    assert len(journals) == NUM_CONNECTIONS
    assert len(set(journals)) == 2, "each worker served some"


def test_fifty_at_once_on_a_budget_for_one_let_one_pass(workers: Workers) -> None:
    client = workers.client("poor", limits={"hard_budget_nanos": ONE + ONE // 2})
    slow = {"num_tokens": 20, "pace": 0.05}

    def one(connection: Connected) -> int:
        return connection.chat(Order(next(_numbers), **slow))[0]  # type: ignore[arg-type]

    assert Counter(at_once(workers.connections(client.text, 50), one)) == {200: 1, 402: 49}


def test_a_rate_is_exact_over_all(workers: Workers) -> None:
    client = workers.client("often", limits={"requests_per_minute": 10})
    answers = at_once(workers.connections(client.text, 30), lambda connection: connection.chat())
    assert Counter(status for status, _, _ in answers) == {200: 10, 429: 20}
    remaining = [int(headers["x-ratelimit-remaining-requests"]) for status, headers, _ in answers if status == 200]
    assert sorted(remaining) == list(range(10))


def test_one_key_is_one_request_wherever_it_comes_to(workers: Workers) -> None:
    client, order = workers.client("again"), Order(next(_numbers), num_tokens=10, pace=0.03)

    def one(connection: Connected) -> tuple[int, str, bytes]:
        status, headers, body = connection.chat(order, idempotency_key="the-same")
        return status, headers["x-request-id"], body

    assert len(set(at_once(workers.connections(client.text), one))) == 1
    until(lambda: workers.metric("octoai_ledger_behind_bytes") == 0, 5)
    row = workers.books(
        lambda db: db.row("SELECT COUNT(*), SUM(completion_tokens) FROM requests WHERE account='again'")
    )
    assert row == (1, 10)


def test_a_revoked_token_is_refused_by_all_within_a_second(workers: Workers) -> None:
    client = workers.client("gone")
    connections = workers.connections(client.text)
    assert {connection.chat()[0] for connection in connections} == {200}
    admin = Connected(workers, workers.service.token)
    assert admin.asked("DELETE", f"/v1/admin/tokens/{client.id}")[0] == 200
    time.sleep(1)
    assert {connection.chat()[0] for connection in connections} == {401}


def test_a_worker_that_dies_is_started_again_and_no_counter_goes_back(workers: Workers) -> None:
    client, name = workers.client("alive"), "http_requests_total"
    at_once(workers.connections(client.text), lambda connection: connection.chat())
    before, pid = workers.metric(name), workers.service.workers()[0]
    os.kill(pid, signal.SIGKILL)
    for _ in range(20):
        with suppress(ConnectionError):  # the one that is dying had just accepted it
            assert workers.metric(name) >= before, "it is asked while one worker is missing"
    until(lambda: workers.metric("octoai_workers") == 2, 20)
    assert pid not in workers.service.workers()
    assert workers.metric("octoai_worker_restarts_total") == 1
    after = workers.metric(name)
    at_once(workers.connections(client.text), lambda connection: connection.chat())
    assert workers.metric(name) >= after + NUM_CONNECTIONS
    said = [json.loads(line) for line in workers.service.log.read_text().splitlines()]
    assert [line["message"] for line in said if line["logger"] == "octoai.supervisor"] == [
        f"worker 0 (process {pid}) ended with -9; another is started in 0.2 s"
    ]


def test_the_ledger_is_whole_after_all_that(workers: Workers) -> None:
    ledger_verifies(workers.service)


# ── however it ends ──


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
    "signals", [(signal.SIGTERM,), (signal.SIGHUP, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)]
)
def test_a_signal_drains_all_even_where_all_are_sent_it(
    tmp_path: Path, engine: Upstream, signals: tuple[signal.Signals, ...], num_workers: str
) -> None:
    """As a service manager sends it to every process of a service; that a terminal closes, each is told twice, or by
    that and by the end of its session."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it is ignored, by what we start as well
    service = serve(tmp_path, engine, "--workers", num_workers)
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
    tmp_path: Path, engine: Upstream, num_workers: str
) -> None:
    service = serve(tmp_path, engine, "--workers", num_workers)
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


def test_a_terminal_that_closes_is_no_matter_where_that_signal_is_ignored(tmp_path: Path, engine: Upstream) -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        service = serve(tmp_path, engine)
    finally:
        signal.signal(signal.SIGHUP, before)
    service.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    target, told = Target(service.url, service.token, MODEL), Told(next(_numbers), "stream")
    run(ask(target, Request(Order(told.number, num_tokens=2)), told))
    assert told.is_finished
    assert service.stop() == 0


def test_a_signal_drains_where_nobody_reads_what_is_said(tmp_path: Path, engine: Upstream) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    service = serve(tmp_path, engine)
    target, told = Target(service.url, service.token, MODEL), Told(next(_numbers), "stream")
    request = Request(Order(told.number, num_tokens=20, pace=0.05))
    asking = threading.Thread(target=lambda: run(ask(target, request, told)))
    asking.start()
    until(lambda: told.num_seen > 0, 10)
    assert service.stop() == 0
    asking.join(20)
    assert told.is_finished


def test_a_worker_that_hangs_is_killed_and_another_serves(tmp_path: Path, engine: Upstream) -> None:
    service = serve(tmp_path, engine, "--workers", "2", settings="worker_stall_seconds = 2")
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


def test_a_signal_ends_all_even_where_one_hangs_in_its_start(tmp_path: Path, engine: Upstream) -> None:
    service = serve(tmp_path, engine, "--workers", "2", settings="worker_stall_seconds = 1")
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
def test_a_second_signal_ends_all_at_once(tmp_path: Path, engine: Upstream) -> None:
    service = serve(tmp_path, engine, "--workers", "2")
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


# ── what cannot be ──

FAR = '[[models]]\nid = "far"\nengine_url = "http://127.0.0.1:9/v1"\n'


@pytest.mark.parametrize(
    ("given", "config", "said"),
    [
        ("2", "", r"workers: 2 processes cannot share the engine of 'smollm2-135m-instruct'.*give the model an engine"),
        ("0", FAR, r"workers: input should be greater than or equal to 1, not '0'"),
        ("x", FAR, r"workers: input should be a valid integer.* not 'x'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path, given: str, config: str, said: str) -> None:
    (tmp_path / "octoai.toml").write_text(config)
    service = Serve(tmp_path, "--workers", given, wait=False)
    assert service.stop(signal.SIGCONT) == 1  # which does nothing
    (line,) = service.log.read_text().splitlines()
    assert re.match(r"octoai: .*" + said, line), line


@pytest.mark.slow
def test_a_port_that_another_service_has_is_refused_to_several_as_to_one(tmp_path: Path, engine: Upstream) -> None:
    first = serve(tmp_path / "first", engine, "--workers", "2")
    port = first.url.rsplit(":", 1)[1]
    second = serve(tmp_path / "second", engine, "--workers", "2", "--port", port, wait=False)
    assert second.stop(signal.SIGCONT) == 1
    assert "it is in use" in second.log.read_text()
    assert first.stop() == 0


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_start_in_one_line(tmp_path: Path, engine: Upstream) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "journal").write_text("in the way")
    service = serve(tmp_path, engine, "--workers", "2", wait=False)
    assert service.stop(signal.SIGCONT) == 1
    (line,) = service.log.read_text().splitlines()
    assert line.startswith("octoai: cannot write a journal in ")
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, stdout=subprocess.DEVNULL).returncode == 1


def test_a_worker_that_meets_what_nobody_thought_of_says_so_and_ends(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "log").open("wb") as log:
        inherited = (theirs.fileno(), listener.fileno())
        command = [sys.executable, "-m", "octoai.server.worker", *map(str, inherited)]
        worker = subprocess.Popen(command, pass_fds=inherited, stderr=log)
        theirs.close()
        try:
            with ours.makefile("rw") as said:
                print(json.dumps({"kind": "serve", "settings": {"workers": "nonsense"}}), file=said, flush=True)
                last = json.loads(said.readline())
            assert worker.wait(10) == 1
        finally:
            worker.kill()
            worker.wait()
    assert last == {"kind": "failed", "reason": "a fault of ours, which the log has: ValidationError"}
    assert "Traceback" in (tmp_path / "log").read_text()


def test_they_serve_what_lies_in_a_directory_whose_name_is_not_unicode(tmp_path: Path, engine: Upstream) -> None:
    data_dir = tmp_path / os.fsdecode(b"data\xff")
    service = serve(tmp_path, engine, "--workers", "2", "--data-dir", str(data_dir))
    assert (data_dir / "octoai.db").exists()
    assert service.stop() == 0


@pytest.mark.slow
def test_by_default_one_process_serves_alone(tmp_path: Path, engine: Upstream) -> None:
    service = serve(tmp_path, engine)
    assert service.workers() == []
    assert service.stop() == 0


# ── leases ──


def test_requests_of_a_living_neighbour_are_not_taken_for_lost(tmp_path: Path) -> None:
    """However late its signs of life come into the database."""
    place = Place(tmp_path)

    async def main() -> None:
        with closing(connect(place)) as db, db.transaction():
            accounts.ensure_default(db)
            neighbour = open_journal(place)
            intent = settlement(1) | {"kind": "intent", "journal": neighbour.instance, "lease_us": 1}
            requests.apply(db, [intent], 1)
        books = Books(place, open_journal(place))
        books.start()
        await books.write(books._order)
        assert [row.status for row in await books.read(lambda db: requests.expired(db, 2**62))] == ["open"]
        neighbour.close()
        await books.write(books._order)
        assert await books.read(lambda db: requests.expired(db, 2**62)) == []
        await books.close()

    run(main())


def test_while_the_database_is_away_each_gives_out_its_part_of_what_is_left(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with closing(connect(place)) as db, db.transaction():
        account = accounts.create(db, "acme", plan="unlimited", limits={"hard_budget_nanos": 7 * ONE})
        minted = tokens.mint(db, "acme", "acme")
        caller = accounts.Caller(account, tokens.find(db, minted.id))
        held = standings(db, caller, 1)
    now = {"at_us": 1, "lease_us": 2, "nanos": ONE, "prompt_tokens": 7, "completion_tokens": 20}
    wanted = Reservation(id="1", account=account.id, token_id=minted.id, **now)
    passed = 0
    for _ in range(3):
        remaining = Remaining(num_processes=3)
        remaining.heard(caller, held)
        with suppress(OutOfCredit):
            while True:
                remaining.hold(caller, wanted)
                passed += 1
    assert passed == 6  # two each: no more than there are
