"""What a model thinks, told from what it says: read as quickly, and counted."""

from __future__ import annotations

import json

import pytest

from octoai.server.engines.base import Delta, Deltas, Event, Finished, Started, Usage
from octoai.server.engines.openai import reader
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.plain import Habits
from tests.server.engine_events import BOTH, ONE, TIMED, saying
from tests.server.singly import singly


def test_what_a_model_thinks_is_told_from_what_it_says_and_read_as_quickly() -> None:
    def block(num_prompt: int) -> bytes:
        parts = []
        for number in range(1, 41):
            said = "reasoning_content" if number <= 20 else "content"
            counts = BOTH.replace("3", f"{num_prompt}") % (num_prompt + number, number)
            parts.append(saying(f"w{number}", counts).replace(b"content", said.encode()))
        end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
        return b"".join([*parts, end, b"\n\ndata: [DONE]\n\n"])

    def expected(num_prompt: int) -> list[Event]:
        thoughts = [Delta(0, "", number, reasoning=f"w{number}") for number in range(1, 21)]
        said = [Delta(0, f"w{number}", number) for number in range(21, 41)]
        return [Started(num_prompt), *thoughts, *said, Finished({0: "stop"}, Usage(num_prompt, 0, 40, 20))]

    habits = Habits()
    first, second = Answer(ONE, habits).events(block(3)), Answer(ONE, habits).events(block(5))
    assert [*singly(first)] == expected(3)
    assert [*singly(second)] == expected(5)
    kinds = [Started, Delta, Deltas, Delta, Deltas, Finished]
    assert [type(event) for event in first] == [type(event) for event in second] == kinds


def test_llama_cpps_thoughts_are_known_by_their_shape_too(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    decoded = reader.decoded
    monkeypatch.setattr(reader, "decoded", lambda data: parsed.append(data) or decoded(data))
    answer, events = Answer(ONE), []
    for number in range(1, 21):
        event = TIMED.replace(b'_n":9', b'_n":%d' % number)
        if number <= 10:
            event = event.replace(b'"content"', b'"reasoning_content"')
        events += [*singly(answer.events(event + b"\n\n"))]
    assert [event.reasoning or event.text for event in events[1:] if isinstance(event, Delta)] == ["a"] * 20
    assert [bool(event.reasoning) for event in events[1:] if isinstance(event, Delta)] == [True] * 10 + [False] * 10
    assert len(parsed) == 2


def test_how_much_was_thought_is_as_the_engine_says_where_it_does() -> None:
    def answer(thought: int) -> bytes:
        usage = {"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": thought}}
        events = [
            {"choices": [{"index": 0, "delta": {"reasoning_content": "a"}}]},
            {"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]
        texts = [json.dumps(event, separators=(",", ":")) for event in events]
        return "".join(f"data: {text}\n\n" for text in [*texts, "[DONE]"]).encode()

    habits = Habits()
    for thought, wanted in ((7, 7), (5, 5), (0, 1), (99, 9)):  # the last two are known by the first's shape
        *_, finished = Answer(ONE, habits).events(answer(thought))
        assert finished == Finished({0: "stop"}, Usage(3, 0, 9, wanted))


def test_thoughts_are_counted_also_where_the_engine_does_not_count() -> None:
    chunks = [{"choices": [{"index": 0, "delta": {"reasoning": "a"}}]}, {"choices": [{"delta": {"content": "b"}}]}]
    answer = Answer(ONE)
    events = answer.events(b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks))
    assert events == [Started(0), Delta(0, "", 1, reasoning="a"), Delta(0, "b", 2)]
    assert answer.so_far()[1:] == [Delta(0, "", 2)]


@pytest.mark.parametrize("told", [{"reasoning_tokens": "7"}, {"reasoning_tokens": -7}, {}, 7, None, ["x"]])
def test_odd_words_on_how_much_was_thought_fail_no_answer(told: object) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": told}
    events = [{"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]}, {"usage": usage}]
    block = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    habits = Habits()
    for _ in range(2):
        *_, finished = Answer(ONE, habits).events(block.encode())
        assert finished == Finished({0: "stop"}, Usage(3, 0, 9))


def test_a_completion_may_be_thought_too() -> None:
    chunk = {"choices": [{"index": 0, "text": "", "reasoning": "hm"}]}
    assert Answer(ONE).events(b"data: %b\n\n" % json.dumps(chunk).encode())[1:] == [Delta(0, "", 1, reasoning="hm")]
