"""An engine in a process of its own that does as each request says, and keeps count of the tokens it wrote.

It speaks vLLM's dialect. The prompt is a JSON object, `Order`. When the other half of a connection ends it stops
at once and hangs up, as vLLM's own server does.

    python -m tests.load.upstream      prints its port, serves until its standard input ends
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODEL = "counted"
TOKEN = "tok "  # the text of every token: who counts these in an answer counts tokens
CONTEXT_LENGTH = 8192


@dataclass(frozen=True, slots=True)
class Order:
    """What a request is to be answered with: `num_tokens` tokens, `pace` seconds apart on average.

    After `pause_after` tokens there is nothing for `pause_seconds`. `refused`: it is answered with 400 instead.
    `breaks_after`: the connection is cut after so many tokens.
    """

    number: int
    num_tokens: int = 20
    pace: float = 0.0
    prompt_tokens: int = 7
    cached_tokens: int = 0
    first_seconds: float = 0.0
    pause_after: int | None = None
    pause_seconds: float = 0.0
    refused: bool = False
    breaks_after: int | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return [{"role": "user", "content": json.dumps(said)}]


@dataclass(slots=True)
class Written:
    """What a request has come to: tokens of all its choices, and how many answers to it were begun and ended."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    num_begun: int = 0
    num_ended: int = 0
    num_open: int = 0


class Upstream:
    """The process, from outside."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.load.upstream"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def written(self) -> dict[int, Written]:
        """By the order's number, as it stands now."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", "/written")
        listed: Mapping[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return {int(number): Written(**counts) for number, counts in listed.items()}

    def at_rest(self, seconds: float = 10) -> dict[int, Written]:
        """The same, when nothing is being written any more."""
        end = time.monotonic() + seconds
        while True:
            written = self.written()
            if not any(each.num_open for each in written.values()):
                return written
            assert time.monotonic() < end, "the engine still writes"
            time.sleep(0.05)

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait(10)


@dataclass
class _Asked:
    method: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> Order:
        text = self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]
        return Order(**json.loads(text))


class _Server:
    def __init__(self) -> None:
        self.written: dict[int, Written] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._answer(await _asked(reader), reader, writer):
                    pass
        finally:
            writer.close()

    async def _answer(self, asked: _Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection can be used again."""
        if asked.path == "/v1/models":
            return _whole(writer, {"object": "list", "data": [{"id": MODEL, "max_model_len": CONTEXT_LENGTH}]})
        if asked.path == "/written":
            return _whole(writer, {number: asdict(counts) for number, counts in self.written.items()})
        if asked.path == "/tokenize":
            return _whole(writer, {"count": asked.order.prompt_tokens})
        if asked.order.refused:
            return _whole(writer, {"object": "error", "message": "refused as ordered", "code": 400}, "400 Bad Request")
        return await self._until_left(self._say(asked, writer.write, writer.drain), reader)

    async def _until_left(self, saying: Awaitable[bool], reader: asyncio.StreamReader) -> bool:
        """`saying` to its end, or until the client has gone: it says nothing while it waits for an answer."""
        tasks = [asyncio.ensure_future(saying), asyncio.ensure_future(reader.read(1))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        said, _ = await asyncio.gather(*tasks, return_exceptions=True)
        return said is True

    async def _say(self, asked: _Asked, write: Callable[[bytes], None], drain: Callable[[], Awaitable[None]]) -> bool:
        order = asked.order
        counts = self.written.setdefault(order.number, Written(order.prompt_tokens, order.cached_tokens))
        counts.num_begun += 1
        counts.num_open += 1
        try:
            await asyncio.sleep(order.first_seconds)
            write(_HEAD)
            for said in range(1, min(order.num_tokens, asked.body["max_tokens"]) + 1):
                if order.breaks_after is not None and said > order.breaks_after:
                    return False
                write(_chunk(_event(asked, order, said)))
                counts.completion_tokens += 1
                await drain()
                await _rest(order, said)
            counts.num_ended += 1
            write(_chunk(_event(asked, order, said, "length")) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            await drain()
            return True
        finally:
            counts.num_open -= 1


async def _rest(order: Order, said: int) -> None:
    if said == order.pause_after:
        await asyncio.sleep(order.pause_seconds)
    elif order.pace:
        await asyncio.sleep(random.uniform(0, 2 * order.pace))
    else:
        await asyncio.sleep(0 if said % 50 else 0.001)


_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(asked: _Asked, order: Order, said: int, reason: str | None = None) -> bytes:
    text = "" if reason else TOKEN
    is_chat = "messages" in asked.body
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    choice |= {"delta": {"content": text}} if is_chat else {"text": text}
    usage = {
        "prompt_tokens": order.prompt_tokens,
        "completion_tokens": said,
        "total_tokens": order.prompt_tokens + said,
        "prompt_tokens_details": {"cached_tokens": order.cached_tokens},
    }
    return b"data: " + json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode() + b"\n\n"


def _whole(writer: asyncio.StreamWriter, body: Any, status: str = "200 OK") -> bool:
    raw = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    return True


async def _asked(reader: asyncio.StreamReader) -> _Asked:
    line, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    lengths = [int(header.split(":")[1]) for header in headers if header.lower().startswith("content-length:")]
    body = await reader.readexactly(lengths[0]) if lengths else b""
    method, path, _ = line.split(" ", 2)
    return _Asked(method, path, json.loads(body) if body else {})


async def main() -> None:
    server = await asyncio.start_server(_Server().serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
