"""`octoai serve --workers`: several processes on one port are one service, whatever becomes of any of them."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from octoai.server import accounts, tokens
from octoai.server.errors import OutOfCredit
from octoai.server.ledger.books import Books, open_journal
from octoai.server.ledger.remaining import Remaining
from octoai.server.limits import Standings, standings
from octoai.server.store import Connection, Place, connect, requests
from octoai.server.store.reservations import Reservation
from tests.load.clients import Target
from tests.load.places import serve
from tests.load.upstream import MODEL, Order, Upstream
from tests.running import ledger_verifies
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
        await books.write(books._order)  # what it used is in its journal, which is brought in first
        assert [row.status for row in await books.read(lambda db: requests.expired(db, 2**62))] == ["open"]
        await books._recover()
        assert await books.read(lambda db: requests.expired(db, 2**62)) == []
        await books.close()

    run(main())


@pytest.fixture
def limited(tmp_path: Path) -> tuple[accounts.Caller, Standings]:
    """A caller who may spend seven times `ONE`, and how the database says that it stands."""
    with closing(connect(Place(tmp_path))) as db, db.transaction():
        account = accounts.create(db, "acme", plan="unlimited", limits={"hard_budget_nanos": 7 * ONE})
        token = tokens.find(db, tokens.mint(db, "acme", "acme").id)
        assert token is not None
        caller = accounts.Caller(account, token)
        return caller, standings(db, caller, 1)


def wanted(caller: accounts.Caller, id_: str) -> Reservation:
    now = {"at_us": 1, "lease_us": 2, "nanos": ONE, "prompt_tokens": 7, "completion_tokens": 20}
    return Reservation(id=id_, account=caller.account.id, token_id=caller.token.id, **now)


def test_while_the_database_is_away_each_gives_out_its_part_of_what_is_left(
    limited: tuple[accounts.Caller, Standings],
) -> None:
    caller, held = limited
    passed = 0
    for _ in range(3):
        remaining = Remaining(num_processes=3)
        remaining.heard(caller, held)
        with suppress(OutOfCredit):
            while True:
                remaining.hold(caller, wanted(caller, "1"))
                passed += 1
    assert passed == 6  # two each: no more than there are


def test_what_was_not_used_is_there_again_also_where_the_database_was_told_of_it_and_has_not_answered(
    limited: tuple[accounts.Caller, Standings],
) -> None:
    caller, held = limited
    remaining = Remaining(num_processes=3)
    remaining.heard(caller, held)
    for number in range(20):
        one = wanted(caller, str(number))
        remaining.hold(caller, one)
        assert remaining.told() == [one]
        remaining.release(one)
    both = [wanted(caller, id_) for id_ in ("a", "b")]
    for each in both:
        remaining.hold(caller, each)
    assert len(remaining.told()) == 2
    remaining.heard(caller, held)  # it has answered: of both it holds everybody's part
    remaining.release(both[0], ONE)
    with pytest.raises(OutOfCredit):
        for number in range(2):
            remaining.hold(caller, wanted(caller, f"c{number}"))
