"""Credit, budgets and rates over a real socket: what is let through, what is refused and how, and what stays held."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from octoai.server import accounts, admission, app, tokens
from octoai.server.accounts import Caller
from octoai.server.billing.money import Price, nanos
from octoai.server.engines.base import Event, Generation
from octoai.server.engines.scripted import ScriptedEngine, Step
from octoai.server.errors import BadRequest, EngineFailed, OutOfCredit
from octoai.server.journal import START
from octoai.server.ledger import holding, ledger
from octoai.server.ledger.remaining import Remaining
from octoai.server.limits import Standings
from octoai.server.params import generations
from octoai.server.store import Connection, Place, connect, entries, keys, rates, reservations, sqlite, writer
from octoai.server.store.reservations import Reservation, Standing
from octoai.server.times import now_us
from tests.running import InProcess, Start
from tests.server.settling import process_of
from tests.talking import MESSAGES, Talk, ask, is_idle, request, until

Answer = tuple[int, dict[str, str], bytes]
PATH = "/v1/chat/completions"
PRICE = 20  # nano-dollars a token of the model that is served, either way
ONE = (2 + 50) * PRICE  # what a request for 50 tokens may come to
SLOW: Sequence[Step] = tuple(step for _ in range(400) for step in ("word ", 0.01))


class Client:
    """An account with limits, and a token of it."""

    def __init__(
        self,
        service: InProcess,
        *,
        credit: int | None = None,
        limits: Mapping[str, int | None] | None = None,
        token_limits: Mapping[str, int | None] | None = None,
        plan: str = "unlimited",
    ) -> None:
        self.service = service
        service.books(lambda db: accounts.create(db, "acme", plan=plan, is_prepaid=credit is not None, limits=limits))
        if credit:
            service.books(lambda db: accounts.credit(db, "acme", credit))
        self.minted = service.mint("acme", "acme", limits=token_limits)
        self.headers = {"authorization": f"Bearer {self.minted.text}"}
        assert self.models()[0] == 200  # known from here on

    def ask(self, max_tokens: int = 50, **params: Any) -> Answer:
        return ask(self.service, PATH, request(self.service, max_tokens=max_tokens, **params), **self.headers)

    def stream(self) -> Talk:
        talk = Talk(self.service)
        talk.authorization = f"authorization: {self.headers['authorization']}\r\n"
        talk.send(PATH, request(self.service, max_tokens=50, stream=True))
        return talk

    def models(self) -> Answer:
        return ask(self.service, "/v1/models", **self.headers)

    def at_once(self, number: int, **params: Any) -> list[Answer]:
        answers: list[Answer] = []
        asking = [threading.Thread(target=lambda: answers.append(self.ask(**params))) for _ in range(number)]
        for each in asking:
            each.start()
        for each in asking:
            each.join()
        return answers

    def held(self) -> tuple[int, int]:
        """Requests that hold something, and nano-dollars that they hold."""
        row = self.service.read(
            lambda db: db.row("SELECT COUNT(*), COALESCE(SUM(nanos), 0) FROM reservations WHERE is_open = 1")
        )
        assert row is not None
        return int(row[0]), int(row[1])

    def balance(self) -> int:
        return self.service.read(lambda db: entries.balance_nanos(db, "acme"))

    def age(self, seconds: float) -> None:
        """Let what was asked until now be so much longer ago."""
        microseconds = int(seconds * 1_000_000)
        self.service.read(lambda db: None)
        self.service.books(lambda db: _age(db, microseconds))


def _age(db: Connection, microseconds: int) -> None:
    db.execute("UPDATE reservations SET at_us = at_us - ?", (microseconds,))
    db.execute("DELETE FROM rates")
    for row in db.rows("SELECT account, token_id, at_us, prompt_tokens, completion_tokens FROM reservations"):
        rates.add(db, row[:2], *row[2:])


class Uncounting(ScriptedEngine):
    """Cannot tell beforehand how many tokens a prompt has; afterwards it says so many."""

    def __init__(self, num_prompt: int, *, context_length: int = 131_072) -> None:
        super().__init__(("a ", 0.3, "b "), num_slots=20, context_length=context_length)
        self.num_prompt = num_prompt

    async def count_tokens(self, generation: Generation) -> int | None:
        return None

    async def _play(self, generation: Generation, prompt_tokens: int) -> AsyncGenerator[Sequence[Event]]:
        async for batch in super()._play(generation, self.num_prompt):
            yield batch


def codes(answers: Sequence[Answer]) -> Counter[int]:
    return Counter(status for status, _, _ in answers)


# Money

BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "prepaid credit": {"credit": ONE},
    "a hard budget of the account": {"limits": {"hard_budget_nanos": ONE}},
    "a hard budget of the token": {"token_limits": {"hard_budget_nanos": ONE}},
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("script", [("a ", 0.2, "b "), ("a ", "b ")], ids=["while it runs", "also when it has ended"])
def test_of_fifty_requests_at_once_on_a_budget_for_one_exactly_one_is_served(
    in_process: Start, budget: Mapping[str, Any], script: Sequence[Step]
) -> None:
    service = in_process(ScriptedEngine(script))
    client = Client(service, **budget)
    answers = client.at_once(50)
    assert codes(answers) == {200: 1, 402: 49}
    for status, headers, text in answers:
        if status == 402:
            said = json.loads(text)
            assert (said["code"], said["type"]) == ("insufficient_quota", "insufficient_quota")
            assert headers["x-should-retry"] == "false"
            assert "retry-after" not in headers
    assert client.held() == (0, 0)
    assert len(service.engine.seen) == 1


def test_what_was_not_used_can_be_spent_by_the_next(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine()), credit=2 * ONE)  # five of the 50 tokens are generated
    answers = [client.ask() for _ in range(20)]
    num_served = codes(answers)[200]
    assert [status for status, _, _ in answers] == [200] * num_served + [402] * (20 - num_served)
    each = (2 + 5) * PRICE
    assert client.balance() == 2 * ONE - num_served * each
    assert ONE - each <= client.balance() < ONE
    assert client.ask(max_tokens=5)[0] == 200


def test_the_answer_says_what_the_ledger_took(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine()), credit=ONE)
    _, headers, text = client.ask()
    assert type(json.loads(text)["usage"]["cost"]) is float  # LiteLLM and OpenRouter's clients read a number
    (digits,) = re.findall(r'"cost":([-.0-9]+)[,}]', text.decode())
    assert digits == headers["x-octoai-cost"]
    assert nanos(digits) == 7 * PRICE
    assert client.balance() == ONE - 7 * PRICE


@pytest.mark.parametrize(("error", "status"), [(EngineFailed("It broke."), 502), (BadRequest("not this"), 400)])
def test_nothing_stays_held_after_a_failure(in_process: Start, error: Exception, status: int) -> None:
    client = Client(in_process(ScriptedEngine((error,))), credit=ONE)
    assert [client.ask()[0] for _ in range(3)] == [status] * 3
    assert client.held() == (0, 0)
    assert client.balance() == ONE


def test_nothing_stays_held_after_a_stream_that_failed(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine(("a ", EngineFailed("It broke.")))), credit=ONE)
    talk = client.stream()
    assert b"engine_failed" in talk.rest()
    talk.close()
    until(lambda: client.held() == (0, 0), 2)
    assert client.balance() == ONE - 3 * PRICE


def test_nothing_stays_held_of_a_client_that_left_the_queue(in_process: Start) -> None:
    service = in_process(ScriptedEngine(SLOW, num_slots=1))
    client = Client(service, credit=10 * ONE)
    waiting = [client.stream() for _ in range(5)]
    until(lambda: service.queue.num_waiting == 4, 3)
    assert client.held() == (5, 5 * ONE)
    for each in waiting:
        each.close()
    until(lambda: client.held() == (0, 0) and is_idle(service), 3)
    assert client.balance() > 9 * ONE


def test_nothing_stays_held_of_clients_that_leave_at_any_moment(in_process: Start) -> None:
    service = in_process(ScriptedEngine(SLOW, num_slots=2))
    client = Client(service, credit=100 * ONE)
    raw = json.dumps(request(service, max_tokens=50, stream=True)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: {client.headers['authorization']}\r\n"
    for number in range(40):
        with socket.create_connection(("127.0.0.1", service.port)) as leaving:
            leaving.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
            time.sleep(number * 0.0007)
    until(lambda: is_idle(service), 3)
    until(lambda: client.held() == (0, 0), 3)


def test_what_waits_longer_than_a_lease_for_its_turn_holds_what_it_reserved(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LEASE_US", 1_000_000)
    monkeypatch.setattr(ledger, "LEASE_US", 1_000_000)
    monkeypatch.setattr(ledger, "RENEW_SECONDS", 0.2)
    service = in_process(ScriptedEngine(SLOW[:400], num_slots=1))
    client = Client(service, credit=ONE, limits={"concurrent_requests": 1})
    other = threading.Thread(target=ask, args=(service, PATH, request(service)))
    other.start()
    until(lambda: service.queue.num_running == 1, 2)
    waiting = client.stream()
    until(lambda: service.queue.num_waiting == 1, 2)
    time.sleep(1.7)
    assert client.ask()[0] == 402
    waiting.close()
    other.join()
    until(lambda: client.held() == (0, 0), 3)


def test_what_runs_while_the_database_hangs_for_longer_than_a_lease_holds_what_it_reserved(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signs of life are in the journal, and come in only after others have asked for what it holds."""
    monkeypatch.setattr(app, "over", partial(app.over, is_beside=True))
    monkeypatch.setattr(writer, "HANG_SECONDS", 0.3)
    monkeypatch.setattr(admission, "LEASE_US", 1_000_000)
    monkeypatch.setattr(ledger, "LEASE_US", 1_000_000)
    monkeypatch.setattr(ledger, "RENEW_SECONDS", 0.1)
    service = in_process(ScriptedEngine(("word ", 0.5) * 40))
    client, books = Client(service, limits={"concurrent_requests": 1}), service.service.admission.books
    began = client.stream()
    until(lambda: client.held()[0] == 1 and books.writer.applied > START, 5)
    applier = process_of(books).pid
    os.kill(applier, signal.SIGSTOP)
    with away(service):
        books.writer.later(lambda _: None)
        time.sleep(1.5)
    assert client.ask(1)[0] == 429
    os.kill(applier, signal.SIGCONT)
    assert client.held()[0] == 1
    began.close()
    until(lambda: client.held() == (0, 0), 5)


def test_what_is_not_used_while_the_database_is_away_can_be_used_again(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    service = in_process(ScriptedEngine(("a ",)))
    client = Client(service, credit=3 * ONE)
    assert client.ask()[0] == 200
    service.read(lambda db: None)
    lock = sqlite3.connect(service.settings.data_dir / "octoai.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    answers = [client.ask() for _ in range(10)]
    lock.execute("ROLLBACK")
    lock.close()
    assert codes(answers) == {200: 10}
    until(lambda: client.balance() == 3 * ONE - 11 * 3 * PRICE, 5)


@contextmanager
def away(service: InProcess) -> Iterator[None]:
    """Nobody else can write to its database; afterwards it has noticed that they can."""
    with closing(sqlite3.connect(service.settings.data_dir / "octoai.db", isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        yield
        lock.execute("ROLLBACK")
    until(lambda: service.service.admission.ledger.writer.away_seconds is None, 15)


@pytest.mark.parametrize("waits", [False, True], ids=["it runs", "it waits for its turn"])
def test_what_began_while_the_database_was_away_is_held_when_it_is_back(
    in_process: Start, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    service = in_process(ScriptedEngine(("word ", 0.5) * 40, num_slots=1 if waits else 20))
    client = Client(service, credit=2 * ONE - 1, limits={"concurrent_requests": 1})
    assert client.ask(1)[0] == 200
    other = Talk(service)
    if waits:
        other.send(PATH, request(service, stream=True))
        until(lambda: service.queue.num_running == 1, 2)
    with away(service):
        began = client.stream()
        until(lambda: (service.queue.num_waiting if waits else service.queue.num_running) == 1, 5)
        time.sleep(0.5)
    assert client.ask()[0] == 402
    assert client.ask(1)[0] == 429
    assert client.held() == (1, ONE)
    began.close()
    other.close()
    until(lambda: client.held() == (0, 0), 5)
    assert client.balance() >= 0
    assert client.ask(1)[0] == 200


def test_what_waits_for_its_turn_is_held_when_the_database_is_back_though_nobody_asks(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others, that share it, would be promised the same."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    service = in_process(ScriptedEngine(("word ", 0.5) * 40, num_slots=1))
    client, other = Client(service, credit=2 * ONE - 1), Talk(service)
    assert client.ask(1)[0] == 200
    other.send(PATH, request(service, stream=True))
    until(lambda: service.queue.num_running == 1, 2)
    with away(service):
        waiting = client.stream()
        until(lambda: service.queue.num_waiting == 1, 5)
    until(lambda: client.held() == (1, ONE), 2)
    waiting.close()
    other.close()
    until(lambda: client.held() == (0, 0), 5)


def test_what_is_held_without_an_answer_of_the_database_is_given_back_by_who_is_refused_or_stopped(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "LIMIT_SECONDS", 0.3)
    service = in_process(ScriptedEngine())
    client = Client(service, credit=10 * ONE)
    hold, held = reservations.hold, list[str]()

    def noted(db: Connection, reservation: Reservation) -> None:
        held.append(reservation.id)
        hold(db, reservation)

    monkeypatch.setattr(reservations, "hold", noted)
    asked = generations.chat(json.dumps(request(service, max_tokens=50)).encode())
    caller = service.books(lambda db: Caller(accounts.find(db, "acme"), tokens.find(db, client.minted.id)))
    assert service.loop is not None
    with away(service):
        asking = asyncio.run_coroutine_threadsafe(service.service.admit(caller, asked, "req_1"), service.loop)
        time.sleep(0.1)
        asking.cancel()
        assert client.ask()[0] == 503  # of what is left nothing was heard
    until(lambda: len(held) == 1, 2)  # the first after all, and for nobody; the other was not asked for any more
    until(lambda: client.held() == (0, 0), 2)


def test_while_the_database_hangs_a_request_waits_for_it_only_once(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "LIMIT_SECONDS", 0.1)
    monkeypatch.setattr(ledger, "LIMIT_SECONDS", 3.0)
    client = Client(in_process(ScriptedEngine()), limits={"requests_per_minute": 10})
    assert client.ask()[0] == 200
    with away(client.service):
        began = time.monotonic()
        assert client.ask()[0] == 200
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "limits", [{"requests_per_minute": 10}, {"hard_budget_nanos": 10 * ONE}], ids=["rate", "budget"]
)
def test_a_database_that_does_not_answer_in_time_is_away_where_nobody_is_served_without_it(
    in_process: Start, monkeypatch: pytest.MonkeyPatch, limits: Mapping[str, int]
) -> None:
    monkeypatch.setattr(holding, "LIMIT_SECONDS", 0.3)
    service = in_process(ScriptedEngine(), when_database_is_away="refuse")
    client = Client(service, limits=limits)
    assert client.ask()[0] == 200
    with away(service):
        for _ in range(2):
            status, _, text = client.ask()
            assert (status, json.loads(text)["code"]) == (503, "database_away")
    assert len(service.engine.seen) == 1
    until(lambda: client.held() == (0, 0), 2)
    assert client.ask()[0] == 200


class Counting(ScriptedEngine):
    """Takes its time to count a prompt's tokens, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()
        self.goes_on.set()

    async def count_tokens(self, generation: Generation) -> int | None:
        while not self.goes_on.is_set():
            await asyncio.sleep(0.01)
        return await super().count_tokens(generation)


@pytest.mark.parametrize("serves", [False, True], ids=["refuse", "serve"])
def test_what_is_being_admitted_when_the_database_goes_away_is_refused_where_nothing_is_spent_without_it(
    in_process: Start, monkeypatch: pytest.MonkeyPatch, serves: bool
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    engine = Counting()
    service = in_process(engine, when_database_is_away="serve" if serves else "refuse")
    client = Client(service, limits={"prompt_tokens_per_minute": 1000})
    assert client.ask()[0] == 200
    books, answers = service.service.admission.ledger.writer, list[Answer]()
    engine.goes_on.clear()
    asking = threading.Thread(target=lambda: answers.append(client.ask()))
    asking.start()
    time.sleep(0.2)  # it is past the first look
    with away(service):
        books.later(lambda _: None)
        until(lambda: books.away_since is not None, 2)
        engine.goes_on.set()
        asking.join()
    assert codes(answers) == ({200: 1} if serves else {503: 1})
    assert len(engine.seen) == 1 + serves
    assert client.ask()[0] == 200


def test_a_database_that_is_known_to_hang_is_not_waited_for(in_process: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(writer, "HANG_SECONDS", 0.5)
    client = Client(in_process(ScriptedEngine()), credit=10 * ONE)
    books = client.service.service.admission.ledger.writer
    assert client.ask()[0] == 200
    with away(client.service):
        assert client.ask()[0] == 200
        until(lambda: books.away_seconds is not None, 2)
        began = time.monotonic()
        for number in range(3):
            body = request(client.service, max_tokens=50)
            assert ask(client.service, PATH, body, idempotency_key=f"k{number}", **client.headers)[0] == 200
        assert time.monotonic() - began < 2
    until(lambda: client.balance() == 10 * ONE - 5 * 7 * PRICE, 5)


def test_who_is_refused_while_the_database_hangs_leaves_nothing_to_be_done_when_it_is_back(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "HANG_SECONDS", 0.3)
    client, release, released = Client(in_process(ScriptedEngine()), credit=ONE // 2), keys.release, list[str]()

    def noted(db: Connection, account: str, key: str, request: str) -> None:
        released.append(key)
        release(db, account, key, request)

    monkeypatch.setattr(keys, "release", noted)
    books, asked = client.service.service.admission.ledger.writer, request(client.service, max_tokens=50)
    keyed = [{"idempotency_key": f"k{number}", **client.headers} for number in range(4)]
    assert ask(client.service, PATH, asked, **keyed[0])[0] == 402
    with away(client.service):
        books.later(lambda _: None)
        until(lambda: books.away_seconds is not None, 2)
        assert [ask(client.service, PATH, asked, **each)[0] for each in keyed[1:]] == [402] * 3
    assert ask(client.service, PATH, asked, **keyed[0])[0] == 402
    client.service.read(lambda db: None)
    assert released == ["k0", "k0"]  # it was claimed


HELD_ALONE = [{"limits": {"concurrent_requests": 1}}, {"credit": 2 * ONE - 1}]  # what one more has no room beside


@pytest.mark.parametrize("budget", HELD_ALONE, ids=["a place", "credit"])
@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "not yet noticed"])
def test_what_ended_while_the_database_hung_is_not_held_against_the_next(
    in_process: Start, monkeypatch: pytest.MonkeyPatch, budget: Mapping[str, Any], is_noticed: bool
) -> None:
    monkeypatch.setattr(app, "over", partial(app.over, is_beside=True))
    monkeypatch.setattr(writer, "HANG_SECONDS", 0.3)
    monkeypatch.setattr(ledger, "LIMIT_SECONDS", 0.2)
    service = in_process(ScriptedEngine(SLOW))
    client, admitting = Client(service, **budget), service.service.admission
    began = client.stream()
    until(lambda: client.held()[0] == 1, 5)
    with away(service):
        admitting.ledger.writer.later(lambda _: None)
        if is_noticed:
            until(lambda: admitting.ledger.writer.away_seconds is not None, 2)
        began.close()
        until(lambda: is_idle(service), 2)
        applier = process_of(admitting.books).pid
        os.kill(applier, signal.SIGSTOP)  # it has much to bring in before that
    threading.Timer(0.3, os.kill, (applier, signal.SIGCONT)).start()
    assert client.ask()[0] == 200
    assert client.held() == (0, 0)


@contextmanager
def unheard_of(client: Client, began: Talk) -> Iterator[None]:
    """It ends, and that is not brought in before the end."""
    admitting = client.service.service.admission
    until(lambda: client.held()[0] == 1 and admitting.ledger.writer.applied > START, 5)
    applier = process_of(admitting.books).pid
    os.kill(applier, signal.SIGSTOP)
    began.close()
    until(lambda: "acme" in admitting.ledger.holding._ended, 5)
    yield
    os.kill(applier, signal.SIGCONT)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An applier in a process of its own, that is not waited for for long."""
    monkeypatch.setattr(app, "over", partial(app.over, is_beside=True))
    monkeypatch.setattr(ledger, "LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(holding, "LIMIT_SECONDS", 0.6)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("is_token", [False, True], ids=["credit", "a budget of the token"])
def test_money_that_the_database_says_is_gone_is_not_spent_though_it_does_not_have_all_that_ended(
    in_process: Start, is_token: bool
) -> None:
    service, budget = in_process(ScriptedEngine(SLOW)), 100 * ONE
    client = Client(service, token_limits={"hard_budget_nanos": budget}) if is_token else Client(service, credit=budget)

    def spent_elsewhere(db: Connection) -> None:
        entries.post(db, [entries.Entry(now_us(), "acme", "charge", ONE - 1 - budget, client.minted.id)])

    with unheard_of(client, client.stream()):
        service.books(spent_elsewhere)
        assert client.ask()[0] == 402
        assert client.ask(1)[0] == 200  # there is as much, where what ended came to little
    assert client.ask()[0] == 402


@pytest.mark.usefixtures("impatient")
def test_a_rate_holds_where_money_would_have_to_be_counted_without_the_database(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine(SLOW)), credit=2 * ONE - 1, limits={"requests_per_minute": 1})
    with unheard_of(client, client.stream()):
        assert client.ask()[0] == 429
    assert len(client.service.engine.seen) == 1


def test_what_the_database_has_refused_is_not_served_once_that_is_away(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    service = in_process(ScriptedEngine())
    client = Client(service, credit=100 * ONE)
    assert client.ask()[0] == 200
    service.read(lambda db: None)
    service.books(lambda db: accounts.credit(db, "acme", -100 * ONE, note="taken back", kind="adjustment"))
    assert client.ask()[0] == 402
    with away(service):
        assert codes([client.ask() for _ in range(5)]) == {402: 5}
    assert client.balance() == -7 * PRICE


def test_what_costs_nothing_is_not_refused_to_who_owes_something_while_the_database_is_away(caller: Caller) -> None:
    remaining = Remaining()
    remaining.heard(caller, left(caller, -5))
    remaining.hold(caller, replace(reservation(caller), nanos=0))
    with pytest.raises(OutOfCredit):
        remaining.hold(caller, replace(reservation(caller, "2"), nanos=1))


def test_what_was_used_while_the_database_is_away_is_gone(caller: Caller) -> None:
    remaining, wanted = Remaining(), reservation(caller)
    remaining.heard(caller, left(caller, 2 * ONE))
    remaining.hold(caller, wanted)
    remaining.hold(caller, reservation(caller, "2"))
    with pytest.raises(OutOfCredit):
        remaining.hold(caller, reservation(caller, "3"))
    remaining.release(wanted, 10)
    remaining.hold(caller, replace(wanted, nanos=ONE - 10))
    with pytest.raises(OutOfCredit):
        remaining.hold(caller, replace(wanted, id="4", nanos=1))


def test_what_began_while_the_database_was_away_is_held_also_when_it_was_heard_of_since(caller: Caller) -> None:
    remaining, wanted = Remaining(), reservation(caller)
    remaining.heard(caller, left(caller, 2 * ONE))
    remaining.hold(caller, wanted)
    remaining.heard(caller, left(caller, 2 * ONE))  # it is back, and does not know of that
    remaining.release(wanted, 10)
    remaining.hold(caller, replace(wanted, nanos=2 * ONE - 10))
    with pytest.raises(OutOfCredit):
        remaining.hold(caller, replace(wanted, id="2", nanos=1))


def test_processes_together_give_out_no_more_than_is_left_when_what_was_heard_of_ends(caller: Caller) -> None:
    processes, held, spent = [Remaining(2), Remaining(2)], reservation(caller), 2 * 10
    for number, process in enumerate(processes, 1):  # each has reserved in the database, and then that is away
        process.heard(caller, left(caller, 4 * ONE - number * ONE))
    for process in processes:
        process.release(held, 10)
    for process in processes:
        with pytest.raises(OutOfCredit):
            for number in range(1000):
                wanted = replace(reservation(caller, str(number)), nanos=ONE // 10)
                process.hold(caller, wanted)
                process.release(wanted, wanted.nanos)
                spent += wanted.nanos
    assert 3 * ONE < spent <= 4 * ONE


@pytest.fixture
def caller(place: Place) -> Caller:
    with closing(connect(place)) as db, db.transaction():
        account = accounts.create(db, "acme", plan="unlimited", is_prepaid=True)
        token = tokens.find(db, tokens.mint(db, "acme", "acme").id)
    assert token is not None
    return Caller(account, token)


def reservation(caller: Caller, id_: str = "1") -> Reservation:
    return Reservation(id_, caller.account.id, caller.token.id, 1, ONE, 2, 50, 2)


def left(caller: Caller, nanos: int) -> Standings:
    return Standings(Standing(caller.account.limits, credit_nanos=nanos), Standing(caller.token.limits), 1)


def test_a_request_that_can_never_be_paid_is_refused_before_the_engine_is_asked(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    client = Client(service, limits={"hard_budget_nanos": 0})
    assert client.ask()[0] == 402
    assert service.engine.seen == []
    assert client.held() == (0, 0)


def test_a_soft_budget_only_warns(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine()), limits={"soft_budget_nanos": 10 * PRICE})
    assert "x-octoai-budget-warning" not in client.ask()[1]
    client.ask()
    talk = client.stream()
    said = talk.until(b"\r\n\r\n").decode()
    talk.close()
    assert said.startswith("HTTP/1.1 200")
    assert "soft budget of the account is 0.0000002 USD, 0.00000028 are spent" in said
    assert said.count("x-octoai-budget-warning") == 1


TEXT = "d" * 20_000  # five thousand tokens
PARAMETERS = {"type": "object", "description": TEXT}
IMAGE = {"type": "image_url", "image_url": {"url": "https://a.b/c"}}
BESIDE: Mapping[str, tuple[int, Mapping[str, Any]]] = {  # each with how many tokens the prompt then has
    "tools": (5000, {"tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]}),
    "a small tool": (300, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    "a schema": (5000, {"response_format": {"type": "json_object", "schema": PARAMETERS}}),
    "an image": (5000, {"messages": [{"role": "user", "content": [IMAGE]}]}),
}


@pytest.mark.parametrize(("num_prompt", "beside"), BESIDE.values(), ids=BESIDE.keys())
def test_credit_holds_whatever_a_prompt_is_made_of_where_the_engine_cannot_count_it(
    in_process: Start, num_prompt: int, beside: Mapping[str, Any]
) -> None:
    credit = (num_prompt + 5) * PRICE  # what one of them comes to
    client = Client(in_process(Uncounting(num_prompt)), credit=credit)
    assert codes(client.at_once(10, max_tokens=5, **beside)) == {402: 10}
    client.service.books(lambda db: accounts.credit(db, "acme", 200_000 * PRICE))
    assert client.ask(max_tokens=5, **beside)[0] == 200
    assert client.balance() == (200_000 + 5 - 2) * PRICE


def test_a_prompt_that_is_only_estimated_takes_nothing_of_the_room_for_its_answer(in_process: Start) -> None:
    service = in_process(Uncounting(1200, context_length=4096))
    client = Client(service, limits={"completion_tokens_per_minute": 100, "prompt_tokens_per_minute": 1_000_000})
    messages = [{"role": "user", "content": "d" * 5000}]
    assert codes(client.at_once(20, messages=messages)) == {200: 2, 429: 18}


@pytest.mark.parametrize("url", ["https://a.b/c", "data:image/jpeg;base64," + "A" * 200_000], ids=["a link", "inline"])
@pytest.mark.parametrize(
    "budget", [{"credit": 8192 * PRICE}, {"limits": {"prompt_tokens_per_minute": 8192}}], ids=["credit", "a rate"]
)
def test_an_image_is_no_more_than_the_window_however_it_is_sent(
    in_process: Start, url: str, budget: Mapping[str, Any]
) -> None:
    client = Client(in_process(Uncounting(300, context_length=8192)), **budget)
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    assert client.ask(messages=[{"role": "user", "content": parts}], max_tokens=5)[0] == 200


def test_a_text_that_is_only_estimated_is_no_more_than_the_window(in_process: Start) -> None:
    client = Client(in_process(Uncounting(3000, context_length=4096)), limits={"prompt_tokens_per_minute": 4096})
    assert client.ask(messages=[{"role": "user", "content": "d" * 12_000}], max_tokens=5)[0] == 200


@pytest.mark.parametrize(
    ("num_bytes", "max_tokens", "most"),
    [(3000, 4096, 4096), (3000, 1000, 3000 + 60 + 1000), (500, 100, 500 + 60 + 100)],
)
def test_prompt_and_answer_share_the_window_also_where_the_prompt_is_only_estimated(
    in_process: Start, num_bytes: int, max_tokens: int, most: int
) -> None:
    client = Client(in_process(Uncounting(10, context_length=4096)), credit=(most - 1) * PRICE)
    asked = {"messages": [{"role": "user", "content": "d" * num_bytes}], "max_tokens": max_tokens}
    assert client.ask(**asked)[0] == 402
    client.service.books(lambda db: accounts.credit(db, "acme", PRICE))
    assert client.ask(**asked)[0] == 200


@pytest.mark.parametrize("price", [Price(1, 1, 5), Price(5, 1, 1), Price(2, 3, 2), Price(0, 0, 1), Price(1, 1, 0)])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("window", [None, 10, 40])
def test_no_prompt_and_answer_that_fit_the_window_cost_more_than_is_held(
    price: Price, n: int, window: int | None
) -> None:
    for max_tokens, most, least in ((7, 9, 0), (7, 30, 0), (60, 30, 0), (1, 40, 0), (20, 12, 12), (5, 40, 40)):
        generation = Generation(max_tokens=max_tokens, text="", n=n)
        rest = [max_tokens if window is None else max(0, window - each) for each in range(most + 1)]
        dearest = max(price.most(each, n * min(max_tokens, rest[each])) for each in range(least, most + 1))
        assert admission._most_nanos(price, generation, (most, least), window) == dearest


def test_an_engine_that_could_not_count_one_prompt_of_a_list_is_not_asked_for_the_others(in_process: Start) -> None:
    class Slow(Uncounting):
        num_asked = 0

        async def count_tokens(self, generation: Generation) -> int | None:
            self.num_asked += 1
            return 1 if generation.text == "p0" else None

    engine = Slow(3)
    client = Client(in_process(engine), limits={"prompt_tokens_per_minute": 1 + 8 * 3})
    for num_prompts, status in ((10, 429), (9, 200)):
        asked = {"model": client.service.model, "prompt": [f"p{number}" for number in range(num_prompts)]}
        assert ask(client.service, "/v1/completions", asked, **client.headers)[0] == status
    assert engine.num_asked == 2 * 2


def test_a_number_that_json_has_no_room_for_is_refused_where_a_prompt_is_estimated(in_process: Start) -> None:
    client = Client(in_process(Uncounting(10)), limits={"prompt_tokens_per_minute": 1000})
    status, _, text = client.ask(messages=[{"role": "user", "content": "Hi", "more": 10**30}])
    assert (status, json.loads(text)["code"]) == (400, "invalid_value")
    assert client.held() == (0, 0)


# Rates


def test_ten_requests_a_minute_are_ten_however_many_come_at_once(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine()), plan="free")
    answers = client.at_once(40)
    assert codes(answers) == {200: 10, 429: 30}
    for status, headers, text in answers:
        assert headers["x-ratelimit-limit-requests"] == "10"
        if status == 429:
            said = json.loads(text)
            assert (said["code"], said["type"]) == ("rate_limit_exceeded", "requests")
            assert headers["x-ratelimit-remaining-requests"] == "0"
            assert 50_000 < int(headers["retry-after-ms"]) <= 60_000
            assert int(headers["retry-after"]) == -(-int(headers["retry-after-ms"]) // 1000)
    left = sorted(int(headers["x-ratelimit-remaining-requests"]) for status, headers, _ in answers if status == 200)
    assert left == list(range(10))


def test_after_exactly_the_time_it_was_told_a_client_is_let_through(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine()), limits={"requests_per_minute": 2})
    client.ask()
    time.sleep(0.3)
    client.ask()
    client.age(58.5)
    status, headers, _ = client.ask()
    told = time.monotonic()
    assert status == 429
    seconds = int(headers["retry-after-ms"]) / 1000
    assert 0 < seconds < 1.5
    time.sleep(max(0.0, told + seconds - 0.15 - time.monotonic()))
    if time.monotonic() < told + seconds - 0.1:
        assert client.ask()[0] == 429
    time.sleep(max(0.0, told + seconds - time.monotonic()))
    assert client.ask()[0] == 200


@pytest.mark.parametrize(
    ("limit", "header", "used"),
    [("prompt_tokens_per_minute", "tokens-prompt", 2), ("completion_tokens_per_minute", "tokens-generated", 5)],
)
@pytest.mark.parametrize("whose", ["limits", "token_limits"])
def test_tokens_a_minute(in_process: Start, limit: str, header: str, used: int, whose: str) -> None:
    client = Client(in_process(ScriptedEngine()), **{whose: {limit: 4 * used}})
    wanted = 5
    answers = [client.ask(max_tokens=wanted) for _ in range(5)]
    assert [status for status, _, _ in answers] == [200] * 4 + [429]
    _, headers, text = answers[-1]
    assert json.loads(text)["type"] == "tokens"
    assert (headers[f"x-ratelimit-limit-{header}"], headers["x-ratelimit-limit-tokens"]) == (str(4 * used),) * 2
    assert headers[f"x-ratelimit-remaining-{header}"] == "0"
    assert 55 < int(headers["retry-after-ms"]) / 1000 <= 60
    client.age(60)
    assert client.ask(max_tokens=wanted)[0] == 200


def test_tokens_that_were_asked_for_but_not_generated_count_only_while_it_runs(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine()), limits={"completion_tokens_per_minute": 60})
    assert [client.ask(max_tokens=45)[0] for _ in range(4)] == [200] * 4  # five each
    assert client.ask(max_tokens=45)[0] == 429


def test_a_request_for_more_than_a_minutes_limit_is_told_not_to_come_back(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine()), limits={"completion_tokens_per_minute": 60})
    status, headers, _ = client.ask(max_tokens=61)
    assert (status, headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in headers


def test_a_default_of_ours_is_lowered_to_a_minutes_limit_and_not_below_what_is_wanted_at_least(
    in_process: Start,
) -> None:
    client = Client(in_process(ScriptedEngine()), limits={"completion_tokens_per_minute": 60})
    sent = {"model": client.service.model, "messages": MESSAGES}
    assert ask(client.service, PATH, {**sent, "n": 2, "min_tokens": 30}, **client.headers)[0] == 200
    for num_choices, least, most in ((1, 61, 60), (2, 31, 30), (1, 600, 60)):
        asked = {**sent, "n": num_choices, "min_tokens": least}
        status, _, text = ask(client.service, PATH, asked, **client.headers)
        refusal = json.loads(text)["error"]
        assert (status, refusal["param"]) == (400, "min_tokens")
        assert refusal["message"].startswith(f"min_tokens: at most {most} here; the limit is 60 completion tokens")
    assert client.held() == (0, 0)


def test_requests_at_once(in_process: Start) -> None:
    service = in_process(ScriptedEngine(SLOW, num_slots=8))
    client = Client(service, limits={"concurrent_requests": 3})
    answers = client.at_once(12, max_tokens=60)
    assert codes(answers) == {200: 3, 429: 9}
    assert all(headers["retry-after"] == "1" for status, headers, _ in answers if status == 429)
    assert client.held() == (0, 0)
    assert client.ask(max_tokens=1)[0] == 200


def test_every_answer_tells_the_limits(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    client = Client(service, limits={"requests_per_minute": 3})
    names = {f"x-ratelimit-{each}-requests" for each in ("limit", "remaining", "reset")}
    told = {
        "success": client.ask(),
        "a stream": client.ask(stream=True),
        "a list": client.models(),
        "a refused body": ask(service, PATH, b"{", **client.headers),
        "a refused parameter": client.ask(max_tokens=-1),
        "an unknown path": ask(service, "/v1/models/nothing", **client.headers),
    }
    client.ask()
    told["too many"] = client.ask()
    for what, (_, headers, _) in told.items():
        assert names <= headers.keys(), what
    assert {what: status for what, (status, _, _) in told.items()} == {
        "success": 200,
        "a stream": 200,
        "a list": 200,
        "a refused body": 400,
        "a refused parameter": 422,
        "an unknown path": 404,
        "too many": 429,
    }
    assert [told[what][1]["x-ratelimit-remaining-requests"] for what in ("success", "a list", "too many")] == [
        "2",
        "1",
        "0",
    ]


def test_what_the_engine_refuses_tells_the_limits_too(in_process: Start) -> None:
    client = Client(in_process(ScriptedEngine((BadRequest("not this"),))), limits={"requests_per_minute": 3})
    status, headers, _ = client.ask()
    assert (status, headers["x-ratelimit-limit-requests"]) == (400, "3")


def test_a_refusal_does_not_wait_for_a_database_that_takes_long_to_tell_the_limits(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While others asked for many reports it took four seconds to say that there is no such model."""
    client = Client(in_process(ScriptedEngine()), limits={"requests_per_minute": 3})

    async def never(*_: object) -> Standings:
        await asyncio.sleep(20)
        raise AssertionError

    monkeypatch.setattr(client.service.service, "standings", never)
    began = time.monotonic()
    status, headers, _ = client.ask(model="unknown")
    assert (status, time.monotonic() - began < 5) == (404, True)
    assert not any(name.startswith("x-ratelimit") for name in headers)


def test_the_first_token_of_a_service_has_no_limits(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    answers = [ask(service, PATH, request(service)) for _ in range(40)]
    assert codes(answers) == {200: 40}
    assert not any(name.startswith("x-ratelimit") for _, headers, _ in answers for name in headers)


def test_limits_that_change_hold_within_a_second(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    client = Client(service)
    assert client.ask()[0] == 200
    service.books(lambda db: accounts.update(db, "acme", limits={"hard_budget_nanos": 1}))
    until(lambda: client.ask()[0] == 402, 1)
