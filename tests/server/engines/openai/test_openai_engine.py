"""`OpenAIEngine` against a server that misbehaves in every way servers do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from octoai.server.engines.base import Delta, Event, Finished, Generation, Started, Usage
from octoai.server.engines.openai import engine as openai_http
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Refusal, Unavailable
from tests.server.misbehaving import (
    DONE,
    GENERATION,
    HEAD,
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
    soon,
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


def test_what_its_context_cannot_give_at_least_is_refused_before_it_is_asked() -> None:
    async def main() -> None:
        upstream = Upstream()
        async with up(upstream) as engine:
            await generated(engine, replace(GENERATION, max_tokens=6000, min_tokens=4096))
            assert [json.loads(body)["max_tokens"] for _, _, body in upstream.requests[1:]] == [4096]
            wanted = replace(GENERATION, max_tokens=6000, min_tokens=4097)
            for ask in (partial(generated, engine), engine.count_tokens):
                with pytest.raises(BadRequest, match=r"^min_tokens: at most 4096 here; the model's context") as refusal:
                    await ask(wanted)
                assert refusal.value.param == "min_tokens"
            assert len(upstream.requests) == 2

    run(main())


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
            await soon(lambda: upstream.num_generating == 0)

            upstream.reply = raw(b"", 30.0)  # and before its first byte
            task = asyncio.create_task(generated(engine))
            await soon(lambda: upstream.num_generating == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await soon(lambda: upstream.num_generating == 0)

    run(main())


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
