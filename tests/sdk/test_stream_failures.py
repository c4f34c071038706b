"""Streams that break off, or report an error; for both clients."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from octoai import (
    ApiError,
    BadRequestError,
    ResponseError,
    StreamError,
    StreamInterrupted,
)
from tests.sdk.misbehaving import Exchange, chunk, in_one_write


def test_an_error_event_raises_after_what_came_before_it(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        body = b'data: {"error": {"message": "engine died", "type": "server_error", "code": "engine"}}\n\n'
        x.part(b"data: " + json.dumps(chunk("part ")).encode() + b"\n\n" + body)
        x.end_stream()

    stream = api.stream(api.client(base_url=serve(script).url))
    assert api.next(stream).choices[0].delta.content == "part "
    with pytest.raises(StreamError, match="engine died") as caught:
        api.next(stream)
    assert caught.value.code == "engine"
    assert caught.value.partial == "part "
    assert caught.value.body["error"]["type"] == "server_error"
    with pytest.raises((StopIteration, StopAsyncIteration)):
        api.next(stream)


@pytest.mark.parametrize(
    "event", [b'data: {"object":"error","message":"no"}\n\n', b'event: error\ndata: {"message":"no"}\n\n']
)
def test_other_forms_of_error_events_raise_too(api: Any, serve: Any, event: bytes) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.part(event)
        x.end_stream()

    with pytest.raises(StreamError, match="no"):
        api.all(api.stream(api.client(base_url=serve(script).url)))


def test_the_word_error_in_a_text_is_no_error(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream([chunk('an "error" here'), chunk("", finish="stop", error=None)]))
    assert api.text(api.stream(api.client(base_url=server.url))) == ['an "error" here']


@pytest.mark.parametrize("data", [b"{not json", b'{"choices": 3}', b"[1]", b"null"])
def test_a_malformed_event_raises(api: Any, serve: Any, data: bytes) -> None:
    def script(x: Exchange) -> None:
        x.stream([chunk("a"), data])

    stream = api.stream(api.client(base_url=serve(script).url))
    api.next(stream)
    with pytest.raises(ResponseError) as caught:
        api.all(stream)
    assert caught.value.body == data.decode()


def test_a_body_that_ends_cleanly_without_an_end_raises_with_the_partial_text(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream([chunk("half "), chunk("an answer")], done=False))
    with pytest.raises(StreamInterrupted) as caught:
        api.all(api.stream(api.client(base_url=server.url)))
    assert caught.value.partial == "half an answer"


def test_a_dropped_connection_raises_with_the_partial_text(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("half"))
        time.sleep(0.05)
        x.reset()

    with pytest.raises(StreamInterrupted) as caught:
        api.all(api.stream(api.client(base_url=serve(script).url)))
    assert caught.value.partial == "half"


def test_a_connection_closed_within_the_body_raises(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("half"))
        x.hang_up()

    with pytest.raises(StreamInterrupted):
        api.final(api.stream(api.client(base_url=serve(script).url)))


def test_one_of_two_choices_finished_is_not_an_end(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream([chunk("a"), chunk("b", index=1), chunk(finish="stop")], done=False))
    with pytest.raises(StreamInterrupted):
        api.all(api.stream(api.client(base_url=server.url)))


@pytest.mark.parametrize("done", [True, False])
def test_either_sign_of_the_end_is_enough(api: Any, serve: Any, done: bool) -> None:
    server = serve(lambda x: x.stream([chunk("a", finish=None if done else "stop")], done=done))
    assert api.text(api.stream(api.client(base_url=server.url))) == ["a"]


def test_a_refusal_is_raised_when_the_stream_is_read(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(400, {"message": "no", "type": "invalid_request_error", "param": "n"}))
    client = api.client(base_url=server.url)
    with pytest.raises(BadRequestError) as caught:
        api.all(api.stream(client))
    assert caught.value.param == "n"
    with pytest.raises(BadRequestError):
        api.entered(api.stream(client))


def test_an_answer_that_is_not_a_stream_raises(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(200, {"choices": []}))
    with pytest.raises(ResponseError, match="not an event stream"):
        api.all(api.stream(api.client(base_url=server.url)))


def test_every_error_of_a_stream_is_an_api_error(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")

    with pytest.raises(ApiError):
        api.all(api.stream(api.client(base_url=serve(script).url)))


def test_an_error_that_has_come_is_raised_at_its_turn(api: Any, serve: Any) -> None:
    server = serve(in_one_write([chunk("a"), chunk("b"), {"error": {"message": "engine died"}}, chunk("c")]))
    stream = api.stream(api.client(base_url=server.url))
    api.next(stream)
    assert stream.usage is None  # looks at all that has come
    assert api.next(stream).choices[0].delta.content == "b"
    with pytest.raises(StreamError, match="engine died") as caught:
        api.next(stream)
    assert caught.value.partial == "ab"
    assert api.all(stream) == []


def test_an_error_in_place_of_a_stream_is_told(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(200, {"error": {"message": "engine died"}}, x_request_id="req-9"))
    for read in (api.all, api.entered):
        with pytest.raises(ResponseError, match="not an event stream: engine died") as caught:
            read(api.stream(api.client(base_url=server.url)))
        assert caught.value.request_id == "req-9"
        assert caught.value.status_code == 200


@pytest.mark.parametrize("choices", [{"a": 1}, ["x"], [{"delta": "x"}], [{"index": [], "text": 5}]])
def test_a_stream_of_anything_that_is_cut_off_raises_an_api_error(api: Any, serve: Any, choices: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event({"choices": choices})
        x.hang_up()

    url = serve(script).url
    stream = api.client(base_url=url).infer_stream(url, {})
    with pytest.raises(StreamInterrupted):
        api.all(stream)
