"""Streams that are left, or closed, by who reads them; for both clients."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from typing import Any

import pytest

from octoai import (
    AsyncOctoAI,
    StreamInterrupted,
)
from tests.sdk.conftest import MESSAGES
from tests.sdk.misbehaving import Exchange, Server, answer, chunk, in_one_write, words


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


def test_a_users_function_that_fails_does_not_keep_a_stream_open(api: Any, serve: Any) -> None:
    def refuse_two(value: Any) -> Any:
        if value == {"n": 2}:
            raise LookupError("two")
        return value

    url = serve(in_one_write([{"n": 1}, {"n": 2}, {"n": 3}])).url
    stream = api.client(base_url=url).infer_stream(url, {}, refuse_two)
    assert api.next(stream) == {"n": 1}
    with pytest.raises(LookupError):
        api.next(stream)
    stream = api.client(base_url=url).infer_stream(url, {}, refuse_two)
    assert api.next(stream) == {"n": 1}
    api.close_stream(stream)


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
