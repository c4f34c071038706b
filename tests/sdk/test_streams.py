"""Streams, of services that behave and of those that do not, for both clients."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from contextlib import aclosing
from typing import Any

import pytest

from octoai import (
    ApiError,
    ApiTimeoutError,
    AsyncOctoAI,
    BadRequestError,
    ResponseError,
    StreamError,
    StreamInterrupted,
    Timeout,
)
from tests.sdk.conftest import MESSAGES
from tests.sdk.misbehaving import Exchange, Script, Server, answer, chunk, words


def test_a_stream_gives_typed_chunks(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream(words()))
    chunks = api.all(api.stream(api.client(base_url=server.url)))
    assert [c.choices[0].delta.content for c in chunks] == ["w0 ", "w1 ", "w2 "]
    assert server.requests[0].json["stream"] is True
    assert server.requests[0].headers["accept"] == "text/event-stream"


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


def test_legal_event_streams_are_read(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        first, second = json.dumps(chunk("a")).encode(), json.dumps(chunk("b", finish="stop"), indent=1).encode()
        x.part(b"\xef\xbb\xbf: hello\r\n\r\nevent: chunk\r\nid: 7\r\ndata: " + first + b"\r\n\r\n: ping\n\n")
        x.part(b"".join(b"data:" + line + b"\n" for line in second.split(b"\n")) + b"retry: 3\n\n")
        x.end_stream()

    assert api.text(api.stream(api.client(base_url=serve(script).url))) == ["a", "b"]


def test_a_usage_chunk_without_choices_is_kept_but_not_shown(api: Any, serve: Any) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    server = serve(lambda x: x.stream([*words(2), chunk(choices=[], usage=usage)]))
    stream = api.stream(api.client(base_url=server.url))
    assert "".join(c.choices[0].delta.content for c in api.all(stream)) == "w0 w1 "
    assert stream.usage.total_tokens == 7
    assert api.final(stream).usage.total_tokens == 7


def test_the_final_answer_gathers_everything(api: Any, serve: Any) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, "function": function}]}

    token = {"token": "a", "logprob": -1.0}
    chunks = [
        chunk(delta={"role": "assistant", "content": ""}),
        chunk("Hel"),
        chunk("x", index=1),
        chunk("lo", finish="stop"),
        chunk(index=1, delta={"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f"}}]}),
        chunk(index=1, delta=call(0, arguments='{"a"')),
        chunk(index=1, delta=call(1, name="g", arguments="{}")),
        chunk(index=1, delta=call(0, arguments=": 1}"), finish="tool_calls"),
    ]
    for part in chunks[1], chunks[3]:
        part["choices"][0]["logprobs"] = {"content": [token]}
    chunks[-1].update(usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, system_fingerprint="fp")
    server = serve(lambda x: x.stream(chunks))
    stream = api.stream(api.client(base_url=server.url), n=2)
    api.next(stream)
    whole = api.final(stream)
    first, second = whole.choices
    assert (first.message.content, first.finish_reason, first.message.role) == ("Hello", "stop", "assistant")
    assert [one.token for one in first.logprobs.content] == ["a", "a"]
    assert second.message.content == "x"
    assert [one.function.arguments for one in second.message.tool_calls] == ['{"a": 1}', "{}"]
    assert second.message.tool_calls[0].id == "c1"
    assert whole.object == "chat.completion"
    assert whole.usage.total_tokens == 3
    assert whole.system_fingerprint == "fp"


def test_what_a_model_thinks_is_told_from_what_it_says(api: Any, serve: Any) -> None:
    thoughts = [chunk("", delta={"reasoning_content": text}) for text in ("hm", "m")]
    server = serve(lambda x: x.stream([*thoughts, chunk("Hel"), chunk("lo", finish="stop")]))
    client = api.client(base_url=server.url)
    assert [c.choices[0].delta.reasoning_content for c in api.all(api.stream(client))] == ["hm", "m", None, None]
    assert "".join(api.text(api.stream(client))) == "Hello"
    message = api.final(api.stream(client)).choices[0].message
    assert (message.reasoning_content, message.content) == ("hmm", "Hello")


def test_a_text_completion_streams_and_gathers(api: Any, serve: Any) -> None:
    def piece(text: str, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": finish}
        return {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}

    server = serve(lambda x: x.stream([piece("once "), piece("upon", "length")]))
    client = api.client(base_url=server.url)
    assert api.text(api.complete_stream(client)) == ["once ", "upon"]
    whole = api.final(api.complete_stream(client))
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("once upon", "length")


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


def test_a_stream_knows_its_answer(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream(x_request_id="req-1")
        x.event(chunk("a", finish="stop"))
        x.end_stream()

    stream = api.stream(api.client(base_url=serve(script).url))
    assert stream.raw_response is None
    whole = api.final(stream)
    assert stream.request_id == whole.request_id == "req-1"
    assert stream.raw_response.status_code == 200
    assert stream.raw_response.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("how", ["close", "context", "forgotten"])
def test_leaving_early_closes_the_connection_at_once(api: Any, serve: Any, how: str) -> None:
    waited: list[float | None] = []

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        waited.append(x.seconds_until_closed())

    stream = api.stream(api.client(base_url=serve(script).url))
    if how == "context":
        api.entered(stream)
    else:
        api.next(stream)
        if how == "close":
            api.close_stream(stream)
        elif api.kind == "async":
            pytest.skip("without a running loop, nothing can close what was forgotten")
    if how == "forgotten":
        del stream  # nothing else holds it, and no collection is needed
    deadline = time.monotonic() + 2
    while not waited and time.monotonic() < deadline:
        time.sleep(0.01)
    assert waited[0] is not None
    assert waited[0] < 0.5


def test_a_loop_that_was_left_can_be_gone_on_with(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        for one in words():
            x.event(one)
            time.sleep(0.02)
        x.end_stream()

    stream = api.stream(api.client(base_url=serve(script).url))
    first = api.take(stream, 1) + api.take(stream, 1)
    assert [each.choices[0].delta.content for each in first + api.all(stream)] == ["w0 ", "w1 ", "w2 "]
    assert api.all(stream) == []
    assert api.final(stream).choices[0].message.content == "w0 w1 w2 "


@pytest.mark.parametrize("what", ["chunks", "text"])
def test_a_loop_left_over_a_stream_that_nobody_holds_closes_it(api: Any, serve: Any, what: str) -> None:
    waited: list[float | None] = []

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        waited.append(x.seconds_until_closed())

    client = api.client(base_url=serve(script).url)

    async def leave() -> None:
        async for _ in api.stream(client) if what == "chunks" else api.stream(client).text():
            break
        await asyncio.sleep(0.3)

    if api.kind == "async":
        api.run(leave())
    else:
        for _ in api.stream(client) if what == "chunks" else api.stream(client).text():
            break
    deadline = time.monotonic() + 2
    while not waited and time.monotonic() < deadline:
        time.sleep(0.01)
    assert waited[0] is not None
    assert waited[0] < 0.5


def test_a_stream_that_is_closed_while_it_is_read_says_so(serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        x.seconds_until_closed()

    async def read() -> None:
        async with AsyncOctoAI(base_url=serve(script).url, api_key="k") as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            await anext(stream)
            asyncio.get_running_loop().call_later(0.05, lambda: closing.append(asyncio.create_task(stream.close())))
            with pytest.raises(StreamInterrupted, match="it was closed before"):
                await anext(stream)

    closing: list[Any] = []
    asyncio.run(read())


@pytest.mark.parametrize("proxied", [False, True])
def test_a_stream_that_is_closed_before_its_answer_begins_is_left_at_once(
    serve: Any, monkeypatch: pytest.MonkeyPatch, proxied: bool
) -> None:
    left: list[float | None] = []
    server = serve(lambda x: left.append(x.seconds_until_closed(3)))
    if proxied:
        monkeypatch.setenv("HTTP_PROXY", server.url)

    async def read() -> None:
        async with AsyncOctoAI(base_url="http://service.invalid" if proxied else server.url, api_key="k") as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            reading = asyncio.create_task(anext(stream))
            await has_come(server)
            began = time.monotonic()
            await stream.close()
            with pytest.raises(StreamInterrupted, match="it was closed before"):
                await reading
            assert time.monotonic() - began < 1.5

    asyncio.run(read())
    deadline = time.monotonic() + 2
    while not left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(left) == 1
    assert left[0] is not None


def test_a_stream_that_is_closed_while_its_token_is_awaited_is_left_at_once(serve: Any) -> None:
    server = serve(lambda x: x.stream(words()))
    asked: list[Any] = []

    async def token() -> str:
        asked.append(1)
        await asyncio.sleep(3)
        return "k"

    async def read() -> None:
        async with AsyncOctoAI(base_url=server.url, api_key=token) as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            reading = asyncio.create_task(anext(stream))
            while not asked:
                await asyncio.sleep(0.01)
            await stream.close()
            with pytest.raises(StreamInterrupted, match="it was closed before"):
                await asyncio.wait_for(reading, 2)

    asyncio.run(read())
    assert not server.requests
    assert len(asked) == 1


def test_a_stream_that_is_closed_does_not_end_the_refresh_that_other_calls_wait_for(serve: Any) -> None:
    server = serve(lambda x: x.reply(200, answer()))

    async def read() -> None:
        may_come = asyncio.Event()

        async def refreshed() -> str:
            await may_come.wait()
            return "k"

        refresh = asyncio.create_task(refreshed())
        async with AsyncOctoAI(base_url=server.url, api_key=lambda: refresh) as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            reading = asyncio.create_task(anext(stream))
            other = asyncio.create_task(client.text_gen.create_chat_completion(model="m", messages=MESSAGES))
            await asyncio.sleep(0.05)
            await stream.close()
            with pytest.raises(StreamInterrupted):
                await asyncio.wait_for(reading, 2)
            may_come.set()
            assert (await asyncio.wait_for(other, 2)).choices

    asyncio.run(read())


async def has_come(server: Server) -> None:
    """Until the server has seen a request."""
    while not server.requests:
        await asyncio.sleep(0.01)


def test_a_stream_that_is_closed_between_two_attempts_is_left_at_once(serve: Any) -> None:
    server = serve(lambda x: x.reply(503, {}, retry_after=5))

    async def token() -> str:
        await asyncio.sleep(4 if server.requests else 0)
        return "k"

    async def read() -> None:
        async with AsyncOctoAI(base_url=server.url, api_key=token) as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            reading = asyncio.create_task(anext(stream))
            await has_come(server)
            await asyncio.sleep(0.1)  # and it is answered
            await stream.close()
            with pytest.raises(StreamInterrupted, match="it was closed before"):
                await asyncio.wait_for(reading, 2)

    asyncio.run(read())
    assert len(server.requests) == 1


def test_ten_streams_in_a_row_use_one_connection(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        for one in words():
            x.event(one)
        x.event(b"[DONE]")
        time.sleep(0.01)  # the end of the body comes in a segment of its own
        x.end_stream(done=False)

    server = serve(script)
    client = api.client(base_url=server.url)
    for _ in range(10):
        assert len(api.all(api.stream(client))) == 3
    assert server.connections == 1


def test_a_service_that_keeps_the_body_open_after_the_end_delays_nobody(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a", finish="stop"))
        x.event(b"[DONE]")
        x.seconds_until_closed()

    began = time.monotonic()
    assert api.text(api.stream(api.client(base_url=serve(script).url))) == ["a"]
    assert time.monotonic() - began < 3


def _pings(x: Exchange, first: list[Any], seconds: float = 4.0) -> None:
    x.begin_stream()
    for one in first:
        x.event(one)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        x.part(b": keep-alive\n\n")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("timeout", "first", "deadline"),
    [
        (0.4, [], "first_token"),
        (0.4, [chunk("a")], "idle"),
        (Timeout(idle=0.4), [chunk("a")], "idle"),
        (Timeout(idle=0.4), [], "first_token"),
        (Timeout(first_token=0.4), [chunk(delta={"role": "assistant", "content": ""})], "first_token"),
        (Timeout(total=0.4), [chunk("a")], "total"),
    ],
)
def test_keep_alive_bytes_are_not_content(api: Any, serve: Any, timeout: Any, first: Any, deadline: str) -> None:
    server = serve(lambda x: _pings(x, first))
    began = time.monotonic()
    with pytest.raises(ApiTimeoutError, match=deadline) as caught:
        api.all(api.stream(api.client(base_url=server.url, timeout=timeout)))
    assert 0.3 < time.monotonic() - began < 3
    assert caught.value.deadline == deadline
    assert len(server.requests) == 1


@pytest.mark.parametrize("first", [[], [chunk("a")]])
def test_a_silent_stall_ends_in_time(api: Any, serve: Any, first: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        for one in first:
            x.event(one)
        x.seconds_until_closed()

    began = time.monotonic()
    with pytest.raises(ApiTimeoutError) as caught:
        api.all(api.stream(api.client(base_url=serve(script).url, timeout=0.4)))
    assert 0.3 < time.monotonic() - began < 3
    assert caught.value.partial == ("a" if first else "")


def test_a_slow_reader_is_not_an_idle_service(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        time.sleep(0.5)
        x.event(chunk("b", finish="stop"))
        x.end_stream()

    stream = api.stream(api.client(base_url=serve(script).url, timeout=Timeout(idle=0.3)))
    api.next(stream)
    time.sleep(0.45)
    assert api.next(stream).choices[0].delta.content == "b"


def test_a_slow_first_token_is_waited_for_when_only_that_may_be_slow(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        time.sleep(0.5)
        x.event(chunk("a", finish="stop"))
        x.end_stream()

    client = api.client(base_url=serve(script).url, timeout=Timeout(first_token=3, idle=0.2))
    assert api.text(api.stream(client)) == ["a"]


def test_every_error_of_a_stream_is_an_api_error(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")

    with pytest.raises(ApiError):
        api.all(api.stream(api.client(base_url=serve(script).url)))


def test_a_compressed_stream_is_read(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream(content_encoding="gzip")
        body = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in words())
        x.part(gzip.compress(body + b"data: [DONE]\n\n"))
        x.end_stream(done=False)

    assert len(api.all(api.stream(api.client(base_url=serve(script).url)))) == 3


def test_a_stream_closed_early_has_no_final_answer(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        x.seconds_until_closed()

    stream = api.stream(api.client(base_url=serve(script).url))
    api.take(stream, 1)
    api.close_stream(stream)
    with pytest.raises(StreamInterrupted):
        api.final(stream)


def test_what_was_not_read_of_a_closed_stream_is_not_silently_missing(api: Any, serve: Any) -> None:
    client = api.client(base_url=serve(lambda x: x.stream(words())).url)
    stream = api.stream(client)
    api.take(stream, 1)
    api.close_stream(stream)
    for _ in range(2):
        with pytest.raises(StreamInterrupted, match="closed before all of it was read") as caught:
            api.all(stream)
        assert caught.value.partial.startswith("w0 ")
    unopened = api.stream(client)
    api.close_stream(unopened)
    with pytest.raises(StreamInterrupted):
        api.all(unopened)
    whole = api.stream(client)
    assert len(api.all(whole)) == 3
    api.close_stream(whole)
    assert api.all(whole) == []
    assert api.final(whole).choices[0].message.content == "w0 w1 w2 "


def test_a_stream_that_was_closed_before_it_began_sends_nothing(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream(words()))
    stream = api.stream(api.client(base_url=server.url))
    api.close_stream(stream)
    with pytest.raises(StreamInterrupted, match="closed"):
        api.entered(stream)
    assert not server.requests


def test_a_loop_left_at_the_last_chunk_has_all_of_it(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.part(b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in words()) + b"data: [DONE]\n\n")
        x.send(b"0\r\n\r\n")

    stream = api.stream(api.client(base_url=serve(script).url))
    api.take(stream, 3)
    assert api.final(stream).choices[0].message.content == "w0 w1 w2 "


def _in_one_write(events: list[Any]) -> Script:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.part(b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events))
        x.end_stream(done=False)

    return script


def test_usage_is_known_as_soon_as_it_has_come(api: Any, serve: Any) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    server = serve(_in_one_write([*words(), chunk(choices=[], usage=usage), b"[DONE]"]))
    stream = api.stream(api.client(base_url=server.url))
    api.next(stream)
    assert stream.usage.total_tokens == 7
    assert [c.choices[0].delta.content for c in api.all(stream)] == ["w1 ", "w2 "]


def test_an_error_that_has_come_is_raised_at_its_turn(api: Any, serve: Any) -> None:
    server = serve(_in_one_write([chunk("a"), chunk("b"), {"error": {"message": "engine died"}}, chunk("c")]))
    stream = api.stream(api.client(base_url=server.url))
    api.next(stream)
    assert stream.usage is None  # looks at all that has come
    assert api.next(stream).choices[0].delta.content == "b"
    with pytest.raises(StreamError, match="engine died") as caught:
        api.next(stream)
    assert caught.value.partial == "ab"
    assert api.all(stream) == []


def test_a_users_function_that_fails_does_not_keep_a_stream_open(api: Any, serve: Any) -> None:
    def refuse_two(value: Any) -> Any:
        if value == {"n": 2}:
            raise LookupError("two")
        return value

    url = serve(_in_one_write([{"n": 1}, {"n": 2}, {"n": 3}])).url
    stream = api.client(base_url=url).infer_stream(url, {}, refuse_two)
    assert api.next(stream) == {"n": 1}
    with pytest.raises(LookupError):
        api.next(stream)
    stream = api.client(base_url=url).infer_stream(url, {}, refuse_two)
    assert api.next(stream) == {"n": 1}
    api.close_stream(stream)


def test_none_may_be_what_a_users_function_makes(api: Any, serve: Any) -> None:
    url = serve(_in_one_write([{"n": 1}, {"n": 2}, b"[DONE]"])).url
    assert api.all(api.client(base_url=url).infer_stream(url, {}, lambda _value: None)) == [None, None]


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


def test_a_stream_may_be_closed_by_contextlib(serve: Any) -> None:
    waited: list[float | None] = []

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        waited.append(x.seconds_until_closed())

    async def use() -> None:
        async with AsyncOctoAI(base_url=serve(script).url, api_key="k") as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            async with aclosing(stream):
                await anext(stream)
            await asyncio.sleep(0.2)

    asyncio.run(use())
    assert waited[0] is not None


@pytest.mark.parametrize("deadline", ["total", "first_token"])
def test_connecting_and_the_head_have_no_time_of_their_own(api: Any, serve: Any, deadline: str) -> None:
    """The deadline of the whole holds for an answer whose head drips, too: connecting does not add its own."""

    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\n")
        for _ in range(30):
            time.sleep(0.1)
            x.send(b"x: y\r\n")

    api.all(api.stream(api.client(base_url=serve(lambda x: x.stream(words())).url)))  # imports are not timed
    client = api.client(base_url=serve(script).url, timeout=Timeout(**{"connect": 10, deadline: 0.5}))
    began = time.monotonic()
    with pytest.raises(ApiTimeoutError) as caught:
        api.all(api.stream(client))
    assert caught.value.deadline == deadline
    assert time.monotonic() - began < 1.5
