"""Clients of asyncio: what event loops leave behind, and what happens while a loop is busy."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any

import pytest

from octoai import AsyncOctoAI, StreamInterrupted, Timeout
from tests.sdk.conftest import MESSAGES
from tests.sdk.misbehaving import Exchange, answer, chunk


async def chat(client: AsyncOctoAI) -> str:
    whole = await client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
    return str(whole.choices[0].message.content)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # asyncio's own, of connections that outlive their loop
def test_loops_that_are_closed_are_forgotten_with_their_connections(serve: Any) -> None:
    closed: list[float | None] = []

    def script(x: Exchange) -> None:
        x.reply(200, answer())
        closed.append(x.seconds_until_closed(3))

    server = serve(script)
    client = AsyncOctoAI(base_url=server.url, api_key="k")
    loops: list[weakref.ref[Any]] = []
    for _ in range(6):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(chat(client))
        loop.close()
        loops.append(weakref.ref(loop))
    del loop
    gc.collect()
    assert sum(each() is not None for each in loops) <= 1
    deadline = time.monotonic() + 2
    while len(closed) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(closed) >= 5
    del client
    gc.collect()


def test_loops_of_asyncio_run_are_forgotten(serve: Any) -> None:
    client = AsyncOctoAI(base_url=serve(lambda x: x.reply(200, answer())).url, api_key="k")
    loops: list[weakref.ref[Any]] = []

    async def work() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await chat(client)

    for _ in range(6):
        asyncio.run(work())
    gc.collect()
    assert sum(each() is not None for each in loops) <= 1


def _loops() -> list[Any]:
    try:
        import uvloop
    except ImportError:
        return [asyncio.new_event_loop]
    return [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.mark.parametrize("loop_factory", _loops())
def test_a_connection_is_not_used_whose_unasked_bytes_a_busy_loop_has_not_read(serve: Any, loop_factory: Any) -> None:
    stray = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "stray"}}]}'

    def script(x: Exchange) -> None:
        x.reply(200, answer())
        if x.number == 1:
            time.sleep(0.05)
            x.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(stray), stray))

    server = serve(script)

    async def work() -> list[str]:
        async with AsyncOctoAI(base_url=server.url, api_key="k", max_retries=0) as client:
            first = await chat(client)
            time.sleep(0.3)  # noqa: ASYNC251  # busy
            return [first, await chat(client), await chat(client)]

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(work()) == ["hello", "hello", "hello"]
    assert server.connections == 2


@pytest.mark.parametrize("begun", [False, True])
def test_two_tasks_cannot_read_one_stream(serve: Any, begun: bool) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        x.seconds_until_closed()

    server = serve(script)

    async def work() -> list[Any]:
        async with AsyncOctoAI(base_url=server.url, api_key="k", max_retries=0, timeout=Timeout(idle=20)) as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            if begun:
                await anext(stream)
            reading = asyncio.gather(stream.final(), stream.final(), return_exceptions=True)
            return await asyncio.wait_for(reading, 5)

    assert {type(error) for error in asyncio.run(work())} == {RuntimeError, StreamInterrupted}
    assert len(server.requests) <= 1  # it may be closed before any is sent
