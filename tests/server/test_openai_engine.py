"""`OpenAIEngine` against a server that misbehaves in every way servers do."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from octoai.server.engines import openai_http
from octoai.server.engines.answer import Answer
from octoai.server.engines.base import Delta, Event, Finished, Generation, Started, Usage
from octoai.server.engines.openai_http import OpenAIEngine
from octoai.server.engines.reader import SLACK_TOKENS
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Refusal, Unavailable
from tests.server.misbehaving import (
    DONE,
    GENERATION,
    HEAD,
    MODELS,
    UNSEEN,
    USAGE,
    WHOLE,
    Reply,
    Upstream,
    answers,
    chunk,
    event,
    forever,
    generated,
    num_deltas,
    raw,
    refused,
    run,
    says,
    up,
)
from tests.server.singly import singly


@pytest.mark.parametrize("is_unix", [False, True], ids=["http", "unix"])
def test_an_answer_is_read_and_the_key_is_sent(tmp_path: Path, is_unix: bool) -> None:
    async def main() -> None:
        upstream = Upstream()
        async with up(upstream, tmp_path / "s" if is_unix else None, key="Secret-Key", context_length=99) as engine:
            assert engine.is_ready
            assert engine.context_length == 4096  # what the server says, over what was configured
            assert [*singly(await generated(engine))] == [
                Started(0),
                Delta(0, "Hel", 1),
                Delta(0, "lo", 2),
                Finished({0: "stop"}, Usage(4, 0, 2)),
            ]
            text = Generation(max_tokens=1, text="x")
            await generated(engine, text)
        assert [line.split()[:2] for line, _, _ in upstream.requests] == [
            ["GET", "/v1/models"],
            ["POST", "/v1/chat/completions"],
            ["POST", "/v1/completions"],
        ]
        assert {headers["authorization"] for _, headers, _ in upstream.requests} == {"Bearer Secret-Key"}
        asked = json.loads(upstream.requests[1][2])
        assert (asked["model"], asked["stream"]) == ("up", True)

    run(main())


def test_without_a_key_none_is_sent() -> None:
    async def main() -> None:
        upstream = Upstream()
        async with up(upstream) as engine:
            await generated(engine)
        assert {headers["authorization"] for _, headers, _ in upstream.requests} == {""}

    run(main())


@pytest.mark.parametrize("size", [1, 7])
def test_it_does_not_matter_how_bytes_are_cut(size: int) -> None:
    text = b"".join([event("H\u00e9"), b": comment\n\n", b"event: x\r\n", event("\U0001f600"), *WHOLE[2:]])
    text = text.replace(b"\\u00e9", "é".encode()).replace(b"\\ud83d\\ude00", "😀".encode())
    blocks = [text[start : start + size] for start in range(0, len(text), size)]

    async def main() -> None:
        async with up(Upstream(says(*blocks))) as engine:
            said = [event.text for event in singly(await generated(engine)) if isinstance(event, Delta)]
            assert said == ["Hé", "😀"]

    run(main())


@pytest.mark.parametrize(
    ("reply", "deltas"),
    [
        (says(event("a"), event("b"), 0.05, end=False), 2),
        (says(event("a"), 0.05, end=True), 1),
        (says(event("a"), event("", "stop"), 0.05, end=True), 1),
        (says(event("a"), 0.05, DONE), 1),
        (says(event("a"), 0.05, b"data: {nonsense\n\n"), 1),
        (says(event("a"), 0.05, b"data: [1]\n\n"), 1),
        (says(event("a"), 0.05, b'data: {"error": {"message": "CUDA out of memory"}}\n\n'), 1),
        (says(event("a"), 0.05, b"data: " + b"x" * 3_000_000), 1),
        (raw(HEAD + chunk(event("a")) + b"zz\r\n", 0.05), 1),
        (raw(b"this is no HTTP at all\r\n\r\n", 0.05), 0),
        (raw(b"", 0.0), 0),
        (says(end=True), 0),
        (answers(200, b"<html>hello</html>"), 0),
        (answers(200, b'{"choices": []}'), 0),
    ],
    ids=[
        *("dies", "ends without [DONE]", "ends without [DONE] but with a reason", "[DONE] without a reason"),
        *("not JSON", "not an object", "an error", "no end of an event", "broken chunks", "not HTTP", "hangs up"),
        *("nothing", "a page", "a whole answer"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(reply: Reply, deltas: int) -> None:
    failure = refused(reply, EngineFailed, after=deltas)
    assert failure.status == 502
    assert "127.0.0.1" not in failure.message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, BadRequest), (413, BadRequest), (422, BadRequest), (429, Unavailable), (503, Unavailable)),
        *((500, EngineFailed), (401, EngineFailed), (404, EngineFailed), (204, EngineFailed)),
    ],
)
def test_its_refusals_become_ours(status: int, kind: type[Refusal]) -> None:
    refused(answers(status, b'{"error": {"message": "no"}}' if status != 204 else b""), kind)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("said", "told"),
    [(b"60", "60"), (b"0", "1"), (b"9" * 8, "3600"), (b"9" * 5000, "1"), (b"Mon, 30 Nov 2026 10:00:00 GMT", "1")],
)
def test_when_it_is_to_be_asked_again_goes_on(status: int, said: bytes, told: str) -> None:
    busy = refused(answers(status, b"{}", b"Retry-After: " + said), Unavailable)
    assert busy.headers["retry-after"] == told
    assert refused(answers(status, b"{}"), Unavailable).headers["retry-after"] == "1"


def test_when_to_ask_again_is_not_what_an_earlier_answer_said_on_the_connection() -> None:
    async def main() -> None:
        upstream = Upstream(answers(429, b"{}", b"Retry-After: 60"))
        upstream.is_last = lambda _: False  # type: ignore[method-assign]
        async with up(upstream) as engine:
            for reply, told in ((upstream.reply, "60"), (answers(503, b"{}"), "1")):
                upstream.reply = reply
                with pytest.raises(Unavailable) as busy:
                    await generated(engine)
                assert busy.value.headers["retry-after"] == told

    run(main())


def test_its_word_on_a_prompt_too_long_becomes_ours() -> None:
    message = "This model's maximum context length is 4096 tokens. However, your request has 5000 input tokens."
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}).encode()
    refusal = refused(answers(400, body), ContextLengthExceeded)
    assert "4096" in refusal.message
    assert "5000" in refusal.message


def test_an_endless_error_is_not_read_to_its_end() -> None:
    reply = says(*([b"x" * 60_000] * 3), 30.0, head=HEAD.replace(b"200 OK", b"500 X"))
    began = time.monotonic()
    refused(reply, EngineFailed)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("reply", "deltas"),
    [(raw(b"", 30.0), 0), (raw(HEAD, 30.0), 0), (says(event("a"), 30.0), 1)],
    ids=["before its head", "before its first event", "in the middle"],
)
def test_a_server_that_falls_silent_is_given_up(reply: Reply, deltas: int) -> None:
    began = time.monotonic()
    refused(reply, EngineFailed, after=deltas, stall_seconds=0.3)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("generation", [GENERATION, UNSEEN], ids=["stream", "unseen"])
def test_an_answer_is_whole_at_its_done_also_where_the_body_never_ends(generation: Generation) -> None:
    async def main() -> None:
        async with up(Upstream(says(*WHOLE, 30.0))) as engine:
            began = time.monotonic()
            assert isinstance((await generated(engine, generation))[-1], Finished)
            assert time.monotonic() - began < 2

    run(main())


def slowly(num: int, *end: bytes) -> Reply:
    words = [event(f"{number} ") for number in range(num)]
    return says(*(each for word in words for each in (word, 0.01)), *end)


@pytest.mark.parametrize("gathers", ["STREAM_GATHER_SECONDS", "WHOLE_GATHER_SECONDS"])
def test_what_comes_fast_is_read_in_larger_batches_after_the_first(
    gathers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What ends it is the end of the answer, and that of the connection.
    for constant in ("STREAM_GATHER_SECONDS", "WHOLE_GATHER_SECONDS"):
        monkeypatch.setattr(openai_http, constant, 30.0 if constant == gathers else 0.0)
    generations = {"STREAM_GATHER_SECONDS": GENERATION, "WHOLE_GATHER_SECONDS": UNSEEN}

    async def main() -> None:
        upstream, sizes = Upstream(slowly(20, event("", "stop"), USAGE, DONE)), {}
        async with up(upstream) as engine:
            for constant, generation in generations.items():
                async with aclosing(engine.generate(generation)) as batches:
                    sizes[constant] = [num_deltas(batch) async for batch in batches]
            upstream.reply = slowly(20)
            with pytest.raises(EngineFailed):
                await generated(engine, generations[gathers])
        gathered = sizes.pop(gathers)
        (singly,) = sizes.values()
        assert sum(singly) == sum(gathered) == 20
        assert len(singly) > 15
        assert len(gathered) <= 3
        assert gathered[0] < 5

    run(main())


@pytest.mark.parametrize("generation", [GENERATION, UNSEEN], ids=["stream", "unseen"])
def test_what_had_come_when_the_engine_broke_off_is_counted(generation: Generation) -> None:
    async def main() -> None:
        left: list[Sequence[Event]] = []
        async with up(Upstream(says(event("a"), 0.05, event("b"), event("c"), end=False))) as engine:
            batches = engine.generate(generation, left.append)
            await anext(batches)
            await asyncio.sleep(0.2)  # the rest, and the end of the connection, are here before they are asked for
            with pytest.raises(EngineFailed):
                async for _ in batches:
                    pass
        assert left == [[Started(0), Delta(0, "", 3)]]

    run(main())


def test_what_was_gathered_when_its_client_left_is_counted() -> None:
    async def main() -> None:
        left: list[Sequence[Event]] = []
        async with up(Upstream(says(event("a"), 0.01, event("b"), event("c"), 30.0))) as engine:
            batches = engine.generate(UNSEEN, left.append)
            await anext(batches)
            reading = asyncio.ensure_future(anext(batches))
            await asyncio.sleep(openai_http.WHOLE_GATHER_SECONDS / 2)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await batches.aclose()
        assert left == [[Started(0), Delta(0, "", 3)]]

    run(main())


def test_leaving_closes_the_connection_within_a_second() -> None:
    async def main() -> None:
        upstream = Upstream(forever)
        async with up(upstream) as engine:
            async with aclosing(engine.generate(GENERATION)) as batches:
                await anext(batches)
                assert upstream.num_generating == 1
            await _soon(lambda: upstream.num_generating == 0)

            upstream.reply = raw(b"", 30.0)  # and before its first byte
            task = asyncio.create_task(generated(engine))
            await _soon(lambda: upstream.num_generating == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await _soon(lambda: upstream.num_generating == 0)

    run(main())


def running_away(*, says_counts: bool) -> Reply:
    """Never stops, whatever was asked."""

    def said(number: int) -> bytes:
        usage = {"prompt_tokens": 4, "completion_tokens": number, "total_tokens": 4 + number}
        return event("word ", **({"usage": usage} if says_counts else {}))

    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for number in itertools.count(1, 50):
            writer.write(chunk(b"".join(map(said, range(number, number + 50)))))
            await writer.drain()
            await asyncio.sleep(0.0001)

    return reply


@pytest.mark.parametrize("generation", [GENERATION, UNSEEN], ids=["stream", "unseen"])
@pytest.mark.parametrize(("says_counts", "most"), [(True, 9 + SLACK_TOKENS), (False, 9 * 16 + SLACK_TOKENS)])
def test_an_engine_that_does_not_stop_is_left(generation: Generation, says_counts: bool, most: int) -> None:
    async def main() -> None:
        upstream = Upstream(running_away(says_counts=says_counts))
        for on_text in (None, lambda _: True):  # also where its reader need not wake up
            told: list[Sequence[Event]] = []
            async with up(upstream) as engine:
                with pytest.raises(EngineFailed, match="max_tokens"):
                    async for _ in engine.generate(generation, told.append, on_text):
                        pass
                await _soon(lambda: upstream.num_generating == 0)
            ((_, delta),) = told
            assert isinstance(delta, Delta)
            assert most < delta.completion_tokens < most + 1000

    run(main())


def test_an_engine_is_asked_for_no_more_than_its_window_and_left_where_it_says_more() -> None:
    async def main() -> None:
        models = json.dumps({"data": [{"id": "up", "max_model_len": 20}]}).encode()
        async with up(Upstream(running_away(says_counts=True), answers(200, models))) as engine:
            with pytest.raises(EngineFailed, match="max_tokens"):
                await generated(engine, Generation(max_tokens=10**9, text="x"))

    run(main())


def summed(count: int) -> dict[str, object]:
    return {"usage": {"prompt_tokens": 4, "completion_tokens": count}}


def thinking(number: int, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"reasoning_content": "so "}, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def calling(piece: str) -> bytes:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": piece}}
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}).encode() + b"\n\n"


LETTERS = [event(letter) for letter in "nine tokens" * 4000]  # as some servers make them up
SUM = b"data: " + json.dumps({"choices": [], **summed(4000)}).encode() + b"\n\n"


@pytest.mark.parametrize("is_in_one_read", [True, False], ids=["at once", "singly"])
@pytest.mark.parametrize(
    ("max_tokens", "events"),
    [
        (4000, LETTERS),
        (4000, [*LETTERS, SUM]),
        (9, [event("a", **summed(9)), event("b", **summed(20))]),  # guessed ahead
        (9, [event("a", **summed(9)), event("", "length", **summed(90_000))]),  # thoughts that nobody was told
        (9, [*map(thinking, range(20_000)), event("a")]),
        (9, [*(thinking(number, **summed(number)) for number in range(20_000)), event("a", **summed(20_001))]),
        (9, [calling(letter) for letter in '{"x": "%s"}' % ("y" * 1000)]),
    ],
    ids=["letters", "letters and their sum", "guesses", "hidden", "thoughts", "thoughts in the sum", "calls"],
)
def test_an_answer_may_seem_longer_than_it_is(max_tokens: int, events: list[bytes], is_in_one_read: bool) -> None:
    """By whatever it is counted, and however its events arrive."""
    answer = Answer(replace(GENERATION, max_tokens=max_tokens))
    for block in [b"".join(events)] if is_in_one_read else events:
        answer.read(block, [])
    assert isinstance(answer.events(event("", "length") + DONE)[-1], Finished)


def test_the_sum_of_several_choices_is_held_against_what_all_may_have() -> None:
    """Of which each event of this server says that of all, whosever text it has."""
    two = replace(GENERATION, n=2, max_tokens=40_000)
    answer = Answer(two)
    for number in range(2, 80_001, 2):
        answer.read(event("a", **summed(number)), [])
    second = {"index": 1, "delta": {"content": "b"}, "finish_reason": "length"}
    ended = b"data: " + json.dumps({"choices": [second], **summed(80_000)}).encode() + b"\n\n"
    assert isinstance(answer.events(ended + event("", "length") + DONE)[-1], Finished)


class Unimpressed(Upstream):
    """Ends its answer as if its client were still there, and keeps the connection open."""

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.reply(self, writer)
        await writer.drain()
        await asyncio.sleep(0.5)


def test_a_connection_that_was_hung_up_is_not_used_again_though_its_answer_came_to_an_end() -> None:
    async def main() -> None:
        upstream = Unimpressed(says(event("Hel"), 0.1, event("lo"), event("", "stop"), USAGE, DONE))
        async with up(upstream) as engine:
            async with aclosing(engine.generate(GENERATION)) as batches:
                await anext(batches)
            assert isinstance((await generated(engine))[-1], Finished)

    run(main())


async def _soon(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(1):
        while not fact():
            await asyncio.sleep(0.01)


def test_a_server_that_comes_later_is_found_and_one_that_goes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.1)

    async def main() -> None:
        path = tmp_path / "s"
        engine = OpenAIEngine(f"unix:{path}", model="up")
        await engine.start()
        assert not engine.is_ready
        with pytest.raises(Unavailable) as absent:
            await generated(engine)
        assert absent.value.headers["retry-after"]
        upstream = Upstream()
        server = await asyncio.start_unix_server(upstream.serve, path)
        await _soon(lambda: engine.is_ready)
        assert isinstance((await generated(engine))[-1], Finished)
        server.close()
        path.unlink(missing_ok=True)
        await _soon(lambda: not engine.is_ready)
        await engine.close()

    run(main())


@pytest.mark.parametrize(
    "models",
    [
        *(b"", b"not json", b"[]", b"5", b"null", b'{"data": 5}', b'{"data": [1, null]}', b"{}", b"\xff\xfe"),
        b'{"data": [{"id": "up", "meta": [], "max_model_len": "many"}]}',
        b'{"data": [{"id": "up", "meta": "x"}]}',
        *(b'{"data": [{"id": "up", "max_model_len": %s}]}' % said for said in (b"-1", b"true", b"9.5", b"%d" % 2**40)),
        b'{"data": [{"id": "other"}, {"id": "third"}]}',
    ],
)
def test_garbage_about_its_models_harms_nothing(models: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.05)

    async def main() -> None:
        upstream = Upstream(models=answers(200, models))
        async with up(upstream, context_length=77) as engine:
            assert engine.context_length == 77
            await asyncio.sleep(0.12)
            upstream.models = answers(200, json.dumps(MODELS).encode())
            await _soon(lambda: engine.is_ready and engine.context_length == 4096)

    run(main())


def test_a_server_that_accepts_and_says_nothing_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.2)

    async def main() -> None:
        began = time.monotonic()
        async with up(Upstream(models=raw(b"", 30.0))) as engine:
            assert time.monotonic() - began < 2
            assert not engine.is_ready

    run(main())


def test_a_server_too_busy_with_its_answers_to_list_its_models_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.2)

    async def main() -> None:
        upstream = Upstream(forever)
        async with up(upstream) as engine:
            long = Generation(max_tokens=9000, text="x")
            async with aclosing(engine.generate(long, on_text=lambda _: True)) as batches:
                await anext(batches)
                reading = asyncio.ensure_future(anext(batches))
                upstream.models = raw(b"", 30.0)
                for _ in range(20):
                    await asyncio.sleep(0.05)
                    assert engine.is_ready
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            await _soon(lambda: not engine.is_ready)

    run(main())


def test_a_server_that_cannot_be_asked_for_want_of_descriptors_is_not_away() -> None:
    async def main() -> None:
        async with up(Upstream(), dialect="llama.cpp") as engine:  # which keeps no connection
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            try:
                assert await engine.connect() is None
                with pytest.raises(Unavailable) as full:
                    await generated(engine)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert full.value.code == "overloaded"
            assert engine.is_ready

    run(main())


def test_one_that_wants_another_key_is_not_ready() -> None:
    async def main() -> None:
        async with up(Upstream(models=answers(401, b"{}"))) as engine:
            assert not engine.is_ready

    run(main())


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def main() -> None:
        async with up(Upstream()) as engine:
            assert isinstance((await generated(engine))[-1], Finished)

    run(main())


BODY = b"".join(chunk(block) for block in WHOLE) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "more",
    [b"HTTP/1.1 400 Bad\r\ncontent-length: 5\r\n\r\nhello", HEAD + chunk(event("more")), b"nonsense\r\n\r\n"],
    ids=["another answer", "a part of one", "no answer"],
)
@pytest.mark.parametrize("generation", [GENERATION, UNSEEN], ids=["stream", "unseen"])
def test_what_an_engine_says_behind_its_answer_is_no_part_of_it(more: bytes, generation: Generation) -> None:
    async def main() -> None:
        upstream = Upstream(raw(HEAD + BODY + more))
        upstream.is_last = lambda _: False  # type: ignore[method-assign]
        async with up(upstream) as engine:
            for _ in range(2):  # and its connection is not used again
                events = [*singly(await generated(engine, generation))]
                assert [each.text for each in events if isinstance(each, Delta)] == ["Hel", "lo"]
                assert events[-1] == Finished({0: "stop"}, Usage(4, 0, 2))
                assert not engine._pool._idle

    run(main())


def test_what_an_engine_says_behind_a_refusal_is_no_part_of_it() -> None:
    first, second = (b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n{}" % status for status in (400, 503))
    assert refused(raw(first + second), BadRequest).status == 400


def test_an_engine_that_changes_the_protocol_is_a_failure_and_no_error_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"
    began = time.monotonic()
    refused(raw(head, 5), EngineFailed)
    assert time.monotonic() - began < 2
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_password_in_its_url_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = OpenAIEngine("http://user:secret@127.0.0.1:9/v1", model="m")
        await engine.start()
        await engine.close()

    asyncio.run(main())
    assert "engine http://127.0.0.1:9/v1 does not answer yet" in caplog.text
    assert "secret" not in caplog.text
