"""The real SDKs in the load: streams that are left by `close()`, by a read's timeout, by cancelling a task."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import openai

from octoai import ApiError, AsyncOctoAI, OctoAI, Timeout
from tests.load.clients import Leave, Request, Target, Told
from tests.load.upstream import TOKEN, Order

# Streams a request until it has so many tokens, or for so long, and goes.
LeaveBy = Callable[[Target, Request, Told], None]


def by_close(target: Target, request: Request, told: Told) -> None:
    """`close()` in the middle, of our own SDK."""
    with OctoAI(**_client(target, told)) as client:
        stream = client.text_gen.create_chat_completion_stream(**_params(target, request))
        _read(stream, told, _most(request))
        _note(told, stream.request_id)
        stream.close()


def by_timeout(target: Target, request: Request, told: Told) -> None:
    """A read that takes longer than the SDK waits."""
    patience = Timeout(connect=5, read=0.4)
    with OctoAI(**_client(target, told), timeout=patience) as client:
        stream = client.text_gen.create_chat_completion_stream(**_params(target, request))
        with suppress(ApiError):
            _read(stream, told, 10_000)
        _note(told, stream.request_id)
        stream.close()


def by_cancelling(target: Target, request: Request, told: Told) -> None:
    """A task that is cancelled while it connects, waits for its answer, or reads."""

    async def main() -> None:
        async with AsyncOctoAI(**_client(target, told)) as client:
            stream = client.text_gen.create_chat_completion_stream(**_params(target, request))

            async def read() -> None:
                async for chunk in stream:
                    _count(told, chunk)

            task = asyncio.create_task(read())
            chance = random.Random(told.number)
            await asyncio.wait({task}, timeout=chance.choice((0.03, 0.5)) * chance.random())
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            _note(told, stream.request_id)
            await stream.close()

    asyncio.run(main())


def by_close_of_openai(target: Target, request: Request, told: Told) -> None:
    with openai.OpenAI(**_client(target, told)) as client:
        stream = client.chat.completions.create(**_params(target, request), stream=True)
        told.request_id, told.status = stream.response.headers["x-request-id"], 200
        _read(stream, told, _most(request))
        told.left_at = time.monotonic()
        stream.close()


WAYS: tuple[LeaveBy, ...] = (by_close, by_timeout, by_cancelling, by_close_of_openai)


def leave_all(target: Target, numbers: Sequence[int], num_threads: int = 8) -> list[Told]:
    """A stream for each number, begun and left in one of the ways after the other."""

    def leave(number: int) -> Told:
        way = WAYS[number % len(WAYS)]
        told = Told(number, way.__name__)
        way(target, _request(number, stalls=way is by_timeout), told)
        return told

    with ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(leave, numbers))


def _request(number: int, *, stalls: bool) -> Request:
    order = Order(number, num_tokens=3000, pace=0.01, pause_after=number % 7 + 1 if stalls else None, pause_seconds=30)
    return Request(order, leave=Leave(tokens=number % 20 + 1))


def _client(target: Target, told: Told) -> dict[str, Any]:
    """With an id of ours: who leaves before the answer's head has come does not know the service's."""
    return {
        "api_key": target.token,
        "base_url": f"{target.url}/v1",
        "max_retries": 0,
        "default_headers": {"x-request-id": f"left-{told.number}"},
    }


def _params(target: Target, request: Request) -> dict[str, Any]:
    return {"model": target.model, "messages": request.order.messages, "max_tokens": 4000}


def _most(request: Request) -> int:
    return request.leave.tokens if request.leave and request.leave.tokens else 5


def _read(stream: Any, told: Told, most: int) -> None:
    for chunk in stream:
        _count(told, chunk)
        if told.num_seen >= most:
            return


def _count(told: Told, chunk: Any) -> None:
    more = (chunk.choices[0].delta.content or "").count(TOKEN) if chunk.choices else 0
    told.seen.append((time.monotonic(), told.num_seen + more))
    if chunk.usage is not None:
        told.usage = chunk.usage.model_dump()


def _note(told: Told, request_id: str | None) -> None:
    told.request_id = request_id
    told.status = None if request_id is None else 200
    told.left_at = time.monotonic()
