"""How long an answer may be: an engine that does not stop is left, and what only seems too long is not."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from octoai.server.engines.base import Delta, Event, Finished, Generation
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.reader import SLACK_TOKENS
from octoai.server.errors import EngineFailed
from tests.server.misbehaving import (
    DONE,
    GENERATION,
    HEAD,
    UNSEEN,
    Reply,
    Upstream,
    answers,
    chunk,
    event,
    generated,
    run,
    soon,
    up,
)


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
                await soon(lambda: upstream.num_generating == 0)
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
