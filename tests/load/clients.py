"""Clients over bare sockets, each of which remembers what it was told, and when."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from tests.load.upstream import TOKEN, Order

_MARK = TOKEN.encode()
_TAIL_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Leave:
    """When a client goes: after so many tokens, or so many seconds, whichever comes first."""

    tokens: int | None = None
    seconds: float | None = None
    resets: bool = False


@dataclass(slots=True)
class Told:
    """What a client knows of its request. `seen` are moments, and how many tokens had come by then; `killed_at` is
    when the service was killed under it, if it was; `is_over` once nothing more can come."""

    number: int
    how: str
    request_id: str | None = None
    status: int | None = None
    usage: dict[str, Any] | None = None
    left_at: float | None = None
    killed_at: float | None = None
    is_over: bool = False
    seen: list[tuple[float, int]] = field(default_factory=list)
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def has_begun(self) -> bool:
        """Whether a byte of an answer came."""
        return self.status == 200

    @property
    def is_finished(self) -> bool:
        return self.usage is not None

    @property
    def num_seen(self) -> int:
        return self.seen[-1][1] if self.seen else 0

    def seen_by(self, moment: float) -> int:
        """Tokens that had come at that moment."""
        return max((count for at, count in self.seen if at <= moment), default=0)


@dataclass(frozen=True)
class Target:
    url: str
    token: str
    model: str

    @property
    def address(self) -> tuple[str, int]:
        place = urlsplit(self.url)
        assert place.hostname and place.port
        return place.hostname, place.port


@dataclass(frozen=True)
class Request:
    """How an order is sent."""

    order: Order
    stream: bool = True
    is_chat: bool = True
    n: int = 1
    leave: Leave | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        prompt = {"messages": self.order.messages} if self.is_chat else {"prompt": self.order.messages[0]["content"]}
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        return {"model": model, "max_tokens": 4000, "n": self.n, **streamed, **prompt}

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"


async def ask(target: Target, request: Request, told: Told) -> Told:
    """Send it and read until it ends, breaks, or is to be left. `told` is kept up to date meanwhile."""
    try:
        reader, writer = await asyncio.open_connection(*target.address)
    except OSError:
        told.is_over = True
        return told
    try:
        with suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(None if request.leave is None else request.leave.seconds):
                writer.write(_head_and_body(target, request))
                await _read(reader, told, request)
        if request.leave is not None and not told.is_finished:
            told.left_at = time.monotonic()
    finally:
        told.is_over = True
        await _hang_up(writer, resets=request.leave is not None and request.leave.resets)
    return told


def _head_and_body(target: Target, request: Request) -> bytes:
    raw = json.dumps(request.body(target.model)).encode()
    head = f"POST {request.path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {target.token}\r\nconnection: close\r\n"
    more = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"{head}{more}content-length: {len(raw)}\r\n\r\n".encode() + raw


async def _read(reader: asyncio.StreamReader, told: Told, request: Request) -> None:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    told.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    told.request_id = told.headers["x-request-id"]
    told.status = int(status.split(" ")[1])
    if request.stream and told.status == 200:
        await _read_stream(reader, told, request.leave)
        return
    told.body = await reader.readexactly(int(told.headers["content-length"]))
    if told.status == 200:
        told.seen.append((time.monotonic(), told.body.count(_MARK)))
        told.usage = json.loads(told.body, parse_float=str)["usage"]


async def _read_stream(reader: asyncio.StreamReader, told: Told, leave: Leave | None) -> None:
    most = None if leave is None else leave.tokens
    count, carried = 0, b""
    while block := await reader.read(65536):
        count += (carried[-len(_MARK) + 1 :] + block).count(_MARK)
        carried = (carried + block)[-_TAIL_BYTES:]
        told.seen.append((time.monotonic(), count))
        if most is not None and count >= most:
            return
    if b"data: [DONE]\n\n" in carried:
        told.usage = last_usage(carried)


def last_usage(text: bytes) -> dict[str, Any] | None:
    lines = [line for line in text.split(b"\n") if line.startswith(b"data: {") and b'"usage":{' in line]
    return None if not lines else dict(json.loads(lines[-1].removeprefix(b"data: "), parse_float=str)["usage"])


async def _hang_up(writer: asyncio.StreamWriter, *, resets: bool) -> None:
    if resets:
        writer.transport.abort()
        return
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


class Load:
    """Clients in a thread of their own, each with one request after the other, until they are told to stop.

    `next_request` says what to send: it is given the request's number.
    """

    def __init__(
        self,
        target: Target,
        next_request: Callable[[int], Request],
        *,
        num_clients: int = 12,
        numbers: itertools.count[int],
        total: int | None = None,
    ) -> None:
        self.target = target
        self.told: list[Told] = []
        self._next_request = next_request
        self._num_clients = num_clients
        self._numbers = numbers
        self._left = total
        self._is_stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> Load:
        self._thread.start()
        return self

    def stop(self) -> list[Told]:
        """Nothing new is sent; return when what runs has ended."""
        self._is_stopping = True
        return self.join()

    def join(self, seconds: float = 110) -> list[Told]:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "clients still wait for their answers"
        return self.told

    async def _run(self) -> None:
        clients: list[Coroutine[Any, Any, None]] = [self._client() for _ in range(self._num_clients)]
        await asyncio.gather(*clients)

    async def _client(self) -> None:
        while not self._is_stopping and self._left != 0:
            if self._left is not None:
                self._left -= 1
            number = next(self._numbers)
            request = self._next_request(number)
            told = Told(number, "whole" if not request.stream else "left" if request.leave else "stream")
            self.told.append(told)
            await ask(self.target, request, told)
            if told.status != 200:
                await asyncio.sleep(0.02)


def mixed(number: int) -> Request:
    """Streams read to the end and left in all ways, and whole answers; fast ones and slow ones."""
    chance = random.Random(number)
    kind = chance.choices(("stream", "left", "whole", "whole left"), (5, 4, 3, 1))[0]
    order = Order(
        number,
        num_tokens=chance.choice((1, 5, 40, 40, 150)),
        pace=chance.choice((0, 0.002, 0.01, 0.03)),
        prompt_tokens=chance.randint(1, 400),
        first_seconds=chance.choice((0, 0, 0, 0.05)),
    )
    order = _with_cache(order, chance)
    headers = {"x-request-id": f"load-{number}"} if chance.random() < 0.2 else {}
    n = 2 if chance.random() < 0.1 else 1
    leave = _leave(chance) if "left" in kind else None
    return Request(order, "whole" not in kind, chance.random() < 0.8, n, leave, headers)


def leaving(number: int) -> Request:
    """Streams that their clients leave: after some tokens, by a read that takes too long, by cutting the connection."""
    chance = random.Random(number)
    stalls = chance.random() < 0.3
    order = Order(
        number,
        num_tokens=3000,
        pace=chance.choice((0.0005, 0.002, 0.01, 0.03)),
        prompt_tokens=chance.randint(1, 400),
        pause_after=chance.randint(1, 10) if stalls else None,
        pause_seconds=30.0,
    )
    leave = Leave(seconds=chance.uniform(0.3, 0.6)) if stalls else _leave(chance)
    return Request(_with_cache(order, chance), leave=leave, headers={"x-request-id": f"left-{number}"})


def _with_cache(order: Order, chance: random.Random) -> Order:
    return replace(order, cached_tokens=chance.choice((0, order.prompt_tokens // 2)))


def _leave(chance: random.Random) -> Leave:
    resets = chance.random() < 0.5
    if chance.random() < 0.5:
        return Leave(tokens=chance.randint(1, 30), seconds=3.0, resets=resets)
    return Leave(seconds=chance.choice((0.0, 0.003, 0.03, 0.3)) * chance.uniform(0.5, 1.5), resets=resets)
