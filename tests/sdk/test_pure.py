"""The pure middle: bytes to events, bytes to HTTP, deadlines, retries."""

from __future__ import annotations

import json
import pickle
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai import ApiError, RateLimitError, Timeout, UnprocessableEntityError, _gather
from octoai._deadlines import DEFAULT_TIMEOUT, Deadlines
from octoai._http1 import ProtocolError, ResponseParser, _end_of_head, _lines
from octoai._retry import RetryPolicy, is_retryable, retry_after
from octoai.errors import ApiTimeoutError, StreamInterrupted
from octoai.sse import Event, EventDecoder, EventTooLargeError

Part = dict[str, Any]  # of a choice, as a chunk has it


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(at)]


def reference(data: bytes) -> list[Event]:
    """The rules for event streams, read line by line and whole."""
    text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    events, lines, name = [], [], ""
    *complete, _ = text.split("\n")
    for line in complete:
        if not line:
            if lines:
                events.append(Event("\n".join(lines).encode(), name))
            lines, name = [], ""
            continue
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "data":
            lines.append(value)
        elif key == "event":
            name = value
    return events


line = st.sampled_from(
    ["data: {}", "data:x", "data", "data:  two", "event: e", ": ping", "id: 1", "retry: 2", "", "", "", "nonsense"]
)
body = st.tuples(st.sampled_from(["", "\ufeff"]), st.lists(st.tuples(line, st.sampled_from(["\n", "\r\n", "\r"]))))


@given(body, st.lists(st.integers(0, 500)))
def test_events_do_not_depend_on_the_cutting(parts: Any, places: list[int]) -> None:
    data = (parts[0] + "".join(text + end for text, end in parts[1])).encode()
    decoder = EventDecoder()
    assert [event for piece in cut(data, places) for event in decoder.feed(piece)] == reference(data)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_any_bytes_give_the_same_events_however_cut(data: bytes, places: list[int]) -> None:
    whole, decoder = EventDecoder().feed(data), EventDecoder()
    assert [event for piece in cut(data, places) for event in decoder.feed(piece)] == whole


@pytest.mark.parametrize("size", [1, 3, 1000, 1460])
def test_a_large_event_comes_in_blocks_of_any_size(size: int) -> None:
    data = b"data: " + b"x" * 20_000 + b"\ndata: y\n\n" + b"data: z\n\n"
    decoder = EventDecoder()
    found = [event for at in range(0, len(data), size) for event in decoder.feed(data[at : at + size])]
    assert found == [Event(b"x" * 20_000 + b"\ny"), Event(b"z")]
    decoder = EventDecoder(max_bytes=15_000)
    with pytest.raises(EventTooLargeError):
        for at in range(0, len(data), size):
            decoder.feed(data[at : at + size])


def test_the_time_for_a_large_event_grows_with_its_size() -> None:
    def seconds(num_blocks: int) -> float:
        decoder, block, began = EventDecoder(), b"x" * 1460, time.process_time()
        for _ in range(num_blocks):
            decoder.feed(block)
        return time.process_time() - began

    assert min(seconds(8000) for _ in range(3)) < 30 * min(seconds(1000) for _ in range(3)) + 0.02


def test_an_event_ends_at_a_carriage_return() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\r\r") == [Event(b"a")]
    assert decoder.feed(b"\ndata: b\r\n\r\n") == [Event(b"b")]


def test_an_event_without_end_is_refused() -> None:
    decoder = EventDecoder(max_bytes=100)
    with pytest.raises(EventTooLargeError):
        decoder.feed(b"data: " + b"x" * 200)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\nx-a: 2\r\n\r\n"
ANSWERS = {
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello": b"hello",
    CHUNKED + b"3;ext=1\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n": b"hello",
    b"HTTP/1.1 204 No\r\n\r\n": b"",
    b"HTTP/1.1 103 Early\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello": b"hello",
    b"HTTP/1.1 100 C\ncontent-length: 0\n\nHTTP/1.1 200 OK\nx: y\r\n z\ncontent-length: 5\n\r\nhello": b"hello",
}


@pytest.mark.parametrize("data", ANSWERS)
@given(st.lists(st.integers(0, 200)))
def test_an_answer_does_not_depend_on_the_cutting(data: bytes, places: list[int]) -> None:
    parser = ResponseParser()
    assert b"".join(parser.feed(piece) for piece in cut(data, places)) == ANSWERS[data]
    assert parser.reusable


@pytest.mark.parametrize("data", ANSWERS)
def test_an_answer_does_not_depend_on_any_two_cuts(data: bytes) -> None:
    for first in range(len(data)):
        for second in range(first, len(data)):
            parser = ResponseParser()
            parts = [parser.feed(piece) for piece in (data[:first], data[first:second], data[second:]) if piece]
            assert b"".join(parts) == ANSWERS[data]
            assert parser.reusable


line_end = st.sampled_from([b"\r\n", b"\n", b"\r", b" ", b"\t", b"x: 1", b"y:2"])


@given(st.lists(line_end, max_size=12).map(b"".join))
def test_heads_are_found_and_parted_as_by_the_rules(data: bytes) -> None:
    """A lone LF ends a line, two ends in a row the head, and what begins with a space goes on with the line before."""
    found = re.search(rb"\r?\n\r?\n", data)
    assert _end_of_head(data) == (found.span() if found else (0, 0))
    text = data.decode()
    assert _lines(text) == re.split(r"\r?\n", re.sub(r"\r?\n[ \t]+", " ", text))


def test_repeated_headers_are_joined() -> None:
    parser = ResponseParser()
    parser.feed(CHUNKED)
    assert parser.headers["x-a"] == "1, 2"


@pytest.mark.parametrize(
    "tail",
    [
        b"5\nhello\n",
        b"3;a\nb\r\nhel",
        b"0\r\nx: y\n\n",
        b"0\r\n" + b"x: y\r\n" * 9999,
        b"-3\r\n",
        b"+3\r\n",
        b"0x3\r\n",
        b"1_0\r\n",
        b"\r\n",
        b"3\r\nhelp\r\n",
        b"g\r\n",
        b"f" * 17000,
    ],
)
def test_malformed_chunks_are_refused(tail: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(CHUNKED + tail)
    parser = ResponseParser()
    parser.feed(CHUNKED)
    with pytest.raises(ProtocolError):
        parser.feed(tail)


def test_a_chunk_that_comes_alone_is_read_as_one_among_others() -> None:
    parser = ResponseParser()
    pieces = [CHUNKED + b"1\r\na\r\n", b"2\r\n\r\n\r\n", b"A\r\n0123456789\r\n", b"2\r\nbc\r\n1\r\nd\r\n", b"2\r\n\r\n"]
    assert b"".join(map(parser.feed, pieces)) == b"a\r\n0123456789bcd\r\n"
    assert parser.feed(b"\r\n0\r\n") == b""
    assert not parser.done
    assert parser.feed(b"\r\n") == b""
    assert parser.reusable


@pytest.mark.parametrize("status", [b"000", b"099", b"99"])
def test_a_status_that_is_none_is_refused(status: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(b"HTTP/1.1 " + status + b" X\r\ncontent-length: 0\r\n\r\n")


@given(st.binary(max_size=100))
def test_no_bytes_break_the_parser_in_another_way(data: bytes) -> None:
    for start in (b"", CHUNKED):
        parser = ResponseParser()
        try:
            parser.feed(start + data)
            parser.end()
        except ProtocolError:
            pass


def test_a_body_until_the_end_of_the_connection() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") == b"abc"
    parser.end()
    assert parser.done
    assert not parser.reusable


@pytest.mark.parametrize("length", [b"9" * 19, b"9" * 5000, b"1, 2", b"-1"])
def test_a_length_that_is_none_is_refused(length: bytes) -> None:
    with pytest.raises(ProtocolError, match="content-length"):
        ResponseParser().feed(b"HTTP/1.1 200 OK\r\ncontent-length: " + length + b"\r\n\r\n")


def test_bytes_nobody_asked_for_spoil_the_connection() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab") == b"a"
    assert parser.done
    assert not parser.reusable


def test_a_number_is_a_timeout_for_every_single_wait() -> None:
    assert Timeout.of(20) == Timeout(connect=10, read=20, total=None, first_token=20, idle=20)
    assert Timeout.of(None) == Timeout(None, None, None, None, None)
    assert Timeout() == DEFAULT_TIMEOUT
    assert Timeout(idle=3).first_token == 3
    assert pickle.loads(pickle.dumps(Timeout(idle=3))) == Timeout(idle=3)
    assert Timeout.of(float("inf")) == Timeout(10, None, None, None, None)
    assert Timeout(float("inf"), 1e300, 1e9) == Timeout(None, None, None)
    for wrong in 0, -1, float("nan"):
        with pytest.raises(ValueError, match="more than 0"):
            Timeout(read=wrong)


def test_deadlines_run_only_while_somebody_waits() -> None:
    now = [0.0]
    deadlines = Deadlines(Timeout(read=5, first_token=10, idle=3), streams=True, clock=lambda: now[0])
    deadlines.send()
    assert deadlines.waiting() == 5
    now[0] = 9
    assert deadlines.waiting() == 1
    deadlines.content()
    now[0] = 100
    assert deadlines.waiting() == 3
    now[0] = 103
    with pytest.raises(ApiTimeoutError) as caught:
        deadlines.waiting()
    assert (caught.value.deadline, caught.value.seconds) == ("idle", 3)


@pytest.mark.parametrize(
    ("timeout", "wait"),
    [
        (Timeout(read=5, idle=3), 3),
        (Timeout(read=2, idle=3), 2),
        (Timeout(read=None, idle=3), 3),
        (Timeout(read=2, idle=None), 2),
        (Timeout(read=None, idle=None), None),
        (Timeout(read=5, idle=3, total=12), 2),
    ],
)
def test_between_two_tokens_the_least_limit_counts(timeout: Timeout, wait: float | None) -> None:
    now = [0.0]
    deadlines = Deadlines(timeout, streams=True, clock=lambda: now[0])
    deadlines.send()
    deadlines.content()
    now[0] = 10
    assert deadlines.waiting() == wait
    if timeout.idle is not None and timeout.total is None:
        now[0] = 12  # bytes came, and no content: what is left of `idle` is less
        assert deadlines.waiting() == 1


def test_waits_double_up_to_the_cap() -> None:
    policy, error = RetryPolicy(max_retries=10), ApiError(retryable=True)
    assert [policy.delay(n, error, chance=0.0) for n in range(1, 7)] == [0.5, 1, 2, 4, 8, 8]
    assert policy.delay(1, error, chance=0.999) == pytest.approx(0.375, abs=0.01)
    assert policy.delay(11, error) is None
    assert policy.delay(1, ApiError()) is None


@pytest.fixture
def far_from_greenwich() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "NYC5")
        time.tzset()
        yield
    time.tzset()


def test_what_the_service_asks_for_wins() -> None:
    policy = RetryPolicy()
    for _ in range(20):
        delay = policy.delay(1, RateLimitError(retryable=True, retry_after=5), chance=random.random())
        assert delay is not None
        assert 5 <= delay <= 5.5
    assert policy.delay(1, RateLimitError(retryable=True, retry_after=61)) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:40 GMT"}, 0),
        ({"retry-after": "Thu Jan  1 00:01:40 1970"}, 40),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 -0000"}, 40),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after-ms": "x", "retry-after": "2"}, 2),
        ({}, None),
    ],
)
def test_the_forms_of_retry_after(far_from_greenwich: None, headers: Any, seconds: float | None) -> None:
    assert retry_after(headers, now=60) == seconds


def test_the_service_decides_what_is_retryable() -> None:
    assert is_retryable(503, {})
    assert not is_retryable(503, {"x-should-retry": "false"})
    assert is_retryable(400, {"x-should-retry": "true"})


def test_errors_look_as_they_always_did_and_can_be_pickled() -> None:
    assert str(ApiError(status_code=418, body="tea")) == "status_code: 418, body: tea"
    with pytest.raises(TypeError):
        ApiError(418, "tea")  # type: ignore[misc]
    error = UnprocessableEntityError({"detail": []})
    assert error.status_code == 422
    for original in (error, StreamInterrupted(partial="p", message="m"), ApiTimeoutError(deadline="idle")):
        twin = pickle.loads(pickle.dumps(original))
        assert type(twin) is type(original)
        assert (str(twin), vars(twin).keys()) == (str(original), vars(original).keys())


def function(key: str, arguments: str | None) -> Part:
    said = {"name": "f", "arguments": arguments}
    return {"delta": {key: [{"index": 0, "function": said}] if key == "tool_calls" else said}}


def added_up(parts: list[tuple[int, Part]]) -> list[Part]:
    """The choices, each text added to what there is of it."""
    choices: dict[int, Part] = {}
    for index, part in parts:
        choice = choices.setdefault(index, {"index": index, "text": "", "message": {"role": "assistant"}})
        choice["text"] += part.get("text") or ""
        message = choice["message"]
        for key, piece in part.get("delta", {}).items():
            before = message.get(key)
            if key in ("tool_calls", "function_call"):
                said = piece[0]["function"] if key == "tool_calls" else piece
                called = before or {"name": "f", "arguments": ""}
                message[key] = {**called, "arguments": called["arguments"] + (said["arguments"] or "")}
            elif piece is not None and type(piece) is type(before):
                message[key] = before + piece
            elif piece is not None or key not in message:
                message[key] = piece
    return [choices[index] for index in sorted(choices)]


pieces = st.none() | st.text(max_size=3)
parts = st.one_of(
    st.builds(lambda piece: {"text": piece}, pieces),
    st.dictionaries(
        st.sampled_from(["content", "reasoning_content"]), pieces | st.lists(st.integers(), max_size=2)
    ).map(lambda delta: {"delta": delta}),
    st.builds(function, st.sampled_from(["tool_calls", "function_call"]), pieces),
)


@given(st.lists(st.tuples(st.integers(0, 2), parts)))
def test_what_is_gathered_is_what_its_pieces_add_up_to(parts: list[tuple[int, Part]]) -> None:
    events = [json.dumps({"id": "x", "choices": [{"index": index, **part}]}).encode() for index, part in parts]
    expected = added_up(parts)
    whole = _gather.completion(events)
    assert [each["text"] for each in whole.get("choices", ())] == [each["text"] for each in expected]
    for choice in _gather.chat_completion(events)["choices"]:
        message, wanted = choice["message"], expected.pop(0)["message"]
        for call in message.get("tool_calls", ()):
            message["tool_calls"] = call["function"]
        assert message == {"content": None, **wanted}


@pytest.mark.parametrize(
    ("gather", "part"),
    [
        (_gather.completion, lambda piece: {"text": piece}),
        (_gather.chat_completion, lambda piece: {"delta": {"content": piece}}),
        (_gather.chat_completion, lambda piece: function("tool_calls", piece)),
        (_gather.chat_completion, lambda piece: function("function_call", piece)),
    ],
    ids=["text", "content", "tool_calls", "function_call"],
)
def test_the_time_to_gather_an_answer_grows_with_its_length(
    gather: Callable[[list[bytes]], Part], part: Callable[[str], Part]
) -> None:
    """In an async program nothing else goes on meanwhile."""
    events = [json.dumps({"choices": [{"index": 0, **part(f"tok{number} ")}]}).encode() for number in range(100_000)]
    began = time.process_time()
    for each in events:
        json.loads(each)
    read = time.process_time()
    whole = gather(events)
    assert time.process_time() - read < 6 * (read - began)  # twice where it is as it should be, ten times where not
    assert json.dumps(whole).count("tok99999 ") == 1
