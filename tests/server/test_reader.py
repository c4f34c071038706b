"""What becomes of events that no server should send, or few do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from octoai.server.engines.answer import Answer
from octoai.server.engines.base import Delta, Event, Finished, Started, Usage
from octoai.server.engines.plain import Habits
from tests.server.misbehaving import DONE, GENERATION, event
from tests.server.singly import singly

TWO = replace(GENERATION, n=2)
STOP = event("", "stop")


def usage(prompt: int, completion: int | None, **more: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}


def sums(prompt: int, completion: int | None) -> bytes:
    return b"data: " + json.dumps({"choices": [], **usage(prompt, completion)}).encode() + b"\n\n"


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


# Counts


@pytest.mark.parametrize("more", [{}, {"usage": None}], ids=["silent", "null"])
@pytest.mark.parametrize("habits", [Habits(), None], ids=["a second time", "once"])
def test_text_after_a_sum_is_counted_where_no_other_sum_is_said(more: dict[str, Any], habits: Habits | None) -> None:
    for _ in range(2):
        answer = Answer(GENERATION, habits)
        events = answer.events(event("", **usage(7, 0)) + b"".join(event(f"w{each}", **more) for each in range(50)))
        assert [each.completion_tokens for each in singly(events) if isinstance(each, Delta)] == [*range(1, 51)]
        assert answer.so_far() == [Started(7), Delta(0, "", 50)]
        assert end(answer.events(STOP + DONE)).usage == Usage(7, 0, 50)


def test_what_was_said_before_is_part_of_what_is_counted_after() -> None:
    answer = Answer(GENERATION)
    answer.events(event("a", **usage(7, 3)) + sums(7, 5) + event("b") + event("c"))
    assert answer.so_far() == [Started(7), Delta(0, "", 7)]
    assert end(answer.events(STOP + DONE)).usage == Usage(7, 0, 7)


def test_a_sum_in_the_end_holds() -> None:
    answer = Answer(GENERATION)
    assert end(answer.events(event("a") + event("b") + STOP + sums(7, 5) + DONE)).usage == Usage(7, 0, 5)


@pytest.mark.parametrize("last", [0, None])
def test_a_sum_of_none_does_not_make_an_answer_free(last: int | None) -> None:
    answer = Answer(GENERATION)
    given = event("a") + event("b") + event("", "stop", **usage(7, 2)) + sums(7, last) + DONE
    assert end(answer.events(given)).usage == Usage(7, 0, 2)


# The end


@pytest.mark.parametrize(
    "after", [DONE, event("z"), b"data: bye\n\n", sums(9, 9)], ids=["twice", "text", "word", "sum"]
)
def test_nothing_after_the_end_is_read(after: bytes) -> None:
    whole = event("a") + STOP + sums(4, 1) + DONE
    for blocks in ([whole + after], [whole, after]):
        answer = Answer(GENERATION)
        events = [each for block in blocks for each in answer.events(block)]
        assert events == [Started(0), Delta(0, "a", 1), Finished({0: "stop"}, Usage(4, 0, 1))]
        assert answer.is_whole
