"""Idempotency-Keys from end to end: the same request under the same key is answered once, and billed once."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import signal
import threading
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from octoai import OctoAI
from octoai.server import accounts, idempotency
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import BadRequest, EngineFailed
from octoai.server.idempotency import Key, Recording, Recordings
from octoai.server.store import Connection, Place, connect, keys
from octoai.server.store.keys import KeyRow
from octoai.server.times import now_us
from tests.load.accounts import Books
from tests.load.clients import Request, Target, Told
from tests.load.clients import ask as ask_once
from tests.load.places import serve
from tests.load.proxy import LossyProxy
from tests.load.upstream import MODEL, Order, Upstream
from tests.running import InProcess, Start
from tests.server.keyed import PATH, SLOW, leave, net_nanos, rows, statuses
from tests.talking import ask, is_idle, request, until


@pytest.fixture
def service(in_process: Start) -> InProcess:
    return in_process(ScriptedEngine())


@pytest.fixture
def slow(in_process: Start) -> InProcess:
    return in_process(ScriptedEngine(SLOW))


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_request_under_the_same_key_is_the_same_answer_billed_once(service: InProcess, stream: bool) -> None:
    body = request(service, stream=stream)
    first = ask(service, PATH, body, idempotency_key="k1")
    again = [ask(service, PATH, body, idempotency_key="k1") for _ in range(3)]
    assert first[0] == 200
    assert "idempotent-replayed" not in first[1]
    for status, headers, text in again:
        assert (status, text) == (200, first[2])
        assert headers["idempotent-replayed"] == "true"
        assert headers["x-request-id"] == first[1]["x-request-id"]
        assert headers["content-type"] == first[1]["content-type"]
        assert headers.get("x-octoai-cost") == first[1].get("x-octoai-cost")
    (row,) = rows(service)
    assert row.completion_tokens == 5
    assert len(service.engine.seen) == 1
    assert net_nanos(service) == row.cost_nanos > 0


def test_a_key_is_new_again_after_the_time_that_it_is_kept(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.service.admission, "_keep_seconds", 0.3)
    first = ask(service, PATH, request(service), idempotency_key="k1")
    assert ask(service, PATH, request(service), idempotency_key="k1")[1]["idempotent-replayed"] == "true"
    time.sleep(0.4)
    service.read(lambda db: None)
    service.books(lambda db: keys.prune(db, now_us(), now_us()))
    again = ask(service, PATH, request(service, max_tokens=7), idempotency_key="k1")
    assert (first[0], again[0]) == (200, 200)
    assert "idempotent-replayed" not in again[1]
    assert len(rows(service)) == 2


def test_answers_are_kept_as_long_as_the_settings_say_and_keys_without_one_for_a_day(in_process: Start) -> None:
    """An answer that is not kept must not be given, and nobody's running request loses its key for that."""
    service = in_process(ScriptedEngine(), answers_kept_seconds=60)
    recently, hour_ago, days_ago = (now_us() - int(seconds * 1_000_000) for seconds in (50, 3600, 90_000))
    claimed = {"late": hour_ago, "old": hour_ago, "running": hour_ago, "lost": days_ago, "token": hour_ago}
    claimed["set right"] = days_ago  # the clock, while it ran

    def fill(db: Connection) -> None:
        for key, at_us in claimed.items():
            keys.claim(db, "default", key, KeyRow(b"", f"r-{key}", "", "" if key == "token" else "j", at_us))
        keys.keep(db, "default", "late", "r-late", b"said", recently)  # it took its time
        keys.keep(db, "default", "old", "r-old", b"said", hour_ago)
        keys.keep(db, "default", "set right", "r-set right", b"said", recently)
        keys.keep(db, "default", "token", "r-token", b"made")  # by an administrator: once is once

    service.books(fill)
    books = service.service.admission.books
    while service.books(books._prune_some_keys):
        pass
    left = service.books(lambda db: db.rows("SELECT key FROM keys ORDER BY key"))
    assert left == [("late",), ("running",), ("set right",), ("token",)]


def test_an_answer_is_kept_from_its_end_on(in_process: Start) -> None:
    """Who lost the end of one that took longer than answers are kept would have paid twice."""
    service = in_process(ScriptedEngine(("a ", 0.5, "b ")))
    service.service.admission._keep_seconds = 0.4
    first = ask(service, PATH, request(service), idempotency_key="k1")
    again = ask(service, PATH, request(service), idempotency_key="k1")
    assert (first[0], again[0]) == (200, 200)
    assert again[1]["idempotent-replayed"] == "true" and again[2] == first[2]
    assert len(rows(service)) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_key_that_is_asked_again_as_its_answer_ends(in_process: Start, n: int, stream: bool) -> None:
    service = in_process(ScriptedEngine(("a ", "b ")))
    service.service.admission._keep_seconds = 0.0
    body = request(service, stream=stream, n=n)
    statuses = [ask(service, PATH, body, idempotency_key="k1")[0] for _ in range(20)]
    assert statuses == [200] * 20


def test_answers_go_by_their_size_too(place: Place) -> None:
    """Two hundred of a megabyte kept everybody from writing for more than a second."""
    with closing(connect(place)) as db, db.transaction():
        for number in range(20):
            keys.claim(db, "a", f"k{number:02d}", KeyRow(b"", f"r{number}", "", "j", number))
            keys.keep(db, "a", f"k{number:02d}", f"r{number}", bytes(1024 * 1024), number)
        assert keys.prune(db, 100, 0)
        assert db.row("SELECT MIN(key) FROM keys") == ("k04",)
        while keys.prune(db, 100, 0):
            pass
        assert db.rows("SELECT key FROM keys") == []


def recorded(recordings: Recordings, number: int, answer: Sequence[bytes]) -> float:
    """The seconds that it takes to keep an answer that is whole."""
    recording = Recording(Key.of(f"key-{number}", PATH, b"{}"), f"req_{number}")
    recordings.begin("default", recording)
    recording.begin(200, [(b"content-type", b"application/json"), (b"x-octoai-cost", b"0.000012")])
    for block in answer:
        recording.add(bytes(bytearray(block)))  # a copy of its own
    recording.end(b"end")
    began = time.perf_counter()
    recordings.end("default", recording)
    return time.perf_counter() - began


@pytest.mark.parametrize("answer", [[b"x" * 290], [b"x" * 200] * 8], ids=["whole", "stream"])
def test_however_many_answers_are_kept_they_take_no_more_memory_than_they_may(answer: Sequence[bytes]) -> None:
    recordings = Recordings()
    tracemalloc.start()
    try:
        for number in range(25_000):
            recorded(recordings, number, answer)
        assert tracemalloc.get_traced_memory()[0] < 1.1 * idempotency.MAX_RECENT_BYTES
    finally:
        tracemalloc.stop()
    assert recordings.find("default", Key.of("key-24999", PATH, b"{}")) is not None
    assert recordings.find("default", Key.of("key-0", PATH, b"{}")) is None


def test_what_is_over_age_is_gone_also_where_nobody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings, at_us = Recordings(), 1_000_000
    monkeypatch.setattr(idempotency, "now_us", lambda: at_us)
    for number in range(2):
        recorded(recordings, number, [b"secret"])
    key = Key.of("key-2", PATH, b"{}")
    recording = Recording(key, "req_2")
    recordings.begin("default", recording)
    recordings.replace("default", recording, idempotency.unpacked(key, "req_2", zlib.compress(STORED), 1))
    at_us += int(idempotency.KEEP_SECONDS * 1_000_000) - 1
    recordings.forget_old()  # the one that another process gave a second before
    assert [name for _, name in recordings._done] == ["key-0", "key-1"]
    at_us += 1
    recordings.forget_old()
    assert (list(recordings._done), recordings._done_bytes) == ([], 0)


STORED = b'{"status":200,"headers":[]}\nsecret'


def test_a_service_forgets_answers_when_their_time_is_over(in_process: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octoai.server.ledger.books.KEEP_ORDER_SECONDS", 0.05)
    service = in_process(ScriptedEngine())
    admission = service.service.admission
    admission._keep_seconds = 2.0
    assert ask(service, PATH, request(service), idempotency_key="k1")[0] == 200
    assert admission._recordings._done
    until(lambda: not admission._recordings._done, seconds=20)


def test_to_keep_an_answer_takes_no_longer_for_those_that_are_kept_already() -> None:
    recordings = Recordings()
    first = median([recorded(recordings, number, [b"x"]) for number in range(100)])
    for number in range(100, 10_000):
        recorded(recordings, number, [b"x"])
    assert median([recorded(recordings, 10_000 + number, [b"x"]) for number in range(100)]) < 20 * first


def test_another_process_finds_the_stored_answer(service: InProcess, in_process: Start) -> None:
    first = ask(service, PATH, request(service), idempotency_key="k1")
    second = InProcess(ScriptedEngine(("other",)), service.settings.data_dir)
    try:
        status, headers, text = ask(second, PATH, request(second), idempotency_key="k1")
    finally:
        second.close()
    assert (status, headers["idempotent-replayed"], text) == (200, "true", first[2])
    assert len(rows(service)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_answer_is_stored_too(in_process: Start, stream: bool) -> None:
    service = in_process(ScriptedEngine(tuple(f"w{number} " * 40 for number in range(1000))))
    body = request(service, stream=stream, max_tokens=2000)
    first = ask(service, PATH, body, idempotency_key="k1")
    assert len(first[2]) > idempotency.LONG_BYTES
    service.service.admission._recordings = Recordings()  # as in a process that has not given it
    again = ask(service, PATH, body, idempotency_key="k1")
    assert (again[0], again[1]["idempotent-replayed"], again[2]) == (200, "true", first[2])
    assert len(rows(service)) == 1


NOISE = random.Random(1).randbytes(2 * idempotency.MAX_STORED_BYTES)  # which no compression makes smaller


def packed(*blocks: bytes) -> str | None:
    """As it is stored, where the last of these is its end."""
    recording = Recording(KEY, "req_1", HEAD, list(blocks[:-1]))
    return asyncio.run(recording.packed(blocks[-1]))


KEY = Key.of("k1", PATH, b"{}")
HEAD = (200, [(b"content-type", b"application/json"), (b"x-octoai-cost", b"0.000012")])


@pytest.mark.parametrize(
    "blocks",
    [
        [b""],
        [b"\n", b"a\n"],
        [b"x" * (idempotency.LONG_BYTES - 1), b"y"],
        [b"x" * idempotency.LONG_BYTES, b"y"],
        [b"said " * 1_000_000, NOISE[:500_000], b"end"],
        [NOISE[: idempotency.MAX_STORED_BYTES - 2000]],
    ],
    ids=["empty", "short", "just short", "just long", "long", "nearly too long"],
)
def test_an_answer_of_any_length_is_read_as_it_was_given(blocks: list[bytes]) -> None:
    stored = packed(*blocks)
    assert stored is not None
    read = idempotency.unpacked(KEY, "req_1", base64.b64decode(stored), 0)
    assert (read.head, b"".join(read.blocks)) == (HEAD, b"".join(blocks))


def test_what_is_too_long_to_be_stored_is_not_compressed_to_its_end() -> None:
    assert packed(NOISE[: idempotency.MAX_STORED_BYTES]) is None
    blocks = [NOISE] * 20
    began = time.process_time()
    zlib.compress(b"".join(blocks), level=1)
    compressed = time.process_time()
    assert packed(*blocks) is None
    assert time.process_time() - compressed < (compressed - began) / 3


def test_others_are_served_while_a_long_answer_is_compressed() -> None:
    async def turns_of_the_loop() -> int:
        recording = Recording(KEY, "req_1", HEAD, [b"x" * 1024 * 1024] * 64)
        packing, turns = asyncio.ensure_future(recording.packed(b"end")), 0
        while not packing.done():
            await asyncio.sleep(0)
            turns += 1
        assert packing.result() is not None
        return turns

    assert asyncio.run(turns_of_the_loop()) > 10


def test_who_asks_again_joins_the_running_stream_from_its_first_event(slow: InProcess, begin: Any) -> None:
    first = begin(slow, "k1")
    first.until(b"w5 ")
    second = begin(slow, "k1")
    head, other = first.rest(), second.rest()
    assert b"idempotent-replayed: true" in other
    assert other.partition(b"\r\n\r\n")[2].endswith(head)
    assert other.count(b"w0 ") == other.count(b"w39 ") == 1
    assert statuses(slow) == ["settled"]
    assert len(slow.engine.seen) == 1


def test_whole_answers_that_are_asked_for_at_once_are_one(slow: InProcess) -> None:
    answers: list[Any] = []
    body = request(slow)
    asking = [
        threading.Thread(target=lambda: answers.append(ask(slow, PATH, body, idempotency_key="k1"))) for _ in range(8)
    ]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert {(status, text) for status, _, text in answers} == {(200, answers[0][2])}
    assert sum("idempotent-replayed" in headers for _, headers, _ in answers) == 7
    assert len(rows(slow)) == 1


def test_the_stream_goes_on_when_the_first_client_leaves_and_another_has_joined(slow: InProcess, begin: Any) -> None:
    first = begin(slow, "k1")
    first.until(b"w3 ")
    second = begin(slow, "k1")
    second.until(b"w3 ")
    first.close()
    assert b"w39 " in second.rest()
    (row,) = rows(slow)
    assert (row.status, row.outcome, row.completion_tokens) == ("settled", "finished", 40)


def test_the_stream_is_cancelled_within_a_second_when_all_have_left(slow: InProcess, begin: Any) -> None:
    first = begin(slow, "k1")
    first.until(b"w1 ")
    second = begin(slow, "k1")
    second.until(b"w1 ")
    second.close()
    time.sleep(0.1)
    assert slow.engine.abandoned == 0
    first.close()
    until(lambda: slow.engine.abandoned == 1 and is_idle(slow))
    (row,) = rows(slow)
    assert (row.status, row.outcome) == ("settled", "aborted")
    assert row.completion_tokens < 40


def test_who_joins_a_stream_that_fails_is_told_so(in_process: Start, begin: Any) -> None:
    service = in_process(ScriptedEngine(("a ", 0.5, EngineFailed("It broke."))))
    first = begin(service, "k1")
    first.until(b"a ")
    second = begin(service, "k1")
    ends = [first.rest(), second.rest()]
    assert all(b"engine_failed" in end and b"[DONE]" not in end for end in ends)


def test_another_body_under_the_key_is_a_conflict(service: InProcess) -> None:
    assert ask(service, PATH, request(service), idempotency_key="k1")[0] == 200
    status, headers, text = ask(service, PATH, request(service, max_tokens=7), idempotency_key="k1")
    assert (status, headers["x-should-retry"]) == (409, "false")
    assert json.loads(text)["code"] == "idempotency_key_conflict"
    body = {"model": service.model, "prompt": "Hi"}
    assert ask(service, "/v1/completions", body, idempotency_key="k1")[0] == 409
    assert len(rows(service)) == 1


def test_another_body_is_a_conflict_while_the_first_still_runs(slow: InProcess, begin: Any) -> None:
    first = begin(slow, "k1")
    first.until(b"w1 ")
    assert ask(slow, PATH, request(slow), idempotency_key="k1")[0] == 409
    assert b"w39 " in first.rest()


@pytest.mark.parametrize("key", ["", " ", "a b", "ä", "x" * 256, "a\tb"])
def test_a_malformed_key_is_refused(service: InProcess, key: str) -> None:
    status, _, text = ask(service, PATH, request(service), idempotency_key=key)
    assert status == 400
    assert json.loads(text)["param"] == "Idempotency-Key"


@pytest.mark.parametrize("key", ["x", "x" * 255, '"quoted"', "3f2504e0-4f89-11d3-9a0c-0305e82c3301"])
def test_every_other_key_is_taken(service: InProcess, key: str) -> None:
    assert ask(service, PATH, request(service), idempotency_key=key)[0] == 200


def test_keys_are_each_accounts_own(service: InProcess) -> None:
    service.books(lambda db: accounts.create(db, "other", plan="unlimited"))
    other = service.mint("other", "other").text
    mine = ask(service, PATH, request(service), idempotency_key="k1")
    theirs = ask(service, PATH, request(service), idempotency_key="k1", authorization=f"Bearer {other}")
    assert (mine[0], theirs[0]) == (200, 200)
    assert "idempotent-replayed" not in theirs[1]
    assert {row.account for row in rows(service)} == {"default", "other"}
    assert ask(service, PATH, request(service, max_tokens=3), idempotency_key="k1")[0] == 409


def test_a_request_that_was_refused_leaves_its_key_free(service: InProcess) -> None:
    service.books(lambda db: accounts.create(db, "poor", plan="unlimited", is_prepaid=True))
    headers = {"authorization": f"Bearer {service.mint('poor', 'poor').text}", "idempotency_key": "k1"}
    body = request(service, max_tokens=50)
    assert ask(service, PATH, body, **headers)[0] == 402
    assert ask(service, PATH, body, **headers)[0] == 402
    service.books(lambda db: accounts.credit(db, "poor", 1_000_000_000))
    status, said, _ = ask(service, PATH, body, **headers)
    assert status == 200
    assert "idempotent-replayed" not in said
    assert ask(service, PATH, body, **headers)[1]["idempotent-replayed"] == "true"
    assert len(rows(service)) == 1


def test_a_request_over_a_rate_leaves_its_key_free(service: InProcess) -> None:
    service.books(lambda db: accounts.create(db, "small", plan="unlimited", limits={"concurrent_requests": 0}))
    headers = {"authorization": f"Bearer {service.mint('small', 'small').text}", "idempotency_key": "k1"}
    assert ask(service, PATH, request(service), **headers)[0] == 429
    service.books(lambda db: accounts.update(db, "small", limits={"concurrent_requests": 1}))
    until(lambda: ask(service, PATH, request(service), **headers)[0] == 200, 2)
    assert len(rows(service)) == 1


def test_a_request_that_the_engine_refuses_costs_nothing_however_often_it_is_asked(in_process: Start) -> None:
    service = in_process(ScriptedEngine((BadRequest("not this"),)))
    for _ in range(3):
        assert ask(service, PATH, request(service), idempotency_key="k1")[0] == 400
    assert net_nanos(service) == 0


def test_a_retry_after_an_attempt_that_was_left_is_billed_instead_of_it(slow: InProcess, begin: Any) -> None:
    leave(slow, begin, "k1")
    assert begin(slow, "k1").rest().count(b"w39 ") == 1
    left, finished = rows(slow)
    assert (left.status, left.cost_nanos) == ("refunded", 0)
    assert (finished.status, finished.outcome) == ("settled", "finished")
    assert net_nanos(slow) == finished.cost_nanos


def test_no_more_than_three_attempts_are_given_back(slow: InProcess, begin: Any) -> None:
    for _ in range(6):
        leave(slow, begin, "k1")
    begin(slow, "k1").rest()
    assert statuses(slow) == ["refunded"] * 3 + ["settled"] * 4
    assert net_nanos(slow) == sum(row.cost_nanos for row in rows(slow))


def test_what_was_stored_is_replayed_after_a_crash(upstream: Upstream, tmp_path: Path) -> None:
    service = serve(tmp_path, upstream)
    asked = Request(Order(1), headers={"idempotency-key": "k1"})
    told = [answer(Target(service.url, service.token, MODEL), asked)]
    service.stop(signal.SIGKILL)
    service = serve(tmp_path, upstream)
    told.append(answer(Target(service.url, service.token, MODEL), asked))
    service.stop()
    assert told[1].headers["idempotent-replayed"] == "true"
    assert told[1].request_id == told[0].request_id
    assert told[1].usage == told[0].usage is not None
    assert upstream.written()[1].num_begun == 1
    assert len(Books.read(Place(service.data_dir)).rows) == 1


@pytest.mark.slow
def test_a_retry_after_a_crash_in_the_middle_is_billed_instead_of_it(upstream: Upstream, tmp_path: Path) -> None:
    service = serve(tmp_path, upstream)
    asked = Request(Order(1, num_tokens=60, pace=0.05), headers={"idempotency-key": "k1"})
    told: list[Told] = []
    asking = threading.Thread(target=lambda: told.append(answer(Target(service.url, service.token, MODEL), asked)))
    asking.start()
    time.sleep(1.5)
    service.stop(signal.SIGKILL)
    asking.join()
    service = serve(tmp_path, upstream)
    told.append(answer(Target(service.url, service.token, MODEL), asked))
    service.stop()
    books = Books.read(Place(service.data_dir))
    (before,) = books.by_request_id[str(told[0].request_id)]
    (after,) = books.by_request_id[str(told[1].request_id)]
    assert before.status == "refunded"
    assert before.completion_tokens > 0
    assert (after.status, after.completion_tokens) == ("settled", 60)


def answer(target: Target, asked: Request) -> Told:
    return asyncio.run(ask_once(target, asked, Told(asked.order.number, "kept")))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hangs_up", [True, False])
@pytest.mark.parametrize("at_answer", [True, False])
def test_a_retry_of_the_sdk_never_bills_twice(in_process: Start, stream: bool, hangs_up: bool, at_answer: bool) -> None:
    service = in_process(ScriptedEngine(tuple(step for word in SLOW[:20:2] for step in (word, 0.02))))
    proxy = LossyProxy(service.url, 2, hangs_up=hangs_up, at_answer=at_answer)
    with OctoAI(api_key=service.token, base_url=f"{proxy.url}/v1", max_retries=3) as client:
        params: dict[str, Any] = {"model": service.model, "messages": [{"role": "user", "content": "Hi"}]}
        if stream:
            with client.text_gen.create_chat_completion_stream(**params) as chunks:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = client.text_gen.create_chat_completion(**params).choices[0].message.content
    proxy.close()
    assert text == "".join(str(word) for word in SLOW[:20:2])
    assert proxy.num_connections == 3
    until(lambda: is_idle(service), 2)
    ended = [row for row in rows(service) if row.status == "settled"]
    assert [(row.outcome, row.completion_tokens) for row in ended] == [("finished", 10)]
    assert net_nanos(service) == ended[0].cost_nanos
