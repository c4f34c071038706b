"""Attempts under one Idempotency-Key: what is given back, and who joins or waits for whom."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest

from octoai.server import accounts, admission, idempotency, tokens
from octoai.server.api import streaming
from octoai.server.engines.base import Event
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import Unavailable
from octoai.server.idempotency import Key
from octoai.server.ledger import ledger
from octoai.server.params import generations
from octoai.server.store import Connection, Place, StoreAway, connect, keys, requests, sqlite
from octoai.server.store.audit import verify
from octoai.server.store.entries import balance_nanos
from octoai.server.store.keys import KeyRow
from octoai.server.times import now_us
from tests.running import InProcess, Start
from tests.server.keyed import PATH, SLOW, leave, net_nanos, rows, statuses
from tests.server.settling import COST, settlement
from tests.talking import ask, is_idle, request, until


class Lingering(ScriptedEngine):
    """Takes a moment to be left, as one whose last bytes are still read."""

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[list[Event]]:
        inner = super().generate(*args, **kwargs)
        try:
            async for batch in inner:
                yield batch
        finally:
            await inner.aclose()
            await asyncio.shield(asyncio.sleep(0.4))


@pytest.fixture
def slow(in_process: Start) -> InProcess:
    return in_process(ScriptedEngine(SLOW))


def key_of(service: InProcess, key: str = "k1") -> KeyRow:
    row = service.read(lambda db: keys.find(db, "default", key))
    assert row is not None
    return row


def attempts(service: InProcess, key: str) -> list[int]:
    found = service.read(lambda db: db.rows("SELECT num_attempts FROM keys WHERE key = ?", (key,)))
    return [int(number) for (number,) in found]


def test_an_attempt_is_not_given_back_for_one_that_was_refused(slow: InProcess, begin: Any) -> None:
    slow.books(lambda db: accounts.update(db, "default", limits={"requests_per_minute": 1}))
    time.sleep(0.3)  # until the limit is known
    leave(slow, begin, "k1")
    charged = net_nanos(slow)
    assert charged > 0
    for _ in range(2):
        assert ask(slow, PATH, request(slow, stream=True), idempotency_key="k1")[0] == 429
    until(lambda: attempts(slow, "k1") == [1], 2)
    assert (net_nanos(slow), statuses(slow)) == (charged, ["settled"])


def test_an_attempt_that_is_left_while_its_answer_is_compressed_is_given_back(
    in_process: Start, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, is_compressing, has_left = idempotency._packed, threading.Event(), threading.Event()

    def slowly(parts: Any) -> str | None:
        is_compressing.set()
        has_left.wait(5)
        return compress(parts)

    monkeypatch.setattr(idempotency, "_packed", slowly)
    monkeypatch.setattr(idempotency, "LONG_BYTES", 0)
    service = in_process(ScriptedEngine())
    stream = begin(service, "k1")
    assert is_compressing.wait(5)
    stream.close()
    until(lambda: is_idle(service))
    has_left.set()
    status, headers, _ = ask(service, PATH, request(service, stream=True), idempotency_key="k1")
    assert (status, "idempotent-replayed" in headers) == (200, False)
    until(lambda: is_idle(service))
    left, finished = rows(service)
    assert (left.status, finished.status) == ("refunded", "settled")
    assert net_nanos(service) == finished.cost_nanos > 0


def test_who_joined_an_answer_that_is_refused_has_a_line_of_its_own(
    in_process: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    service = in_process(ScriptedEngine([0.5, Unavailable("it is gone", retry_after=1, code="engine_not_ready")]))
    answers: list[int] = []
    asking = [
        threading.Thread(target=lambda: answers.append(ask(service, PATH, request(service), idempotency_key="k1")[0]))
        for _ in range(3)
    ]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert answers == [503] * 3
    until(lambda: is_idle(service))
    lines = [(each.name, each.fields["error"]) for each in caplog.records if hasattr(each, "fields")]
    jobs = [error for name, error in lines if name == "octoai.request"]
    assert jobs == ["engine_not_ready"]
    assert [error for name, error in lines if name == "octoai.refusal"] == ["engine_not_ready"] * 2


def test_an_attempt_is_not_given_back_for_one_that_left_the_queue(slow: InProcess, begin: Any) -> None:
    leave(slow, begin, "k1")
    charged = net_nanos(slow)
    others = [begin(slow, f"other-{number}") for number in range(slow.engine.num_slots)]
    for other in others:
        other.until(b"w1 ")
    waiting = begin(slow, "k1")
    time.sleep(0.3)
    waiting.close()
    for other in others:
        other.rest()
    until(lambda: is_idle(slow) and attempts(slow, "k1") == [1], 2)
    left = [row for row in rows(slow) if row.outcome == "aborted"]
    assert [(row.status, row.cost_nanos) for row in left] == [("settled", charged)]
    assert begin(slow, "k1").rest().count(b"w39 ") == 1  # it runs: now the first is given back
    until(lambda: is_idle(slow), 2)
    assert sorted(row.status for row in rows(slow) if row.id == left[0].id) == ["refunded"]


def test_an_attempt_is_given_back_also_when_its_key_passed_through_one_that_died(slow: InProcess, begin: Any) -> None:
    """A process had taken the key over, and was killed before the request ran there."""
    leave(slow, begin, "k1")
    (left,) = rows(slow)
    taken = KeyRow(key_of(slow).body_hash, "id-elsewhere", "req-elsewhere", "journal-elsewhere", now_us())

    def die(db: Connection) -> None:
        assert keys.claim_again(db, "default", "k1", key_of(slow), taken, left.id)
        keys.release_of_journal(db, "journal-elsewhere")

    slow.books(die)
    assert (key_of(slow).request, key_of(slow).request_id, key_of(slow).num_attempts) == (left.id, left.request_id, 1)
    assert begin(slow, "k1").rest().count(b"w39 ") == 1
    until(lambda: is_idle(slow) and statuses(slow) == ["refunded", "settled"], 2)


def test_an_attempt_is_given_back_also_where_its_key_was_taken_over_unheard(
    slow: InProcess, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(slow, begin, "k1")
    books = slow.service.admission.books
    write = books.write

    async def late(action: Any) -> Any:
        await write(action)
        raise StoreAway("it took too long to say so")

    monkeypatch.setattr(books, "write", late)
    assert begin(slow, "k1").rest().count(b"w39 ") == 1
    until(lambda: is_idle(slow) and statuses(slow) == ["refunded", "settled"], 2)


def test_a_retry_is_answered_also_where_what_ended_before_is_not_in_the_database_yet(
    slow: InProcess, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is in the database, and this process's own: it knows that nobody else will answer under it."""
    leave(slow, begin, "k1")

    async def behind(**_: Any) -> None:
        raise StoreAway("the process that writes to the database ended")

    with monkeypatch.context() as late:
        late.setattr(slow.service.admission.books.writer, "caught_up", behind)
        assert begin(slow, "k1").rest().count(b"w39 ") == 1
    until(lambda: is_idle(slow) and statuses(slow) == ["refunded", "settled"], 2)


def test_a_retry_while_the_database_is_away_is_billed_instead_of_the_first_and_answered_once(
    slow: InProcess, begin: Any, in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    leave(slow, begin, "k0")  # known from here on
    lock = sqlite3.connect(slow.settings.data_dir / "octoai.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    leave(slow, begin, "k1")
    said = begin(slow, "k1").rest()
    lock.execute("ROLLBACK")
    lock.close()
    assert said.count(b"w39 ") == 1
    until(lambda: statuses(slow) == ["refunded", "settled", "settled"], 5)
    finished = next(row for row in rows(slow) if row.outcome == "finished")
    assert key_of(slow).request == finished.id
    assert net_nanos(slow) == finished.cost_nanos + rows(slow)[0].cost_nanos
    other = InProcess(ScriptedEngine(("other",)), slow.settings.data_dir)
    try:
        _, headers, text = ask(other, PATH, request(other, stream=True), idempotency_key="k1")
    finally:
        other.close()
    assert headers["idempotent-replayed"] == "true"
    assert text.count(b"w39 ") == 1


@contextmanager
def locked(service: InProcess) -> Iterator[None]:
    """Nobody else can write to its database."""
    with closing(sqlite3.connect(service.settings.data_dir / "octoai.db", isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        yield
        lock.execute("ROLLBACK")


def run_elsewhere(service: InProcess, begin: Any) -> None:
    """Another process has begun to answer under the key k1."""
    leave(service, begin, "k0")
    running = KeyRow(key_of(service, "k0").body_hash, "id-elsewhere", "req-elsewhere", "journal-elsewhere", now_us())
    service.books(lambda db: keys.claim(db, "default", "k1", running))


def test_an_answer_that_another_process_gives_is_waited_for_also_where_the_database_goes_away(
    slow: InProcess, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    run_elsewhere(slow, begin)
    waiting = begin(slow, "k1")
    time.sleep(0.5)
    writer = slow.service.admission.ledger.writer
    with locked(slow):
        until(lambda: writer.away_seconds is not None, 3)
        time.sleep(0.5)
    packed = asyncio.run(idempotency.pack(200, [], [b"said elsewhere"]))
    assert packed is not None
    answer = base64.b64decode(packed)
    slow.books(lambda db: keys.keep(db, "default", "k1", "id-elsewhere", answer, now_us()))
    said = waiting.rest()
    assert b"idempotent-replayed: true" in said
    assert b"said elsewhere" in said
    assert len(slow.engine.seen) == 1  # the one before


def test_who_waits_for_an_answer_of_another_process_is_refused_where_nobody_is_served_without_the_database(
    in_process: Start, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    service = in_process(ScriptedEngine(SLOW), when_database_is_away="refuse")
    run_elsewhere(service, begin)
    waiting = begin(service, "k1")
    time.sleep(0.5)
    with locked(service):
        assert waiting.rest().startswith(b"HTTP/1.1 503")
    until(lambda: attempts(service, "k0") == [1], 3)
    assert key_of(service).request == "id-elsewhere"
    assert len(service.engine.seen) == 1


def test_a_key_that_cannot_be_claimed_in_time_is_refused_where_nobody_is_served_without_the_database(
    in_process: Start,
) -> None:
    service = in_process(ScriptedEngine(), when_database_is_away="refuse")
    writer = service.service.admission.books.writer
    writer.run = partial(writer.run, seconds=0.3)  # type: ignore[method-assign]  # not 5
    with locked(service):
        status, _, text = ask(service, PATH, request(service), idempotency_key="k1")
    assert (status, json.loads(text)["code"]) == (503, "database_away")
    assert service.engine.seen == []
    until(lambda: ask(service, PATH, request(service), idempotency_key="k1")[0] == 200, 2)


def test_an_answer_that_another_process_gives_is_waited_for_until_nobody_here_is_left_to_read_it(
    slow: InProcess, begin: Any
) -> None:
    run_elsewhere(slow, begin)
    first = begin(slow, "k1")
    until(lambda: slow.service.num_requests == 1, 2)
    joined = begin(slow, "k1")
    time.sleep(0.3)
    first.close()
    time.sleep(0.5)
    assert slow.service.num_requests == 1  # for the other
    joined.close()
    until(lambda: slow.service.num_requests == 0, 2)
    assert key_of(slow).request == "id-elsewhere"


def test_a_drain_does_not_wait_for_an_answer_that_another_process_gives(slow: InProcess, begin: Any) -> None:
    run_elsewhere(slow, begin)
    waiting = [begin(slow, "k1") for _ in range(2)]
    until(lambda: slow.service.num_requests == 1, 2)
    time.sleep(0.3)
    assert slow.loop is not None
    asyncio.run_coroutine_threadsafe(slow.service.drain(), slow.loop).result(2)  # of 5 s that it would wait
    for each in waiting:
        said = each.rest()
        assert said.startswith(b"HTTP/1.1 503")
        assert b"shutting_down" in said


def test_a_key_that_is_claimed_when_nobody_waits_for_it_any_more_is_free(slow: InProcess, begin: Any) -> None:
    def known(db: Connection) -> accounts.Caller:
        return accounts.Caller(accounts.find(db, "default"), tokens.find(db, tokens.mint(db, "t", "default").id))

    key, asked = Key("k1", b"hash"), generations.chat(json.dumps(request(slow)).encode())
    assert slow.loop is not None
    caller = slow.books(known)
    with locked(slow):
        asking = asyncio.run_coroutine_threadsafe(slow.service.admit(caller, asked, "req_1", key), slow.loop)
        time.sleep(0.3)
        asking.cancel()
        time.sleep(0.1)
    assert begin(slow, "k2").rest().count(b"w39 ") == 1  # what was asked of the database before is done
    assert attempts(slow, "k1") == []


@pytest.mark.parametrize("portion", [1, 2, 100])
def test_attempts_that_come_from_the_journal_alone_are_billed_as_one_however_often_it_is_read(
    place: Place, portion: int
) -> None:
    answer = base64.b64encode(b"the answer").decode()
    records = [
        record | {"kind": kind, "key": "k1", "key_body": "ab", "opened_us": record["opened_us"] + number}
        for number, record in enumerate([settlement(1), settlement(2), settlement(3) | {"answer": answer}])
        for kind in ("intent", "settlement")
    ]
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        for start in (0, *range(len(records))):
            for at in range(start, len(records), portion):
                with db.transaction():
                    requests.apply(db, records[at : at + portion], now_us())
            row = keys.find(db, "default", "k1")
            assert row is not None
            assert (row.request, row.answer, row.num_attempts) == (records[-1]["id"], b"the answer", 3)
            found = [requests.of_id(db, record["id"]) for record in records[::2]]
            assert [each.status for each in found if each] == ["refunded", "refunded", "settled"]
            assert balance_nanos(db, "default") == -COST


def apply(db: Connection, *records: dict[str, Any]) -> None:
    with db.transaction():
        requests.apply(db, list(records), now_us())


def test_what_began_while_the_database_was_away_takes_no_key_from_a_request_that_runs_until_it_is_answered(
    place: Place,
) -> None:
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        runs, late = (settlement(number) | {"key": "k1", "key_body": "ab"} for number in (1, 2))
        late |= {"journal": "elsewhere", "opened_us": runs["opened_us"] + 1}
        apply(db, runs | {"kind": "intent"})
        apply(db, late | {"kind": "intent"})
        row = keys.find(db, "default", "k1")
        assert row is not None
        assert (row.request, row.answer, row.num_attempts) == (runs["id"], None, 1)
        for _ in range(2):  # whatever is read again
            apply(db, late | {"answer": base64.b64encode(b"late").decode()})
            apply(db, runs | {"answer": base64.b64encode(b"first").decode()})
            kept = keys.find(db, "default", "k1")
            assert kept is not None
            assert (kept.request, kept.answer) == (late["id"], b"late")
            found = [requests.of_id(db, each["id"]) for each in (runs, late)]
            assert [each.status for each in found if each] == ["refunded", "settled"]
            assert balance_nanos(db, "default") == -COST
        verify(db)


def test_what_was_answered_a_second_time_while_the_database_was_away_is_billed_once(place: Place) -> None:
    answer = base64.b64encode(b"the answer").decode()
    first, late, other, left = (settlement(number) | {"key": "k1", "key_body": "ab"} for number in range(1, 5))
    first |= {"answer": answer}
    late |= {"journal": "elsewhere", "opened_us": first["opened_us"] + 1, "answer": answer}
    other |= late | {"id": other["id"], "key_body": "cd"}
    left |= late | {"id": left["id"], "answer": None}
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        for _ in range(2):  # whatever is read again
            for record in (first, late, other, left):
                apply(db, record)
            found = [requests.of_id(db, each["id"]) for each in (first, late, other, left)]
            assert [each.status for each in found if each] == ["settled", "refunded", "settled", "refunded"]
            row = keys.find(db, "default", "k1")
            assert row is not None
            assert row.request == first["id"]
        assert balance_nanos(db, "default") == -2 * COST
        verify(db)


@pytest.mark.parametrize("is_answered", [True, False])
def test_what_was_answered_twice_is_billed_once_also_where_the_second_is_heard_of_first(
    place: Place, is_answered: bool
) -> None:
    answer = base64.b64encode(b"the answer").decode()
    first, second, *left = (settlement(number) | {"key": "k1", "key_body": "ab"} for number in range(1, 8))
    first |= {"answer": answer if is_answered else None}
    second |= {"journal": "elsewhere", "opened_us": first["opened_us"] + 1, "answer": answer}
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        for _ in range(2):  # whatever is read again
            apply(db, second)
            apply(db, first | {"kind": "intent", "answer": None})
            apply(db, first)
            found = [requests.of_id(db, each["id"]) for each in (first, second)]
            assert [each.status for each in found if each] == ["refunded", "settled"]
            assert balance_nanos(db, "default") == -COST
        for each in left:  # without an answer: not any number of times
            apply(db, each)
        num_given_back = keys.MAX_REFUNDS - (not is_answered)
        assert balance_nanos(db, "default") == -COST * (1 + len(left) - num_given_back)
        verify(db)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("num_left", [1, 2])
def test_what_was_left_while_the_database_was_away_is_given_back_also_where_its_retry_has_the_key_before(
    place: Place, has_run: bool, num_left: int
) -> None:
    *left, retry = (settlement(number) | {"key": "k1", "key_body": "ab"} for number in range(1, num_left + 2))
    body = bytes.fromhex("ab")
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
            claimed = KeyRow(body, retry["id"], retry["request_id"], retry["journal"], retry["opened_us"])
            assert keys.claim(db, "default", "k1", claimed) is None
        if has_run:
            apply(db, retry | {"kind": "intent"})
        for each in left:
            apply(db, each)
        assert balance_nanos(db, "default") == (0 if has_run else -COST)  # it may never run
        apply(db, retry | {"answer": base64.b64encode(b"the answer").decode()})
        found = [requests.of_id(db, each["id"]) for each in (*left, retry)]
        assert [each.status for each in found if each] == ["refunded"] * num_left + ["settled"]
        assert balance_nanos(db, "default") == -COST
        row = keys.find(db, "default", "k1")
        assert row is not None
        assert (row.request, row.num_attempts) == (retry["id"], num_left + 1)
        verify(db)


def test_what_was_left_while_the_database_was_away_has_its_key_where_the_retry_never_runs(place: Place) -> None:
    left, other = (settlement(number) | {"key": "k1", "key_body": "ab"} for number in (1, 2))
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
            keys.claim(db, "default", "k1", KeyRow(bytes.fromhex("ab"), "retry", "req_retry", "j", now_us()))
        apply(db, left)
        apply(db, other)
        with db.transaction():
            keys.release(db, "default", "k1", "retry")
        row = keys.find(db, "default", "k1")
        assert row is not None
        assert (row.request, row.replaces) == (left["id"], None)
        found = [requests.of_id(db, each["id"]) for each in (left, other)]
        assert [each.status for each in found if each] == ["settled", "refunded"]
        assert balance_nanos(db, "default") == -COST


def test_a_request_that_was_given_back_when_its_key_was_taken_over_does_not_take_it_back_with_its_answer(
    place: Place,
) -> None:
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        began, body = now_us() - 70_000_000, bytes.fromhex("ab")
        first, taker = (settlement(number) | {"key": "k1", "key_body": "ab"} for number in (1, 2))
        first |= {"opened_us": began, "lease_us": began + 60_000_000}
        apply(db, first | {"kind": "intent"})
        apply(db, first | {"kind": "checkpoint", "key": None, "completion_tokens": 8})
        claimed = KeyRow(body, taker["id"], "req_2", "elsewhere", now_us())
        with db.transaction():
            assert admission._take_over(db, "default", Key("k1", body), claimed) is not None
        apply(db, taker | {"kind": "intent"})
        apply(db, first | {"answer": base64.b64encode(b"late").decode()})
        apply(db, taker)
        row = keys.find(db, "default", "k1")
        assert row is not None
        assert (row.request, row.answer) == (taker["id"], None)
        found = [requests.of_id(db, each["id"]) for each in (first, taker)]
        assert [each.status for each in found if each] == ["refunded", "settled"]
        assert balance_nanos(db, "default") == -COST


def test_a_request_does_not_take_its_key_back_from_the_one_that_took_it_over(place: Place) -> None:
    """It was not heard of for a lease; the other, which came while it waited for its turn, leaves before its own."""
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        began, body = now_us() - 70_000_000, bytes.fromhex("ab")
        first = settlement(1) | {"key": "k1", "key_body": "ab", "opened_us": began, "lease_us": began + 60_000_000}
        apply(db, first | {"kind": "intent"})
        taker = KeyRow(body, "taker", "req_taker", "elsewhere", began - 5_000_000)
        with db.transaction():
            taken = admission._take_over(db, "default", Key("k1", body), taker)
        assert taken is not None
        assert taken.refunds == first["id"]
        apply(db, first)
        assert keys.find(db, "default", "k1") == taken
        with db.transaction():
            keys.release(db, "default", "k1", "taker")
        row = requests.of_id(db, first["id"])
        assert row is not None
        assert (row.status, balance_nanos(db, "default")) == ("settled", -COST)


def test_those_that_took_a_key_over_and_never_ran_are_no_attempts(place: Place) -> None:
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        key, lost_us = Key("k1", bytes.fromhex("ab")), now_us() - 700_000_000
        first = settlement(1) | {"key": key.value, "key_body": "ab"}
        apply(db, first)
        for number in range(keys.MAX_REFUNDS + 2):  # each is lost with its machine before its turn comes
            claimed = KeyRow(key.body_hash, f"taker {number}", f"req_{number}", f"machine {number}", lost_us)
            with db.transaction():
                taken = admission._take_over(db, "default", key, claimed)
            assert taken is not None
            assert (taken.request, taken.num_attempts, taken.refunds) == (claimed.request, 2, first["id"])
        with db.transaction():
            keys.release(db, "default", key.value, claimed.request)
        row = keys.find(db, "default", key.value)
        assert row is not None
        assert (row.request, row.num_attempts, row.replaces) == (first["id"], 1, None)


@pytest.mark.parametrize("has_ended", [False, True], ids=["it runs", "it has ended"])
def test_a_request_that_did_not_wait_for_its_key_is_not_given_back_for_itself(place: Place, has_ended: bool) -> None:
    """It was to take the key over, and that was done only when it ran already."""
    with closing(connect(place)) as db:
        with db.transaction():
            accounts.ensure_default(db)
        key = Key("k1", bytes.fromhex("ab"))
        record = settlement(1) | {"key": key.value, "key_body": "ab"}
        apply(db, record | {"kind": "intent"})
        if has_ended:
            apply(db, record)
        claimed = KeyRow(key.body_hash, record["id"], record["request_id"], record["journal"], record["opened_us"])
        later_us = record["lease_us"] + 1
        with db.transaction(), pytest.MonkeyPatch.context() as clock:
            clock.setattr(admission, "now_us", lambda: later_us)
            assert admission._take_over(db, "default", key, claimed) is None
        apply(db, record)
        apply(db, record)
        row = requests.of_id(db, record["id"])
        assert row is not None
        assert (row.status, balance_nanos(db, "default")) == ("settled", -COST)


def test_a_key_that_was_waited_for_is_claimed_when_it_is_free(slow: InProcess, begin: Any) -> None:
    leave(slow, begin, "k0")
    running = KeyRow(key_of(slow, "k0").body_hash, "id-elsewhere", "req-elsewhere", "journal-elsewhere", now_us())
    slow.books(lambda db: keys.claim(db, "default", "k1", running))
    waiting = begin(slow, "k1")
    time.sleep(0.5)
    free_us = now_us()
    slow.books(lambda db: keys.release_of_journal(db, "journal-elsewhere"))
    waiting.until(b"w1 ")
    assert key_of(slow).claimed_us > free_us


@pytest.mark.parametrize("payer", ["account", "token"])
def test_a_retry_has_the_room_of_what_it_replaces(in_process: Start, begin: Any, payer: str) -> None:
    service = in_process(ScriptedEngine(SLOW))
    leave(service, begin, "k0")
    (measured,) = rows(service)
    most = measured.worth_nanos + 100 * measured.output_nanos  # of a retry, and half of an attempt that is left
    if payer == "account":
        budget = {"hard_budget_nanos": most + measured.cost_nanos}
        service.books(lambda db: accounts.update(db, "default", limits=budget))
    else:
        service.token = service.mint("limited", limits={"hard_budget_nanos": most}).text
    time.sleep(0.3)
    stream = begin(service, "k1", max_tokens=100)
    stream.until(b"w20 ")
    stream.close()
    until(lambda: is_idle(service), 2)
    assert begin(service, "k2", max_tokens=100).rest().startswith(b"HTTP/1.1 402")
    assert begin(service, "k1", max_tokens=100).rest().count(b"w39 ") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_retry_does_not_join_an_attempt_that_is_being_ended(in_process: Start, begin: Any, stream: bool) -> None:
    service = in_process(Lingering(SLOW))
    first = begin(service, "k1", stream=stream)
    until(lambda: len(service.engine.seen) == 1, 2)
    time.sleep(0.1)
    first.close()
    time.sleep(0.05)
    assert begin(service, "k1", stream=stream).rest().count(b"w39 ") == 1
    until(lambda: is_idle(service), 2)
    assert statuses(service) == ["refunded", "settled"]


@pytest.mark.slow
def test_a_key_is_not_taken_over_from_a_request_that_waits_long_for_its_turn(
    in_process: Start, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "ELSEWHERE_SECONDS", 0.8)
    monkeypatch.setattr(ledger, "RENEW_SECONDS", 0.1)
    service = in_process(ScriptedEngine(SLOW * 2, num_slots=1))
    elsewhere = InProcess(ScriptedEngine(("other",)), service.settings.data_dir)
    try:
        other = begin(service, "other")
        other.until(b"w1 ")
        waiting = begin(service, "k1")
        until(lambda: attempts(service, "k1") == [1], 2)
        body = request(elsewhere, stream=True)
        status, headers, text = ask(elsewhere, PATH, body, idempotency_key="k1")
        assert (status, headers["retry-after"], json.loads(text)["code"]) == (503, "5", "still_running")
        assert waiting.rest().count(b"w39 ") == 2
        assert ask(elsewhere, PATH, body, idempotency_key="k1")[1]["idempotent-replayed"] == "true"
    finally:
        elsewhere.close()
    assert attempts(service, "k1") == [1]


def test_who_joined_does_not_lose_the_answer_to_a_first_client_that_stops_reading(
    in_process: Start, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SLOW_READER_SECONDS", 0.5)
    service = in_process(ScriptedEngine(tuple(step for _ in range(60) for step in ("x" * 200_000, 0.01))))
    begin(service, "k1").until(b"200 OK")
    said = begin(service, "k1").rest()
    assert said.count(b"x") > 12_000_000
    assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert statuses(service) == ["settled"]


def test_without_a_ledger_keys_hold_within_one_process(in_process: Start, begin: Any) -> None:
    service = in_process(ScriptedEngine(SLOW), ledger="off")
    leave(service, begin, "k1")
    began = time.monotonic()
    assert begin(service, "k1").rest().count(b"w39 ") == 1
    assert ask(service, PATH, request(service, stream=True), idempotency_key="k1")[1]["idempotent-replayed"] == "true"
    assert time.monotonic() - began < 4
    assert len(service.engine.seen) == 2


def test_a_key_is_released_when_the_database_is_back(
    slow: InProcess, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    others = [begin(slow, f"other-{number}") for number in range(slow.engine.num_slots)]
    for other in others:
        other.until(b"w1 ")
    waiting = begin(slow, "k1")
    until(lambda: attempts(slow, "k1") == [1], 2)
    lock = sqlite3.connect(slow.settings.data_dir / "octoai.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    waiting.close()
    time.sleep(1)
    lock.execute("ROLLBACK")
    lock.close()
    for other in others:
        other.rest()
    until(lambda: attempts(slow, "k1") == [], 3)
    assert begin(slow, "k1").rest().count(b"w39 ") == 1


def test_one_id_given_at_once_by_several_is_made_unique(slow: InProcess) -> None:
    async def several() -> list[str]:
        return await asyncio.gather(*[slow.service.unique_id("same") for _ in range(5)])

    ids = asyncio.run_coroutine_threadsafe(several(), slow.loop).result(5)
    assert len(set(ids)) == 5
    assert "same" in ids
