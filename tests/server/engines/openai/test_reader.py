"""What becomes of events that no server should send, or few do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from octoai.server.engines.base import Delta, Event, Finished, Started, Usage
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.plain import Habits
from octoai.server.errors import EngineFailed
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


def test_a_server_that_does_not_say_what_was_cached_has_cached_nothing() -> None:
    old = {"timings": {"prompt_n": 7, "predicted_n": 2}}
    assert end(Answer(GENERATION).events(event("a", **old) + event("", "stop", **old) + DONE)).usage == Usage(7, 0, 2)


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


# Choices


def said(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    "wrong",
    [
        said(index=0, delta={}, finish_reason=7),
        said(index=0, delta={}, finish_reason=["stop"]),
        said(index=1, delta={}, finish_reason="stop"),
        said(index=-1, delta={"content": "a"}),
        said(index="0", delta={"content": "a"}),
        said(index=0, delta={"content": ["a"]}),
        said(index=0, delta={"tool_calls": {"a": 1}}),
        said(index=0, delta={"tool_calls": ["a"]}),
        said(index=0, delta={"tool_calls": [{"index": "0", "id": "a"}]}),
        said(index=0, delta={"tool_calls": [{"index": 0, "id": 7}]}),
        said(index=0, delta={"tool_calls": [{"index": 0, "function": "a"}]}),
        said(index=0, delta={"tool_calls": [{"index": 0, "function": {"name": 7}}]}),
    ],
)
def test_what_no_choice_can_say_is_the_engines_failure(wrong: bytes) -> None:
    answer = Answer(GENERATION)
    answer.events(event("a"))
    with pytest.raises(EngineFailed):
        answer.events(wrong)


def test_a_choice_without_a_number_is_the_first() -> None:
    text, ended = said(index=None, delta={"content": "a"}), said(index=None, delta={}, finish_reason="stop")
    events = Answer(GENERATION).events(text + text + ended + DONE)
    assert [*singly(events)] == [Started(0), Delta(0, "a", 1), Delta(0, "a", 2), Finished({0: "stop"}, Usage(0, 0, 2))]


def test_an_answer_ends_when_each_of_its_choices_has() -> None:
    second = said(index=1, delta={"content": "b"})
    answer = Answer(TWO)
    answer.events(event("a") + second + STOP)
    with pytest.raises(EngineFailed):
        answer.events(DONE)
    answer = Answer(TWO)
    ended = said(index=1, delta={}, finish_reason="length")
    assert end(answer.events(event("a") + second + STOP + ended + DONE)).reasons == {0: "stop", 1: "length"}


def test_a_choice_that_was_begun_has_to_end() -> None:
    answer, begun = Answer(TWO), said(index=1, delta={"role": "assistant"})
    answer.events(begun + event("a") + STOP)
    with pytest.raises(EngineFailed):
        answer.events(DONE)


def test_a_server_that_gives_one_choice_whatever_is_asked_has_answered() -> None:
    assert end(Answer(TWO).events(event("a") + STOP + DONE)).reasons == {0: "stop"}


def test_why_a_model_declines_is_its_text() -> None:
    first = said(index=0, delta={"role": "assistant", "content": None, "refusal": "I can"})
    second = said(index=0, delta={"refusal": "not"})
    both = said(index=0, delta={"content": ".", "refusal": None})
    events = Answer(GENERATION).events(first + second + both + STOP + DONE)
    assert [each.text for each in singly(events) if isinstance(each, Delta)] == ["I can", "not", "."]
    assert end(events).usage.completion_tokens == 3


# Tools


def calls(*blocks: bytes) -> list[tuple[int, str | None, Any]]:
    found = [each for each in Answer(TWO).events(b"".join(blocks)) if isinstance(each, Delta)]
    return [(call["index"], call.get("id"), call.get("function")) for each in found for call in each.tool_calls or ()]


def calling(*said_of: dict[str, Any], choice: int = 0) -> bytes:
    return said(index=choice, delta={"tool_calls": said_of})


def test_calls_without_a_number_are_told_apart_by_their_ids() -> None:
    a, b = {"id": "a", "function": {"name": "f"}}, {"id": "b", "index": None, "function": {"name": "g"}}
    more = {"function": {"arguments": "{}"}}
    numbers = [(number, name) for number, name, _ in calls(calling(a, b), calling(more), calling(a | {"id": "c"}))]
    assert numbers == [(0, "a"), (1, "b"), (1, None), (2, "c")]
    assert [number for number, *_ in calls(calling(a), calling(a), calling(a, choice=1), calling(more))] == [0, 0, 0, 0]


def test_calls_without_a_number_may_take_turns_and_say_their_ids_late() -> None:
    begun = [{"id": id_, "function": {"name": "f"}} for id_ in "ab"]
    more = [{"id": id_, "function": {"arguments": "{}"}} for id_ in "ab"]
    assert [number for number, *_ in calls(*map(calling, begun + more))] == [0, 1, 0, 1]
    assert [number for number, *_ in calls(calling({"function": {"name": "f"}}), calling({"id": "a"}))] == [0, 0]


def test_calls_without_numbers_and_ids_are_told_apart_by_their_names() -> None:
    f, g, more = ({"function": each} for each in ({"name": "f"}, {"name": "g", "arguments": "{"}, {"arguments": "}"}))
    assert [number for number, *_ in calls(calling(f, g), calling(more), calling(f))] == [0, 1, 1, 2]
    late = {"id": "a"}  # the name comes later
    assert [number for number, *_ in calls(calling(late), calling(f), calling(more))] == [0, 0, 0]


def test_calls_whose_numbers_count_from_0_keep_them() -> None:
    first, second = {"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}, {"index": 1, "id": "b"}
    assert calls(calling(first), calling(second), calling({"index": 0, "function": {"arguments": "{}"}})) == [
        (0, "a", {"name": "f", "arguments": ""}),
        (1, "b", {"arguments": ""}),
        (0, None, {"arguments": "{}"}),
    ]


@pytest.mark.parametrize("numbers", [(1, 2), (5, 2), (10**9, 0), (1, None)])
def test_calls_are_numbered_in_the_order_in_which_they_begin(numbers: tuple[int, int | None]) -> None:
    """Clients keep them in a list, and look where the number says."""
    first, second = ({"index": n, "id": id_, "function": {"name": "f"}} for n, id_ in zip(numbers, "ab", strict=True))
    more = {"index": numbers[0], "function": {"arguments": "{}"}}
    of_both = calls(calling(first), calling(second), calling(more), calling(first | {"index": 7}, choice=1))
    assert [(number, id_) for number, id_, _ in of_both] == [(0, "a"), (1, "b"), (0, None), (0, "a")]


@pytest.mark.parametrize("typed", [{}, {"type": None}, {"type": "function"}], ids=repr)
@pytest.mark.parametrize("begun", [{}, {"function": None}, {"function": {"arguments": None}}], ids=repr)
def test_the_first_piece_of_a_call_and_no_other_has_its_type_and_a_function(
    typed: dict[str, Any], begun: dict[str, Any]
) -> None:
    first, more = {"index": 0, "id": "a", **typed, **begun}, {"index": 0, "function": {"name": "f"}, **typed}
    found = [each for each in Answer(TWO).events(calling(first) + calling(more)) if isinstance(each, Delta)]
    assert [call for each in found for call in each.tool_calls or ()] == [
        {"index": 0, "id": "a", "type": "function", "function": {"arguments": ""}},
        {"index": 0, "function": {"name": "f"}},
    ]


def test_calls_that_all_have_the_same_number_are_told_apart_by_their_ids() -> None:
    """As Ollama's, each whole and in an event of its own; or in pieces of which only the first has an id."""
    a, b, c = ({"index": 0, "id": each, "function": {"name": "f", "arguments": "{}"}} for each in "abc")
    begun, more = a | {"function": {"name": "f", "arguments": '{"x": {}'}}, {"index": 0, "function": {"arguments": "}"}}
    assert [number for number, *_ in calls(calling(begun), calling(more), calling(b, c), calling(more))] == [
        *(0, 0, 1, 2, 2)
    ]
    assert [number for number, *_ in calls(calling(a), calling(a, choice=1), calling(b))] == [0, 0, 1]
    of_nothing = [{"index": 0, "id": each, "function": {"name": each}} for each in "fg"]  # another name is another call
    assert [number for number, *_ in calls(*map(calling, of_nothing))] == [0, 1]


@pytest.mark.parametrize("nothing", [{}, {"arguments": ""}, {"arguments": None}, {"arguments": "null"}], ids=repr)
def test_calls_of_a_tool_that_takes_nothing_are_told_apart_by_their_ids(nothing: dict[str, Any]) -> None:
    both = [{"index": 0, "id": each, "function": {"name": "f", **nothing}} for each in "ab"]
    assert [number for number, *_ in calls(*map(calling, both))] == [0, 1]


@pytest.mark.parametrize("id_", ["d", "", None])
def test_a_call_whose_number_was_given_to_another_has_the_next(id_: str | None) -> None:
    a, b = ({"index": 0, "id": each, "function": {"name": "f", "arguments": "{}"}} for each in "ab")
    other = {"index": 1, "id": id_, "function": {"name": "g", "arguments": "{"}}
    more = {"index": 1, "function": {"arguments": "}"}}
    assert [number for number, *_ in calls(calling(a, b, other), calling(more))] == [0, 1, 2, 2]


@pytest.mark.parametrize("last", [["}"], ["}", ""], ["}", " "]], ids=["its end", "nothing", "space"])
def test_pieces_that_each_say_a_name_and_another_id_are_one_call(last: list[str]) -> None:
    """As vLLM's were until about 0.8, where the tool was chosen. What it is called is said once."""
    pieces = ['{"a": {', '"b": 1}', ', "c": "}"', *last]
    said_of = [
        {"index": 0, "id": f"made-up-{number}", "type": "function", "function": {"name": "f", "arguments": piece}}
        for number, piece in enumerate(pieces)
    ]
    assert calls(*map(calling, said_of)) == [
        (0, "made-up-0", {"name": "f", "arguments": pieces[0]}),
        *((0, None, {"arguments": piece}) for piece in pieces[1:]),
    ]


@pytest.mark.parametrize("ids", ["aaaa", "abcd", ["a", None, None, ""], ["", "a", "a", "a"]])
def test_pieces_of_one_call_are_one_call_whatever_their_ids(ids: Sequence[str | None]) -> None:
    """The same in each piece, another in each (as vLLM's were), in the first alone, or late."""
    names = [{"name": "f", "arguments": ""}, *({"arguments": each} for each in ("{", "}", ""))]
    pieces = [{"index": 0, "id": id_, "function": name} for id_, name in zip(ids, names, strict=True)]
    assert [number for number, *_ in calls(*map(calling, pieces))] == [0] * 4


@pytest.mark.parametrize(("given", "told"), [({"x": 1}, '{"x":1}'), ([], "[]"), ("{}", "{}"), (None, "")])
def test_arguments_are_json_in_a_string(given: Any, told: str) -> None:
    assert calls(calling({"index": 0, "id": "a", "function": {"name": "f", "arguments": given}})) == [
        (0, "a", {"name": "f", "arguments": told})
    ]
