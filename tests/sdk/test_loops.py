"""Clients of asyncio: what event loops leave behind, and what happens while a loop is busy."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any

import pytest

from octoai import AsyncOctoAI
from tests.sdk.conftest import MESSAGES
from tests.sdk.misbehaving import Exchange, answer


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
