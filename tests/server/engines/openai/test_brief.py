"""Brief answers of a quick engine are asked for as a whole, and mean what their events would have meant."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.engines.base import Delta, Event, Finished, Generation, Started, Usage
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.briefly import Briefly
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.engines.openai.whole import whole
from octoai.server.errors import BadRequest, EngineFailed, Refusal
from tests.server.misbehaving import GENERATION, WHOLE, Reply, Upstream, answers, generated, raw, run, says, soon, up
from tests.server.singly import singly

BRIEF = replace(GENERATION, is_stream=False)
TEXT = Generation(max_tokens=9, text="Say", is_stream=False)
USAGE = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}


def answer(message: dict[str, Any] | None = None, reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    """As vLLM gives one, with what it has nothing to say of."""
    message = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": []} | (message or {})
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason, "stop_reason": None}
    return {"object": "chat.completion", "choices": [choice], "usage": {**USAGE, "prompt_tokens_details": None}} | more


def gives(said: Any) -> Reply:
    return answers(200, said if isinstance(said, bytes) else json.dumps(said).encode())


@asynccontextmanager
async def quick(upstream: Upstream, **options: Any) -> AsyncIterator[OpenAIEngine]:
    """An engine that has answered quickly before: it streamed."""
    reply, upstream.reply = upstream.reply, says(*WHOLE)
    async with up(upstream, **options) as engine:
        await generated(engine, BRIEF)
        upstream.reply = reply
        upstream.requests.clear()
        yield engine


def asked(upstream: Upstream) -> list[dict[str, Any]]:
    return [json.loads(body) for line, _, body in upstream.requests if line.startswith("POST")]


class Kept(Upstream):
    """Its connections go on after an answer."""

    def is_last(self, line: str) -> bool:
        return False


def read(said: dict[str, Any], generation: Generation = BRIEF) -> Sequence[Event]:
    return whole(json.dumps(said).encode(), generation)


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
def test_it_is_asked_for_as_a_whole_and_says_what_it_counted(dialect: str) -> None:
    async def main() -> None:
        upstream = Upstream(gives(answer()))
        async with quick(upstream, dialect=dialect) as engine:
            events = await generated(engine, BRIEF)
            assert events == [Started(30), Delta(0, "Hello", 5), Finished({0: "stop"}, Usage(30, 0, 5))]
            upstream.reply = gives({"choices": [{"index": 0, "text": "Hi", "finish_reason": "length"}], "usage": USAGE})
            events = await generated(engine, TEXT)
            assert events == [Started(30), Delta(0, "Hi", 5), Finished({0: "length"}, Usage(30, 0, 5))]
        for body in asked(upstream):
            assert body["stream"] is False
            assert "stream_options" not in body

    run(main())


@pytest.mark.parametrize("dialect", ["llama.cpp", "ollama"])
def test_servers_on_the_same_machine_are_asked_to_stream(dialect: str) -> None:
    """They are slow, and llama.cpp's keeps computing a whole answer that is left."""

    async def main() -> None:
        upstream = Upstream()
        async with quick(upstream, dialect=dialect) as engine:
            await generated(engine, BRIEF)
        assert [body["stream"] for body in asked(upstream)] == [True]

    run(main())


@pytest.mark.parametrize(
    "said",
    [
        answer(usage=None),
        answer(usage={"prompt_tokens": 3}),
        answer(usage={"completion_tokens": 5}),
        answer(usage={**USAGE, "completion_tokens": 0}),
        answer({"reasoning": "Hm"}),
    ],
    ids=["no usage", "half of it", "the other half", "none, where there was text", "how many are reasoning"],
)
def test_what_is_not_counted_is_streamed_then_and_from_then_on(said: Any) -> None:
    async def main() -> None:
        upstream = Upstream()
        streamed = upstream.reply

        async def reply(up: Upstream, writer: asyncio.StreamWriter) -> None:
            await (streamed if json.loads(up.requests[-1][2])["stream"] else gives(said))(up, writer)

        upstream.reply = reply
        async with quick(upstream) as engine:
            for _ in range(2):
                events = await generated(engine, BRIEF)
                assert events[-1] == Finished({0: "stop"}, Usage(4, 0, 2))
        assert [body["stream"] for body in asked(upstream)] == [False, True, True]

    run(main())


@pytest.mark.parametrize("counts", [True, False])
def test_a_server_that_streams_all_the_same_is_read_and_asked_to_stream(*, counts: bool) -> None:
    """Some count only where they are asked to, and then it is asked again."""

    async def main() -> None:
        upstream = Upstream()
        streamed, uncounted = upstream.reply, says(*[block for block in WHOLE if counts or b"usage" not in block])

        async def reply(up: Upstream, writer: asyncio.StreamWriter) -> None:
            await (streamed if json.loads(up.requests[-1][2])["stream"] else uncounted)(up, writer)

        upstream.reply = reply
        async with quick(upstream) as engine:
            for _ in range(2):
                assert (await generated(engine, BRIEF))[-1] == Finished({0: "stop"}, Usage(4, 0, 2))
        streams = [False, True] if counts else [False, True, True]
        assert [body["stream"] for body in asked(upstream)] == streams

    run(main())


@pytest.mark.parametrize(
    "before", [b"id: 1\n", b"retry: 3000\n\n", b"\r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf: hello\n\n"]
)
def test_a_stream_is_known_by_whatever_it_may_begin_with(before: bytes) -> None:
    async def main() -> None:
        upstream = Upstream(says(before, *WHOLE))
        async with quick(upstream) as engine:
            for _ in range(2):
                assert (await generated(engine, BRIEF))[-1] == Finished({0: "stop"}, Usage(4, 0, 2))
        assert [body["stream"] for body in asked(upstream)] == [False, True]

    run(main())


def refuses(message: str, upstream: Upstream, *, streams: bool) -> None:
    """Whole answers, and streams where it gives none either."""
    refused = answers(400, json.dumps({"error": {"message": message}}).encode())

    async def reply(up: Upstream, writer: asyncio.StreamWriter) -> None:
        is_stream = json.loads(up.requests[-1][2])["stream"]
        await (says(*WHOLE) if streams and is_stream else refused)(up, writer)

    upstream.reply = reply


@pytest.mark.parametrize(
    "message",
    [
        "This model only support stream mode, please enable the stream parameter to access the model.",
        "parameter.enable_thinking must be set to false for non-streaming calls",
        "Streaming is required",
    ],
)
def test_a_server_that_refuses_whole_answers_is_asked_to_stream_from_then_on(message: str) -> None:
    async def main() -> None:
        async with quick(upstream := Upstream()) as engine:
            refuses(message, upstream, streams=True)
            for _ in range(2):
                assert (await generated(engine, BRIEF))[-1] == Finished({0: "stop"}, Usage(4, 0, 2))
        assert [body["stream"] for body in asked(upstream)] == [False, True, True]

    run(main())


@pytest.mark.parametrize(
    ("message", "streams"),
    [("no tool is named `stream`", [False, True, False]), ("too hot", [False, False])],
)
def test_what_is_refused_as_a_stream_as_well_says_nothing_of_the_server(message: str, streams: list[bool]) -> None:
    async def main() -> None:
        async with quick(upstream := Upstream()) as engine:
            refuses(message, upstream, streams=False)
            with pytest.raises(BadRequest, match=message):
                await generated(engine, BRIEF)
            upstream.reply = gives(answer())
            await generated(engine, BRIEF)
        assert [body["stream"] for body in asked(upstream)] == streams

    run(main())


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (says(*WHOLE[:2]), EngineFailed),
        (answers(400, b'{"error": {"message": "no"}}'), BadRequest),
        (answers(500, b"{}"), EngineFailed),
        (gives(b"<html>hello</html>"), EngineFailed),
        (gives(b"[]"), EngineFailed),
        (gives(answer({"tool_calls": 5})), EngineFailed),
        (gives(answer({"tool_calls": ["f"]})), EngineFailed),
        (gives({"object": "error", "message": "CUDA out of memory"}), EngineFailed),
        (gives(answer(reason=None)), EngineFailed),
        (gives(answer({"content": 5})), EngineFailed),
        (gives({"choices": [5], "usage": USAGE}), EngineFailed),
        (gives({"choices": 5, "usage": USAGE}), EngineFailed),
        (gives(answer(usage={**USAGE, "completion_tokens": -1})), EngineFailed),
        (gives({"choices": [], "usage": USAGE}), EngineFailed),
        (raw(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{", 0.01), EngineFailed),
        (raw(b"", 0.0), EngineFailed),
    ],
)
def test_what_is_no_answer_is_refused_as_a_streams_is(reply: Reply, kind: type[Refusal]) -> None:
    async def main() -> None:
        async with quick(Upstream(reply)) as engine:
            with pytest.raises(kind):
                await generated(engine, BRIEF)

    run(main())


PIECES = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4)


@given(
    text=PIECES,
    thought=st.lists(st.text(min_size=1, max_size=4), max_size=2),
    reason=st.sampled_from(["stop", "length"]),
)
def test_an_answer_means_the_same_streamed_or_whole(text: list[str], thought: list[str], reason: str) -> None:
    """Also as who reads it would put it together."""
    num_tokens = len(text) + len(thought)
    usage = {"prompt_tokens": 30, "completion_tokens": num_tokens, "prompt_tokens_details": {"cached_tokens": 16}}
    usage |= {"completion_tokens_details": {"reasoning_tokens": len(thought)}}
    message = {"content": "".join(text), "reasoning_content": "".join(thought) or None}
    choices = [{"delta": {"reasoning_content": piece}} for piece in thought]
    choices += [{"delta": {"content": piece}} for piece in text]
    chunks = [{"choices": [{"index": 0, **choice, "finish_reason": None}]} for choice in choices]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}, {"choices": [], "usage": usage}]
    lines = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks) + b"data: [DONE]\n\n"
    streamed = Answer(BRIEF).events(lines)
    at_once = read(answer(message, reason, usage=usage))
    assert _together(streamed) == _together(at_once)
    assert streamed[-1] == at_once[-1] == Finished({0: reason}, Usage(30, 16, num_tokens, len(thought)))


def _together(events: Sequence[Event]) -> tuple[str, str, int]:
    deltas = [event for event in singly(events) if isinstance(event, Delta)]
    text, reasoning = ("".join(getattr(delta, name) for delta in deltas) for name in ("text", "reasoning"))
    return text, reasoning, deltas[-1].completion_tokens


def test_how_much_of_it_was_thought_is_not_guessed() -> None:
    thought = read(answer({"content": None, "reasoning": "Hm"}, "length"))
    assert thought[-1] == Finished({0: "length"}, Usage(30, 0, 5, 5))
    assert not read(answer({"reasoning": "Hm"}))
    assert not read(answer({"content": None, "reasoning": "Hm", "tool_calls": [{"id": "a", "function": {}}]}))


def test_calls_of_tools_and_logprobs_are_those_of_a_stream() -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}, {"id": "b", "function": {}}]
    message = {"content": None, "tool_calls": calls}
    _, said, end = read(answer(message, "tool_calls"))
    assert isinstance(said, Delta)
    assert said.tool_calls is not None
    assert [call["index"] for call in said.tool_calls] == [0, 1]
    assert said.tool_calls[0] == {**calls[0], "index": 0}
    odd = [{"id": "a", "index": index, "function": {"name": "f", "arguments": "{}"}} for index in (-1, -1, 0)]
    _, said, _ = read(answer({"tool_calls": odd}, "tool_calls"))  # SGLang says -1 of each
    assert isinstance(said, Delta)
    assert [(call["index"], call["function"]["arguments"]) for call in said.tool_calls or ()] == [
        (0, "{}"),
        (1, "{}"),
        (2, "{}"),
    ]
    assert isinstance(end, Finished)
    assert end.reasons == {0: "tool_calls"}

    logprobs = {"content": [{"token": "Hello", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
    choice = {**answer()["choices"][0], "logprobs": logprobs}
    _, said, _ = read(answer(choices=[choice]), replace(BRIEF, logprobs=0))
    assert isinstance(said, Delta)
    assert said.logprobs is not None
    assert said.logprobs[0]["logprob"] == -0.5


def test_one_that_is_cancelled_is_counted_where_it_comes_in_a_moment() -> None:
    counted: list[Sequence[Event]] = []

    async def main() -> None:
        said = json.dumps(answer()).encode()

        async def slowly(_: Upstream, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said[:40])
            await asyncio.sleep(0.2)
            writer.write(said[40:])

        upstream = Kept(slowly)
        async with quick(upstream) as engine:
            await _cancelled(engine, upstream, counted)
            assert counted == [(Started(30), Delta(0, "Hello", 5), Finished({0: "stop"}, Usage(30, 0, 5)))]
            await generated(engine, BRIEF)
        assert len(asked(upstream)) == 2

    run(main())


def test_one_that_is_cancelled_is_not_waited_for_long() -> None:
    counted: list[Sequence[Event]] = []

    async def main() -> None:
        async def never(_: Upstream, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(60)

        upstream = Upstream(never)
        async with quick(upstream) as engine:
            began = time.monotonic()
            await _cancelled(engine, upstream, counted)
            assert 0.5 < time.monotonic() - began < 1.5
            await soon(lambda: upstream.num_generating == 0)
            upstream.reply = says(*WHOLE)
            await generated(engine, BRIEF)
        assert counted == []
        assert [body["stream"] for body in asked(upstream)] == [False, True]  # it is not quick any more

    run(main())


@pytest.mark.parametrize(
    "generation",
    [
        replace(BRIEF, max_tokens=33),
        replace(BRIEF, n=2),
        replace(BRIEF, is_stream=True),
        replace(BRIEF, messages=[{"role": "user", "content": "x" * 17_000}]),
        replace(BRIEF, messages=[{"role": "assistant", "reasoning_content": "é" * 9_000, "content": "x"}]),
        replace(
            BRIEF, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
        ),
    ],
    ids=["long", "several", "a stream", "a long prompt", "long in another place", "an image"],
)
def test_others_are_streamed(generation: Generation) -> None:
    async def main() -> None:
        upstream = Upstream()
        async with quick(upstream) as engine:
            await generated(engine, generation)
        assert [body["stream"] for body in asked(upstream)] == [True]

    run(main())


def test_a_slow_engine_is_asked_to_stream_until_it_has_been_quick_for_a_while() -> None:
    briefly = Briefly(gives_whole=True)
    assert not briefly.is_quick  # nobody knows yet
    briefly.takes_longer(0.1)
    assert not briefly.is_quick
    briefly.took(0.1)
    assert briefly.is_quick
    briefly.took(1.0)
    num_streamed = 0
    while not briefly.is_quick:
        briefly.took(0.1)
        num_streamed += 1
    assert 5 < num_streamed < 20
    briefly.takes_longer(0.5)
    assert not briefly.is_quick


def test_one_whose_connection_breaks_while_it_is_computed_is_not_asked_for_again() -> None:
    """Of a kept connection that was closed before, that is seen at once."""

    async def main() -> None:
        async def breaks(_: Upstream, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.7)
            writer.transport.abort()

        upstream = Kept(gives(answer()))
        async with quick(upstream) as engine:
            await generated(engine, BRIEF)
            upstream.reply = breaks
            with pytest.raises(EngineFailed):
                await generated(engine, BRIEF)
        assert len(asked(upstream)) == 2

    run(main())


def test_one_that_fails_at_once_is_not_quick() -> None:
    async def main() -> None:
        upstream = Upstream(answers(500, b"{}"))
        async with up(upstream) as engine:
            for _ in range(2):
                with pytest.raises(EngineFailed):
                    await generated(engine, BRIEF)
        assert [body["stream"] for body in asked(upstream)] == [True, True]

    run(main())


async def _cancelled(engine: OpenAIEngine, upstream: Upstream, counted: list[Sequence[Event]]) -> None:
    async def ask() -> None:
        async with aclosing(engine.generate(BRIEF, counted.append)) as batches:
            async for _ in batches:
                pass

    asking = asyncio.create_task(ask())
    await soon(lambda: upstream.num_generating == 1)
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
