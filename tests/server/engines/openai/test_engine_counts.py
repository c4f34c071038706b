"""Leaving an engine in the middle of its answer: what was counted is what the engine wrote, to the token."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
import uvloop

from octoai.server.engines.base import Delta, Event, Finished, Generation, Started, Usage
from octoai.server.engines.openai import exchange
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.errors import EngineFailed
from octoai.server.metering import PartMeter
from tests.server.misbehaving import (
    DONE,
    HEAD,
    Reply,
    Upstream,
    answers,
    chunk,
    event,
    generated,
    raw,
    run,
    says,
    up,
)

PROMPT_TOKENS = 7
PACES = (0, 0, 0.0005, 0.002, 0.01, 0.04)  # seconds between tokens; 0: only others of its loop run in between
BURSTS = (1, 1, 1, 50)  # tokens at once
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def generation(number: int) -> Generation:
    return Generation(max_tokens=100_000, messages=[{"role": "user", "content": "Hi"}], seed=number)


def token(count: int, **more: Any) -> bytes:
    """As vLLM writes one, now and then without text of its own: it only begins a character."""
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": count, "total_tokens": PROMPT_TOKENS + count}
    return event("" if count % 5 == 0 else "word ", usage=usage, **more)


class Counting:
    """Writes tokens without end, and counts each when it hands it to its transport, until it learns of the end.

    `written` is by the request's seed.
    """

    def __init__(self) -> None:
        self.written: dict[int, int] = {}
        self.num_open = 0

    async def say(self, asked: bytes, write: Callable[[bytes], None], drain: Callable[[], Awaitable[None]]) -> None:
        number = json.loads(asked)["seed"]
        chance = random.Random(number)
        pace, burst = chance.choice(PACES), chance.choice(BURSTS)
        await asyncio.sleep(chance.choice((0, 0, 0.01)))
        count = self.written[number] = 0
        write(HEAD)
        while True:
            for _ in range(burst if pace else 1):
                count += 1
                write(chunk(token(count)))
                self.written[number] = count
            await drain()
            # Without any rest on uvloop, where events come before callbacks, anyio's scopes find no moment to cancel.
            await asyncio.sleep(chance.uniform(0, 2 * pace) if pace or count % 100 else 0.001)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """With half-open connections, as asyncio's streams have them: it hangs up when it has stopped."""
        self.num_open += 1
        tasks: list[asyncio.Future[Any]] = []
        try:
            asked = await body(reader)
            tasks = [
                asyncio.ensure_future(self.say(asked, writer.write, writer.drain)),
                asyncio.ensure_future(reader.read(1)),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.IncompleteReadError:
            pass  # left before it had asked
        finally:
            await stop(tasks)
            writer.close()
            self.num_open -= 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


class Closing(Counting):
    """As uvicorn and aiohttp do it: the transport is closed when the client's half ends, and writes what it holds."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.get_running_loop().create_server(lambda: Connection(self), "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


class Connection(asyncio.Protocol):
    def __init__(self, upstream: Counting) -> None:
        self.upstream = upstream
        self.received = b""
        self.can_write = asyncio.Event()
        self.can_write.set()
        self.saying: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.upstream.num_open += 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, _, asked = self.received.partition(b"\r\n\r\n")
        if self.saying is None and asked and len(asked) == length(head):
            self.saying = asyncio.create_task(self.say(asked))

    async def say(self, asked: bytes) -> None:
        with suppress(ConnectionResetError):
            await self.upstream.say(asked, self.write, self.can_write.wait)

    def write(self, data: bytes) -> None:
        if self.transport.is_closing():  # it knows of the end, and takes no more
            raise ConnectionResetError
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.can_write.clear()

    def resume_writing(self) -> None:
        self.can_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.num_open -= 1
        if self.saying is not None:
            self.saying.cancel()


def length(head: bytes) -> int:
    lines = head.decode().lower().split("\r\n")
    return next(int(line.split(": ")[1]) for line in lines if line.startswith("content-length"))


async def body(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(length(await reader.readuntil(b"\r\n\r\n")))


async def stop(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# Ways to leave: each reads for a while, counting, and is gone when it returns.

Leave = Callable[[OpenAIEngine, Generation, random.Random], Coroutine[Any, Any, PartMeter]]


async def read(engine: OpenAIEngine, asked: Generation, part: PartMeter, chance: random.Random) -> None:
    """To its end, which does not come; some readers are slow."""
    slow = chance.choice((None, None, 0, 0.01))
    async with aclosing(engine.generate(asked, part.count)) as batches:
        async for batch in batches:
            part.count(batch)
            if slow is not None:
                await asyncio.sleep(slow)


def moment(chance: random.Random) -> float:
    return chance.choice((0.0, 0.003, 0.02, 0.1)) * chance.uniform(0.5, 1.5)


async def by_closing(engine: OpenAIEngine, asked: Generation, chance: random.Random) -> PartMeter:
    part, rest = PartMeter(0), chance.randint(1, 20)
    async with aclosing(engine.generate(asked, part.count)) as batches:
        async for batch in batches:
            part.count(batch)
            rest -= 1
            if not rest:
                break
            await asyncio.sleep(chance.choice((0, 0, 0.003)))
    return part


async def by_cancelling(engine: OpenAIEngine, asked: Generation, chance: random.Random) -> PartMeter:
    part = PartMeter(0)
    task = asyncio.create_task(read(engine, asked, part, chance))
    await asyncio.sleep(moment(chance))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return part


async def by_time(engine: OpenAIEngine, asked: Generation, chance: random.Random) -> PartMeter:
    part = PartMeter(0)
    with suppress(TimeoutError):
        async with asyncio.timeout(moment(chance)):
            await read(engine, asked, part, chance)
    return part


async def by_scope(engine: OpenAIEngine, asked: Generation, chance: random.Random) -> PartMeter:
    part = PartMeter(0)
    with anyio.move_on_after(moment(chance)):
        await read(engine, asked, part, chance)
    return part


LEAVES: tuple[Leave, ...] = (by_closing, by_cancelling, by_time, by_scope)


async def left_counts(engine: OpenAIEngine, numbers: range) -> dict[int, int]:
    """What was counted of each, twelve at once."""
    counted, at_once = {}, asyncio.Semaphore(12)

    async def leave(number: int) -> None:
        chance = random.Random(1000 + number)
        async with at_once:
            part = await chance.choice(LEAVES)(engine, generation(number), chance)
        counted[number] = part.completion_tokens
        assert part.usage.prompt_tokens in (0, PROMPT_TOKENS)

    await asyncio.gather(*map(leave, numbers))
    return counted


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", [Counting, Closing])
def test_what_was_written_until_it_was_left_is_counted_to_the_token(kind: type[Counting], loop: str) -> None:
    async def main() -> None:
        upstream = kind()
        async with upstream.running() as url:
            engine = OpenAIEngine(url, model="up", dialect="vllm")
            counted = await left_counts(engine, range(300))
            async with asyncio.timeout(1):
                while upstream.num_open:
                    await asyncio.sleep(0.01)
            await engine.close()
        written = {number: upstream.written.get(number, 0) for number in counted}
        assert counted == written
        assert sum(count > 0 for count in written.values()) > 150
        assert sum(count == 0 for count in written.values()) > 5

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(main(), 60))


# Leaving, one case at a time


async def left(engine: OpenAIEngine, after: float) -> list[Event]:
    """What `on_left` was told, once at most, of an answer left after so many seconds."""
    told: list[Sequence[Event]] = []

    async def read_all() -> None:
        async with aclosing(engine.generate(generation(0), told.append)) as batches:
            async for _ in batches:
                pass

    task = asyncio.create_task(read_all())
    await asyncio.sleep(after)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(told) <= 1
    return [event for events in told for event in events]


class Deaf(Upstream):
    """Does not hear that its client has gone."""

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await self.reply(self, writer)


def counted(tokens: int) -> list[Event]:
    return [Started(PROMPT_TOKENS), Delta(0, "", tokens)]


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (says(token(1), 0.3, token(2), 0.3, token(3), 30.0), counted(3)),
        (says(token(4) + token(5), 30.0), counted(5)),  # the fifth has no text
        (says(0.3, token(1), 30.0), counted(1)),
        (raw(HEAD, 30.0), []),
        (raw(b"", 30.0), []),
        (says(token(1), 0.3, token(2, reason="stop"), DONE), [Finished({0: "stop"}, Usage(PROMPT_TOKENS, 0, 2))]),
        (says(token(1), 0.3, b"data: nonsense\n\n"), counted(1)),
        (says(token(1), 0.3, end=False), counted(1)),
        (answers(400, b'{"error": {"message": "no"}}'), []),
    ],
    ids=[
        *("writes on", "without text", "begins late", "says nothing", "has no head", "ends", "errs", "dies", "refuses"),
    ],
)
def test_what_comes_after_leaving_is_told_within_a_second(reply: Reply, told: list[Event]) -> None:
    async def main() -> None:
        upstream = Deaf(reply)
        async with up(upstream) as engine:
            began = time.monotonic()
            assert await left(engine, 0.1) == told
            assert time.monotonic() - began < 0.1 + exchange.LEAVE_SECONDS + 0.2
            # The connection that was left is not used again.
            upstream.reply = says(token(1, reason="stop"), DONE)
            assert isinstance((await generated(engine))[-1], Finished)

    run(main())


def test_a_head_that_comes_while_we_leave_is_read_too() -> None:
    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        writer.write(HEAD + chunk(token(1)))

    async def main() -> None:
        async with up(Deaf(reply)) as engine:
            assert await left(engine, 0.1) == counted(1)

    run(main())


def test_an_answer_read_to_its_end_is_not_told_again() -> None:
    whole = says(token(1), token(2, reason="stop"), DONE)

    async def main() -> None:
        async with up(Upstream(whole)) as engine:
            told: list[Sequence[Event]] = []
            async with aclosing(engine.generate(generation(0), told.append)) as batches:
                async for batch in batches:
                    if isinstance(batch[-1], Finished):
                        break
            assert told == []

    run(main())


@pytest.mark.parametrize("end", [b"data: nonsense\n\n", b'data: {"error": {"message": "out of memory"}}\n\n', b""])
def test_what_came_with_the_engines_failure_is_told(end: bytes) -> None:
    async def main() -> None:
        async with up(Upstream(says(token(1) + token(2) + end, end=False))) as engine:
            told: list[Sequence[Event]] = []
            with pytest.raises(EngineFailed):
                async with aclosing(engine.generate(generation(0), told.append)) as batches:
                    async for _ in batches:
                        pass
            assert told == [counted(2)]

    run(main())


def test_a_request_left_unanswered_is_not_sent_again() -> None:
    async def main() -> None:
        upstream = Upstream(raw(b"", 30.0))
        async with up(upstream) as engine:
            assert await left(engine, 0.1) == []
        assert sum(line.startswith("POST") for line, _, _ in upstream.requests) == 1

    run(main())


async def flooding(_: Upstream, writer: asyncio.StreamWriter) -> None:
    """More than anybody reads ahead, and then a reset."""
    writer.write(HEAD + b"".join(chunk(event("word ")) for _ in range(8000)))
    with suppress(TimeoutError):
        await asyncio.wait_for(writer.drain(), 0.2)
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_an_engine_that_has_just_reset_its_connection_can_be_left(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        told: list[Sequence[Event]] = []
        long = Generation(max_tokens=9000, messages=[{"role": "user", "content": "Hi"}])
        async with up(Upstream(flooding)) as engine, aclosing(engine.generate(long, told.append)) as batches:
            await anext(batches)
            await asyncio.sleep(0.6)
        ((started, delta),) = told
        assert started == Started(0)
        assert isinstance(delta, Delta)
        assert delta.completion_tokens > 100

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
