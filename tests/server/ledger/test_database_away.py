"""PostgreSQL that is stopped, killed or frozen under load, and services that share one."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from octoai.server import accounts, tokens
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.store import Place
from octoai.server.tokens import new_token
from tests.asking import Client
from tests.load.accounts import Books
from tests.load.clients import Load, Request
from tests.load.crashes import Crashes
from tests.load.places import serve
from tests.load.upstream import Order, Upstream
from tests.postgres import PostgresServer
from tests.running import InProcess, Serve
from tests.talking import ask, request, until

PATH = "/v1/chat/completions"
Start = Callable[..., Crashes]


@pytest.fixture
def serving(postgres_url: str, upstream: Upstream, tmp_path: Path) -> Iterator[Start]:
    """A service on a database of its own, under load."""
    running: list[Crashes] = []

    def start(**settings: Any) -> Crashes:
        said = {"database": postgres_url, **settings}
        lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in said.items())
        running.append(Crashes(tmp_path / f"place{len(running)}", upstream, settings=lines, num_clients=8))
        return running[-1]

    yield start
    for each in running:
        each.close()


@contextmanager
def stopped(server: PostgresServer, mode: str = "fast") -> Iterator[None]:
    server.stop(mode)
    try:
        yield
    finally:
        server.start()


@contextmanager
def paused(server: PostgresServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


AWAY: dict[str, Callable[[PostgresServer], Any]] = {
    "stopped": stopped,
    "killed": lambda server: stopped(server, "immediate"),
    "frozen": paused,
}


def finish(crashes: Crashes, load: Load, place: Place) -> None:
    """Everything that a client got a byte of is in the ledger, once and exact."""
    crashes.told += load.stop()
    until(lambda: all(row.status != "open" for row in Books.read(place).rows), 20)
    found = crashes.findings(place, num_others=2)
    assert found.problems == []
    assert found.num_interrupted == 0
    ran = crashes.service.run("ledger", "verify")
    assert ran.returncode == 0, ran.stderr


def asked(service: Serve, token: str | None = None) -> tuple[int, str | None, float]:
    """Status and code of an answer, and the seconds it took."""
    client, began = Client(service), time.monotonic()
    if token is not None:
        client.headers["authorization"] = f"Bearer {token}"
    status, _, text = client.send(PATH, Request(Order(10**6, num_tokens=1), stream=False).body("counted"))
    return status, json.loads(text).get("code"), time.monotonic() - began


def go_away_under_load(crashes: Crashes, away: Any, place: Place, seconds: float) -> None:
    load = crashes.load()
    time.sleep(1.5)
    with away:
        time.sleep(1.0)
        before = len([each for each in load.told if each.is_finished])
        known, unknown, made_up = asked(crashes.service), asked(crashes.service, new_token()), new_token()[:-1] + "!"
        assert known[0] == 200, known
        assert known[2] < 2, "a known token does not wait for the database"
        assert unknown[:2] == (503, "database_away"), unknown
        assert asked(crashes.service, made_up)[0] == 401
        time.sleep(seconds)
        after = len([each for each in load.told if each.is_finished])
        assert after - before > 4 * seconds, "requests go on"
    time.sleep(1.5)
    assert asked(crashes.service)[0] == 200
    until(lambda: asked(crashes.service, new_token())[0] == 401, 15)
    finish(crashes, load, place)


@pytest.mark.parametrize(
    "how", [how if how == "stopped" else pytest.param(how, marks=pytest.mark.slow) for how in AWAY]
)
def test_nothing_is_lost_while_the_database_is_away(
    serving: Start, postgres_server: PostgresServer, postgres_url: str, how: str
) -> None:
    crashes = serving()
    place = Place(crashes.service.data_dir, postgres_url)
    go_away_under_load(crashes, AWAY[how](postgres_server), place, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", AWAY)
def test_nothing_is_lost_in_thirty_seconds_without_the_database(
    serving: Start, postgres_server: PostgresServer, postgres_url: str, how: str
) -> None:
    crashes = serving()
    place = Place(crashes.service.data_dir, postgres_url)
    go_away_under_load(crashes, AWAY[how](postgres_server), place, 30)


@pytest.mark.slow
def test_killed_while_the_database_is_away_it_brings_everything_in_later(
    serving: Start, postgres_server: PostgresServer, postgres_url: str
) -> None:
    crashes = serving()
    place = Place(crashes.service.data_dir, postgres_url)
    load = crashes.load()
    time.sleep(1)
    with stopped(postgres_server):
        time.sleep(2)
        crashes.kill(load)
    crashes.service = crashes.started()
    found = crashes.findings(place)
    assert found.problems == []
    assert found.num_finished > 20


@pytest.mark.slow
def test_stopped_while_the_database_is_away_it_keeps_its_journal_for_the_next_start(
    serving: Start, postgres_server: PostgresServer, postgres_url: str
) -> None:
    crashes = serving()
    place = Place(crashes.service.data_dir, postgres_url)
    with stopped(postgres_server):
        time.sleep(0.5)
        load = crashes.load(total=40)
        crashes.told += load.join()
        assert crashes.service.stop() == 0
        assert any((crashes.service.data_dir / "journal").glob("*.journal"))
    crashes.service = crashes.started()
    found = crashes.findings(place)
    assert found.problems == []
    assert found.num_requests > 20
    assert found.num_interrupted == 0


@pytest.mark.parametrize("how", ["stopped", pytest.param("frozen", marks=pytest.mark.slow)])
def test_known_tokens_are_refused_as_well_where_the_operator_says_so(
    serving: Start, postgres_server: PostgresServer, how: str
) -> None:
    crashes = serving(when_database_is_away="refuse")
    assert asked(crashes.service)[0] == 200
    with AWAY[how](postgres_server):
        until(lambda: asked(crashes.service)[:2] == (503, "database_away"), 6)
    until(lambda: asked(crashes.service)[0] == 200, 10)


@pytest.mark.parametrize("settings", [{"database_away_seconds": 0.5}, {"when_database_is_away": "refuse"}])
def test_readiness_says_so_where_everybody_is_refused_because_nobody_can_tell_who_asks(
    in_process: Callable[..., InProcess], postgres_server: PostgresServer, postgres_url: str, settings: dict[str, Any]
) -> None:
    service = in_process(ScriptedEngine(), url=postgres_url, ledger="off", **settings)
    assert ask(service, "/health/ready")[0] == 200
    with stopped(postgres_server):
        until(lambda: ask(service, PATH, request(service))[0] == 503, 5)
        status, _, text = ask(service, "/health/ready")
        said = json.loads(text)
        assert (status, said["status"], said["ledger"]) == (503, "not ready", "database_away")
    until(lambda: ask(service, "/health/ready")[0] == 200, 10)
    assert ask(service, PATH, request(service))[0] == 200


@pytest.mark.slow
def test_known_tokens_are_refused_after_the_time_that_was_configured(
    serving: Start, postgres_server: PostgresServer
) -> None:
    crashes = serving(database_away_seconds=2)
    assert asked(crashes.service)[0] == 200
    with stopped(postgres_server):
        assert asked(crashes.service)[0] == 200
        until(lambda: asked(crashes.service)[:2] == (503, "database_away"), 6)
    until(lambda: asked(crashes.service)[0] == 200, 10)


@pytest.mark.slow
def test_a_service_that_starts_before_its_database_waits_for_it(
    serving: Start, postgres_server: PostgresServer
) -> None:
    crashes = serving()
    crashes.service.stop()
    with stopped(postgres_server):
        crashes.service = serve(crashes.place, crashes.upstream, settings=crashes.settings, wait=False)
        until(lambda: "waiting for it" in crashes.service.log.read_text(), 20)
        assert crashes.service.process.poll() is None
    until(lambda: bool(crashes.service.url), 20)
    assert asked(crashes.service)[0] == 200


@pytest.mark.slow
def test_a_service_that_starts_before_its_database_can_be_stopped(
    serving: Start, postgres_server: PostgresServer
) -> None:
    crashes = serving()
    crashes.service.stop()
    with stopped(postgres_server):
        crashes.service = serve(crashes.place, crashes.upstream, settings=crashes.settings, wait=False)
        until(lambda: "waiting for it" in crashes.service.log.read_text(), 20)
        crashes.service.stop(signal.SIGTERM, seconds=5)


# Services that share a database


@pytest.fixture
def two(postgres_url: str, tmp_path: Path) -> Iterator[tuple[InProcess, InProcess]]:
    engines = [ScriptedEngine(("a ", 0.1, "b "), num_slots=64) for _ in range(2)]
    both = [InProcess(engine, tmp_path / f"data{at}", url=postgres_url) for at, engine in enumerate(engines)]
    yield both[0], both[1]
    for each in both:
        each.close()


def over_both(two: tuple[InProcess, InProcess], token: str, number: int, **params: Any) -> Counter[int]:
    headers = {"authorization": f"Bearer {token}"}
    for each in two:
        until(lambda each=each: ask(each, "/v1/models", **headers)[0] == 200, 2)
    start = threading.Barrier(number)

    def once(at: int) -> int:
        service = two[at % 2]
        start.wait()
        return ask(service, PATH, request(service, **params), **headers)[0]

    with ThreadPoolExecutor(number) as threads:
        return Counter(threads.map(once, range(number)))


def test_a_token_revoked_at_one_is_refused_by_the_other_within_a_second(two: tuple[InProcess, InProcess]) -> None:
    one, other = two
    minted = one.mint("shared")
    headers = {"authorization": f"Bearer {minted.text}"}
    assert [ask(each, "/v1/models", **headers)[0] for each in two] == [200, 200]
    one.books(lambda db: tokens.revoke(db, minted.id))
    began = time.monotonic()
    until(lambda: ask(other, "/v1/models", **headers)[0] == 401, 1.5)
    assert time.monotonic() - began < 1


def test_ten_a_minute_are_ten_over_both(two: tuple[InProcess, InProcess]) -> None:
    two[0].books(lambda db: accounts.create(db, "acme", plan="free"))
    token = two[0].mint("acme", "acme").text
    assert over_both(two, token, 30) == {200: 10, 429: 20}


@pytest.mark.parametrize("kind", ["prepaid", "account", "token"])
def test_of_fifty_at_once_on_a_budget_for_one_exactly_one_is_served_by_either(
    two: tuple[InProcess, InProcess], kind: str
) -> None:
    one = (2 + 50) * 20
    budget = {"hard_budget_nanos": one}
    limits = budget if kind == "account" else None

    def prepare(db: Any) -> None:
        accounts.create(db, "acme", plan="unlimited", is_prepaid=kind == "prepaid", limits=limits)
        if kind == "prepaid":
            accounts.credit(db, "acme", one)

    two[0].books(prepare)
    token = two[0].mint("acme", "acme", limits=budget if kind == "token" else None).text
    assert over_both(two, token, 50, max_tokens=50) == {200: 1, 402: 49}


def test_a_key_is_answered_once_by_both(two: tuple[InProcess, InProcess]) -> None:
    one, other = two
    first = ask(one, PATH, request(one), idempotency_key="k1")
    again = ask(other, PATH, request(other), idempotency_key="k1")
    assert (first[0], again[0]) == (200, 200)
    assert again[1]["idempotent-replayed"] == "true"
    assert again[2] == first[2]
    assert len(Books.read(one.place).rows) == 1


def test_the_same_key_at_both_at_once_is_one_request(two: tuple[InProcess, InProcess]) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda at: ask(two[at % 2], PATH, request(two[at % 2]), idempotency_key="k1"), range(8))
        )
    assert {status for status, _, _ in answers} == {200}
    assert len({text for _, _, text in answers}) == 1
    rows = Books.read(two[0].place).rows
    assert [row.status for row in rows] == ["settled"]
