"""`infer_stream`: the events of any endpoint, and how such a stream may end."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from octoai import ResponseError, StreamError, StreamInterrupted
from tests.sdk.misbehaving import Exchange


def stream_of(api: Any, serve: Any, *parts: bytes, **headers: Any) -> Any:
    def script(x: Exchange) -> None:
        x.begin_stream(**headers)
        for part in parts:
            x.part(part)
        x.end_stream(done=False)

    return api.client().infer_stream(serve(script).url, {})


def test_a_last_event_without_its_blank_line_is_given(api: Any, serve: Any) -> None:
    assert api.all(stream_of(api, serve, b'data: {"a":1}\n\ndata: {"a":2}\n')) == [{"a": 1}, {"a": 2}]
    assert api.all(stream_of(api, serve, b'data: {"a":1}')) == [{"a": 1}]


def test_an_event_cut_within_itself_raises(api: Any, serve: Any) -> None:
    stream = stream_of(api, serve, b'data: {"a":1}\n\ndata: {"a":')
    assert api.next(stream) == {"a": 1}
    with pytest.raises(StreamInterrupted, match="within an event"):
        api.next(stream)


def test_an_error_without_its_blank_line_raises(api: Any, serve: Any) -> None:
    stream = stream_of(api, serve, b'data: {"a":1}\n\ndata: {"error":"boom"}\n')
    assert api.next(stream) == {"a": 1}
    with pytest.raises(StreamError, match="boom"):
        api.next(stream)


@pytest.mark.parametrize(
    ("kind", "body"),
    [("text/plain", b"hello"), ("text/plain", b"one\n\ntwo\n\n"), ("application/x-ndjson", b'{"a":1}\n{"a":2}\n')],
)
def test_a_body_that_is_no_event_stream_raises(api: Any, serve: Any, kind: str, body: bytes) -> None:
    with pytest.raises(ResponseError, match="not an event stream"):
        api.all(stream_of(api, serve, body, content_type=kind))


@pytest.mark.parametrize("body", [b": ping\n\n", b": ping\n", b"retry: 5\n\nevent: x\nid: 3\n\n"])
def test_a_stream_without_an_event_is_empty(api: Any, serve: Any, body: bytes) -> None:
    assert api.all(stream_of(api, serve, body)) == []


def test_nobodys_function_is_called_for_events_that_nobody_asked_for(api: Any, serve: Any) -> None:
    seen: list[Any] = []

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.part(b"".join(b'data: {"n": %d}\n\n' % number for number in range(5)))
        x.end_stream()

    url = serve(script).url
    stream = api.client().infer_stream(url, {}, lambda value: seen.append(value) or value)
    assert api.next(stream) == {"n": 0}
    api.close_stream(stream)
    assert seen == [{"n": 0}]
    with pytest.raises(StreamInterrupted, match="closed"):
        api.next(stream)


def test_choices_of_another_meaning_do_not_need_an_end(api: Any, serve: Any) -> None:
    events = [{"question": 1, "choices": [{"label": "a"}, {"label": "b"}]}]
    server = serve(lambda x: x.stream(events, done=False))
    assert api.all(api.client().infer_stream(server.url, {})) == events


def test_an_error_that_is_data_is_no_failure(api: Any, serve: Any) -> None:
    events = [
        {"step": 1, "error": 0.25},
        {"step": 2, "error": [0.5]},
        {"step": 3, "error": 0, "message": "exact"},
        {"step": 4, "error": False, "message": "done", "object": "step"},
        {"step": 5, "error": None},
        {"step": 6, "error": {}},
        {"step": 7, "error": 0.25, "message": "epoch 7"},
        {"step": 8, "error": 12, "message": "twelve of them"},
        {"step": 9, "error": ["spelling"], "message": "hi"},
        {"step": 10, "error": True, "text": "row failed"},
    ]
    server = serve(lambda x: x.stream(events))
    assert api.all(api.client().infer_stream(server.url, {})) == events


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error":{"message":"boom"}}',
        b'event: error\ndata: {"boom":1}',
        b'data: {"object":"error","message":"boom","type":"InternalServerError","code":500}',
        b'data: {"error":true,"message":"boom"}',
        b'data: {"error":500,"message":"boom"}',
        b'data: {"error":true,"reason":"boom"}',
        b'data: {"id":1,"error":true,"message":"boom"}',
        b'data: {"error":true,"type":"boom","code":7}',
    ],
)
def test_an_error_that_says_something_is_a_failure(api: Any, serve: Any, event: bytes) -> None:
    with pytest.raises(StreamError, match="boom"):
        api.all(stream_of(api, serve, event + b"\n\n"))


def test_events_that_are_read_are_not_kept(api: Any, serve: Any) -> None:
    large = {"frame": "x" * 200_000}
    stream = api.client().infer_stream(serve(lambda x: x.stream([large] * 40)).url, {})
    tracemalloc.start()
    try:
        api.take(stream, 5)
        before = tracemalloc.get_traced_memory()[0]
        assert all(each == large for each in api.take(stream, 30))
        assert tracemalloc.get_traced_memory()[0] - before < 3_000_000
    finally:
        tracemalloc.stop()
    api.all(stream)
