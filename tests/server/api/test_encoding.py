"""The shapes on the wire, for any text: chunks, whole answers, and that both say the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoai.server.api.encoding import ChatEncoder, CompletionEncoder, error_event
from octoai.server.engines.base import Delta, Deltas, Event, Finished, Started, Usage
from octoai.server.params import generations

USAGE = Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2)
AWKWARD = [
    '"',
    "\\",
    "\n",
    "\r",
    "\u2028",
    "\u2029",
    "\x00",
    "\x7f",
    "é",
    "你",
    "😀",
    "\ufffd",
    "[DONE]",
    "[",
    "data: [DONE]\n\n",
]


def chat(**changes: Any) -> ChatEncoder:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **changes}
    return ChatEncoder(generations.chat(json.dumps(body).encode()), fingerprint="octoai-m", created=7)


def text(**changes: Any) -> CompletionEncoder:
    body = {"model": "m", "prompt": "Once", **changes}
    return CompletionEncoder(generations.completion(json.dumps(body).encode()), fingerprint="octoai-m", created=7)


def finished(*reasons: str) -> Finished:
    return Finished(dict(enumerate(reasons)), USAGE)


def chunks(encoder: ChatEncoder | CompletionEncoder, *batches: Sequence[Event]) -> list[dict[str, Any]]:
    """What a strict reader of server-sent events sees; every rule for the bytes is checked on the way."""
    read = []
    for batch in batches:
        block = encoder.stream(batch)
        assert block.isascii()
        assert b"[DONE]" not in block
        if block:
            assert block.endswith(b"\n\n")
        for event in block.split(b"\n\n")[:-1]:
            assert event.startswith(b"data: ")
            assert b"\n" not in event
            assert b"\r" not in event
            chunk = json.loads(event[6:])
            assert len(chunk["choices"]) == 1
            read.append(chunk)
    return read


def test_the_first_chunk_has_the_role_and_empty_content() -> None:
    first, second, last = chunks(chat(), [Started(3), Delta(0, "Hi", 1)], [finished("stop")])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"content": "Hi"}
    assert last["choices"][0]["delta"] == {"content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, second, last)] == [None, None, "stop"]


@given(
    st.lists(st.one_of(st.text(min_size=1, max_size=3), st.sampled_from(AWKWARD)), min_size=1),
    st.booleans(),
    st.booleans(),
)
def test_deltas_that_came_together_are_the_same_chunks(texts: list[str], is_chat: bool, is_reasoning: bool) -> None:
    deltas = Deltas(texts, list(range(1, len(texts) + 1)), is_reasoning)
    one, other = (chat(), chat()) if is_chat else (text(), text())
    other.id = one.id
    assert one.stream([Started(3), deltas]) == other.stream([Started(3), *deltas])
    assert one.whole([deltas, finished("stop")]) == other.whole([*deltas, finished("stop")])


def test_the_head_is_the_same_on_every_chunk() -> None:
    read = chunks(chat(), [Started(3)], [Delta(0, "a", 1)], [finished("length")])
    assert {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in read} == {
        (read[0]["id"], "chat.completion.chunk", 7, "m")
    }
    assert read[0]["id"].startswith("cmpl-")
    assert len(read[0]["id"]) == 5 + 32


def test_usage_is_on_the_last_chunk_with_a_choice_and_only_when_asked_for() -> None:
    events = [Started(3), Delta(0, "a", 1), finished("stop")]
    plain = chunks(chat(), events)
    assert all("usage" not in chunk for chunk in plain)
    *others, last = chunks(chat(stream_options={"include_usage": True}), events)
    assert [chunk["usage"] for chunk in others] == [None, None]
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert last["choices"][0]["finish_reason"] == "stop"


def test_what_was_thought_is_part_of_the_usage() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=9, reasoning_tokens=7)
    body = json.loads(chat().whole([Started(3), Delta(0, "", 7, reasoning="hm"), Finished({0: "stop"}, usage)]))
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 7}
    assert (body["usage"]["completion_tokens"], body["usage"]["total_tokens"]) == (9, 12)
    assert "completion_tokens_details" not in json.loads(chat().whole([Started(3), finished("stop")]))["usage"]


def test_each_choice_opens_once_and_closes_once() -> None:
    # Two requests to the engine make this answer: each of them starts.
    batches = [[Started(3), Delta(0, "a", 1)], [Started(3), Delta(1, "b", 1)], [finished("stop", "length")]]
    read = chunks(chat(n=2, stream_options={"include_usage": True}), *batches)
    opened = [chunk["choices"][0]["index"] for chunk in read if "role" in chunk["choices"][0]["delta"]]
    closed = [chunk["choices"][0] for chunk in read if chunk["choices"][0]["finish_reason"]]
    assert opened == [0, 1]
    assert [(choice["index"], choice["finish_reason"]) for choice in closed] == [(0, "stop"), (1, "length")]
    assert [chunk["usage"] is None for chunk in read] == [True] * (len(read) - 1) + [False]


def test_echoed_text_comes_once_and_first() -> None:
    batches = [[Started(1), Delta(0, " upon", 1)], [Started(1), Delta(1, " more", 1)], [finished("stop", "stop")]]
    encoder = text(n=2, echo=True)
    read = chunks(encoder, *batches)
    said = ["", ""]
    for chunk in read:
        said[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert said == ["Once upon", "Once more"]
    whole = json.loads(encoder.whole([event for batch in batches for event in batch]))
    assert [choice["text"] for choice in whole["choices"]] == said


def test_a_completion_always_has_a_fingerprint() -> None:
    encoder = text()
    events = [Started(1), Delta(0, "a", 1), finished("stop")]
    read = [*chunks(encoder, events), json.loads(encoder.whole(events))]
    assert [answer["system_fingerprint"] for answer in read] == ["octoai-m"] * 3
    assert {answer["object"] for answer in read} == {"text_completion"}


def test_text_that_looks_like_the_end_does_not_end_the_typescript_client() -> None:
    for said in ("[DONE]", "data: [DONE]", '\\[DONE]"', "\\\\[DONE]", "[[DONE]]"):
        token = {"token": said, "logprob": -0.5, "bytes": [1], "top_logprobs": [{"token": said, "logprob": -1.0}]}
        for encoder in (chat(logprobs=True, top_logprobs=1), text(logprobs=1)):
            read = chunks(encoder, [Started(1), Delta(0, said, 1, [token])], [finished("stop")])
            assert any(
                said in (choice["choices"][0].get("text"), choice["choices"][0].get("delta", {}).get("content"))
                for choice in read
            )
    event = error_event({"error": {"message": "said [DONE]"}})
    assert b"[DONE]" not in event
    assert json.loads(event[6:])["error"]["message"] == "said [DONE]"


def test_logprobs_have_the_chat_form_and_both_forms_for_completions() -> None:
    def token(name: str) -> dict[str, Any]:
        top = {"token": name, "logprob": -0.5, "bytes": list(name.encode())}
        return {**top, "top_logprobs": [top]}

    deltas = [Delta(0, "ab", 2, [token("a"), token("b")]), Delta(0, "c", 3, [token("c")])]
    events = [Started(1), *deltas, finished("stop")]
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks(chat(logprobs=True, top_logprobs=1), events)] == [
        None,
        {"content": [token("a"), token("b")]},
        {"content": [token("c")]},
        None,
    ]
    encoder = text(logprobs=1)
    read = [chunk["choices"][0]["logprobs"] for chunk in chunks(encoder, events)]
    assert [row and row["text_offset"] for row in read] == [[0, 1], [2], None]
    whole = json.loads(encoder.whole(events))["choices"][0]["logprobs"]
    assert whole["content"] == [token("a"), token("b"), token("c")]
    assert whole["tokens"] == ["a", "b", "c"]
    assert whole["token_logprobs"] == [-0.5] * 3
    assert whole["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}]
    assert whole["text_offset"] == [0, 1, 2]


def test_logprobs_not_asked_for_are_null() -> None:
    whole = json.loads(chat().whole([Started(1), Delta(0, "a", 1), finished("stop")]))
    assert whole["choices"][0]["logprobs"] is None
    assert whole["usage"]["total_tokens"] == 5


def test_an_answer_without_text_is_still_an_answer() -> None:
    for encoder in (chat(), text()):
        events = [Started(1), finished("stop")]
        assert chunks(encoder, events)[-1]["choices"][0]["finish_reason"] == "stop"
        (choice,) = json.loads(encoder.whole(events))["choices"]
        assert choice.get("text", choice.get("message", {}).get("content")) == ""


def test_tool_calls_in_pieces_become_whole_ones() -> None:
    pieces = [
        [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"a":'}}],
        [{"index": 0, "function": {"arguments": "1}"}}, {"index": 1, "id": "c2", "function": {"name": "g"}}],
    ]
    events = [Started(1), *(Delta(0, "", 1, None, piece) for piece in pieces), finished("tool_calls")]
    encoder = chat(tools=[{"function": {"name": "f"}}])
    read = chunks(encoder, events)
    assert [chunk["choices"][0]["delta"].get("tool_calls") for chunk in read[1:-1]] == pieces
    assert all(chunk["choices"][0]["delta"]["content"] == "" for chunk in read)
    message = json.loads(encoder.whole(events))["choices"][0]["message"]
    assert message["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]


def calls(index: int, name: str | None, arguments: str | None) -> Delta:
    return Delta(0, "", 1, None, [{"index": index, "function": {"name": name, "arguments": arguments}}])


@pytest.mark.parametrize(
    "piece",
    [
        lambda number: Delta(0, f"tok{number} ", number),
        lambda number: Deltas([f"tok{number} "], [number]),
        lambda number: Delta(0, "", number, reasoning=f"tok{number} "),
        lambda number: calls(0, None, f"arg{number} "),
    ],
    ids=["text", "texts", "reasoning", "arguments"],
)
def test_the_time_for_a_whole_answer_grows_with_its_length(piece: Callable[[int], Event]) -> None:
    """Nobody else is served while it is put together."""
    events = [Started(3), *map(piece, range(100_000)), finished("stop")]
    encoder = chat()
    began = time.process_time()
    whole = encoder.whole(events)
    assert time.process_time() - began < 0.6  # 0.05 s where it is as it should be, 2 s and more where it is not
    assert whole.count(b"99999 ") == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.none() | st.text(max_size=3), st.none() | st.text(max_size=3))))
def test_the_pieces_of_any_tool_calls_are_added_up(pieces: list[tuple[int, str | None, str | None]]) -> None:
    sums: dict[int, list[str]] = {}
    for index, name, arguments in pieces:
        names, all_arguments = sums.setdefault(index, ["", ""])
        sums[index] = [names + (name or ""), all_arguments + (arguments or "")]
    events = [Started(1), *(calls(*piece) for piece in pieces), finished("tool_calls")]
    message = json.loads(chat(tools=[{"function": {"name": "f"}}]).whole(events))["choices"][0]["message"]
    functions = [each["function"] for each in message.get("tool_calls", [])]
    assert [[each["name"], each["arguments"]] for each in functions] == [sums[index] for index in sorted(sums)]


def test_of_several_choices_only_one_may_call_a_tool() -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    events = [Started(1), Delta(0, "no", 1), Delta(1, "", 1, None, [call]), finished("stop", "tool_calls")]
    said, called = json.loads(chat(n=2, tools=[{"function": {"name": "f"}}]).whole(events))["choices"]
    assert said["message"] == {"role": "assistant", "content": "no"}
    assert [each["id"] for each in called["message"]["tool_calls"]] == ["c1"]


texts = st.text(max_size=12) | st.lists(st.sampled_from(AWKWARD), max_size=4).map("".join)


thoughts = st.just("") | texts


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, list[list[Event]]]:
    """Any number of choices, in any order, in any batches, started once or once a part."""
    n = draw(st.integers(1, 4))
    counts = [0] * n
    events: list[Event] = [Started(3)]
    for index, said, thought in draw(st.lists(st.tuples(st.integers(0, n - 1), texts, thoughts), max_size=12)):
        if draw(st.booleans()):
            events.append(Started(3))
        counts[index] += 1
        events.append(Delta(index, said, counts[index], reasoning=thought))
    events.append(finished(*draw(st.lists(st.sampled_from(["stop", "length"]), min_size=n, max_size=n))))
    batches: list[list[Event]] = [[]]
    for event in events:
        batches[-1].append(event)
        if draw(st.booleans()):
            batches.append([])
    return n, [batch for batch in batches if batch]


@settings(max_examples=300, deadline=None)
@given(answers(), st.booleans(), texts)
def test_the_stream_says_what_the_whole_answer_says(
    answer: tuple[int, list[list[Event]]], is_chat: bool, prompt: str
) -> None:
    n, batches = answer
    encoder = chat(n=n, stream_options={"include_usage": True}) if is_chat else text(n=n, echo=True, prompt=prompt)
    whole = json.loads(encoder.whole([event for batch in batches for event in batch]))
    said: dict[int, str] = dict.fromkeys(range(n), "")
    thought = said.copy()
    reasons: dict[int, str] = {}
    read = chunks(encoder, *batches)
    for chunk in read:
        (choice,) = chunk["choices"]
        piece = choice["delta"]["content"] if is_chat else choice["text"]
        assert isinstance(piece, str)
        assert choice["index"] not in reasons
        said[choice["index"]] += piece
        thought[choice["index"]] += (choice["delta"] if is_chat else choice).get("reasoning_content", "")
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert [choice["message"]["content"] if is_chat else choice["text"] for choice in whole["choices"]] == [
        said[index] for index in range(n)
    ]
    assert [choice["finish_reason"] for choice in whole["choices"]] == [reasons[index] for index in range(n)]
    messages = [choice["message"] if is_chat else choice for choice in whole["choices"]]
    assert [message.get("reasoning_content", "") for message in messages] == [thought[index] for index in range(n)]
    events = [event for batch in batches for event in batch if isinstance(event, Delta)]
    assert "".join(thought.values()) == "".join(
        event.reasoning for index in range(n) for event in events if event.index == index
    )
    if is_chat:
        assert read[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("model", ["m", 'a"b', "模型"])
def test_the_model_is_echoed_as_it_was_asked_for(model: str) -> None:
    (chunk, _) = chunks(chat(model=model), [Started(1)], [finished("stop")])
    assert chunk["model"] == model
