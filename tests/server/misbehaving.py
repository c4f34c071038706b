"""A server of engines that says what it is told to, in every way that servers should not."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octoai.server.engines.base import Delta, Deltas, Event, Generation
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.errors import Refusal

GENERATION = Generation(max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
UNSEEN = replace(GENERATION, is_stream=False)  # before its end
MODELS = {"object": "list", "data": [{"id": "up", "object": "model", "max_model_len": 4096}]}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
Reply = Callable[["Upstream", asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str = "", reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}\n\n'
WHOLE = (event("Hel"), event("lo"), event("", "stop"), USAGE, DONE)


def says(*blocks: bytes | float, end: bool = True, head: bytes = HEAD) -> Reply:
    """Events, with pauses in seconds between them; then the end of the body, or only that of the connection."""

    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for block in blocks:
            if isinstance(block, bytes):
                writer.write(chunk(block))
                await writer.drain()
            else:
                await asyncio.sleep(block)
        writer.write(b"0\r\n\r\n" if end else b"")

    return reply


def answers(status: int, body: bytes, *headers: bytes) -> Reply:
    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        lines = b"".join(b"%s\r\n" % header for header in headers)
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%s\r\n%s" % (status, len(body), lines, body))

    return reply


def raw(data: bytes, pause: float = 0) -> Reply:
    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await asyncio.sleep(pause)

    return reply


async def forever(upstream: Upstream, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    while True:
        writer.write(chunk(event("word ")))
        await writer.drain()
        await asyncio.sleep(0.01)


class Upstream:
    """Answers /v1/models properly, and every generation with `reply`. Knows who is connected, and what was asked."""

    def __init__(self, reply: Reply | None = None, models: Reply | None = None) -> None:
        self.reply = reply or says(*WHOLE)
        self.models = models or answers(200, json.dumps(MODELS).encode())
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.num_generating = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:])
                raw_lines = dict(line.split(": ", 1) for line in lines[1:])
                headers["authorization"] = next(
                    (value for name, value in raw_lines.items() if name.lower() == "authorization"), ""
                )
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests.append((lines[0], headers, body))
                if lines[0].startswith("GET"):
                    await self.models(self, writer)
                else:
                    await self._generate(reader, writer)
                await writer.drain()
                if self.is_last(lines[0]):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def is_last(self, line: str) -> bool:
        return not line.startswith("GET")

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until it is said, or the other end hangs up."""
        self.num_generating += 1
        replying = asyncio.ensure_future(self.reply(self, writer))
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([replying, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.num_generating -= 1
            for task in (replying, leaving):
                task.cancel()
            await asyncio.gather(replying, leaving, return_exceptions=True)


@asynccontextmanager
async def up(upstream: Upstream, unix: Path | None = None, **options: Any) -> AsyncIterator[OpenAIEngine]:
    if unix is None:
        server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    else:
        server = await asyncio.start_unix_server(upstream.serve, unix)
        url = f"unix:{unix}"
    engine = OpenAIEngine(url, model="up", **{"dialect": "vllm", **options})
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()
        server.close()


async def soon(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(1):
        while not fact():
            await asyncio.sleep(0.01)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 20))


async def generated(engine: OpenAIEngine, generation: Generation = GENERATION) -> list[Event]:
    async with aclosing(engine.generate(generation)) as batches:
        return [event async for batch in batches for event in batch]


def refused(reply: Reply, kind: type[Refusal], *, after: int = 0, **options: Any) -> Refusal:
    """What becomes of an answer like this, after so many deltas."""
    caught: list[Refusal] = []

    async def main() -> None:
        async with up(Upstream(reply), **options) as engine:
            for generation in (GENERATION, UNSEEN):
                deltas = 0
                with pytest.raises(kind) as raised:
                    async with aclosing(engine.generate(generation)) as batches:
                        async for batch in batches:
                            deltas += num_deltas(batch)
                assert deltas == after
                caught.append(raised.value)

    run(main())
    first, second = caught
    assert first.body() == second.body()
    return first


def num_deltas(batch: Sequence[Event]) -> int:
    return sum(
        1 if isinstance(event, Delta) else len(event.texts) for event in batch if isinstance(event, Delta | Deltas)
    )


class InThread:
    """The server in a loop of its own, for a service in another."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(upstream.serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self.loop).result(5)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()
