"""HTTP/1.1 over connections of our own, for asyncio: the twin of `_pool`.

A protocol that wakes its reader, instead of a library that parses every chunk of a stream in layers: a third of the
cost per event.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from octoai._async_connection import Connection
from octoai._async_waits import until_stopped
from octoai._deadlines import Deadlines
from octoai._happy_eyeballs import connected
from octoai._http1 import ProtocolError, ResponseParser
from octoai._pool import MAX_IDLE
from octoai._sockets import end_of, seconds_until
from octoai._tls import tls_context
from octoai._transport import (
    DRAIN_BYTES,
    DRAIN_SECONDS,
    AsyncResponse,
    Message,
    Origin,
    Request,
    connection_error,
    failure,
    is_timeout,
    message_of,
)
from octoai.errors import ApiConnectionError

_INHERITED: list[Any] = []  # connections of the parent process: kept, so that nothing closes them


class _LoopPool:
    """The idle connections of one event loop. Once it is closed, none is kept any more."""

    def __init__(self) -> None:
        self.idle: dict[Origin, deque[Connection]] = {}
        self._is_closed = False

    def close(self) -> None:
        self._is_closed = True
        idle, self.idle = self.idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.abort()

    def take(self, origin: Origin) -> Connection | None:
        idle = self.idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return None

    def give_back(self, connection: Connection) -> None:
        if self._is_closed:
            connection.abort()
            return
        idle = self.idle.setdefault(connection.origin, deque())
        connection.idle_since = time.monotonic()
        idle.append(connection)
        if len(idle) > MAX_IDLE:
            idle.popleft().abort()
        # Nobody may ask for another origin again, to see that its connections are over.
        for other in self.idle.values():
            while other is not idle and other and not other[0].is_usable():
                other.popleft().abort()


async def _open_until_closed(pool: _LoopPool) -> AsyncGenerator[None, None]:
    """`asyncio.run` closes asynchronous generators at its end: the only hook that a loop offers. The pool does not know
    its own, so that they do not wait for the garbage collector where a client is forgotten."""
    try:
        yield
    finally:
        pool.close()


class AsyncSocketTransport:
    """A pool for each event loop, since a connection belongs to the loop that opened it."""

    def __init__(self) -> None:
        self._pools: WeakKeyDictionary[Any, tuple[_LoopPool, AsyncGenerator[None, None]]] = WeakKeyDictionary()
        self._pid = os.getpid()

    async def send(self, request: Request, deadlines: Deadlines) -> AsyncResponse:
        origin, message = message_of(request)
        pool = await self._own_pool()
        connection = pool.take(origin)
        if connection is not None:
            try:
                return await AsyncSocketResponse(pool, connection).open(request, message, deadlines)
            except ApiConnectionError as error:
                # A kept connection may have died while nobody looked. Nothing came back on it: once more, on a new one.
                if not error.retryable:
                    raise
        connection = await self._connect(origin, request, deadlines)
        return await AsyncSocketResponse(pool, connection).open(request, message, deadlines)

    async def close(self) -> None:
        """Those of the running loop; other loops close their own."""
        _, keeper = self._pools.pop(asyncio.get_running_loop(), (None, None))
        if keeper is not None:
            await keeper.aclose()

    async def _own_pool(self) -> _LoopPool:
        if self._pid != os.getpid():
            _INHERITED.append(self._pools)
            self._pools, self._pid = WeakKeyDictionary(), os.getpid()
        loop = asyncio.get_running_loop()
        pool, _ = self._pools.get(loop, (None, None))
        if pool is None:
            # A pool refers to its loop, and so would keep it for as long as the client lives.
            for other in [each() for each in self._pools.keyrefs()]:  # a list at once: other threads add theirs
                left, _ = self._pools.pop(other, (None, None)) if other and other.is_closed() else (None, None)
                if left is not None:
                    left.close()
            pool = _LoopPool()
            keeper = _open_until_closed(pool)
            self._pools[loop] = pool, keeper
            await anext(keeper)
        return pool

    async def _connect(self, origin: Origin, request: Request, deadlines: Deadlines) -> Connection:
        scheme, host, port = origin
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"host": host, "port": port}
        if scheme == "https":
            options.update(ssl=tls_context(), server_hostname=host)
        try:
            async with until_stopped(deadlines, deadlines.connecting()):
                # uvloop opens its sockets itself. A number is one address, and needs no thread that looks it up.
                if isinstance(loop, asyncio.BaseEventLoop) and not _is_number(host):
                    options.update(host=None, port=None, sock=await connected(host, port))
                _, connection = await loop.create_connection(lambda: Connection(origin, loop), **options)
        except (OSError, UnicodeError, ValueError) as error:
            if is_timeout(error):
                raise deadlines.passed("connect") from error
            certificate = type(error).__name__ == "SSLCertVerificationError"
            raise connection_error(error, request, retryable=not certificate) from error
        return connection


class AsyncSocketResponse:
    """One exchange on one connection."""

    def __init__(self, pool: _LoopPool, connection: Connection) -> None:
        self._pool = pool
        self._connection: Connection | None = connection
        self._parser = ResponseParser()
        self._is_sent = True

    @property
    def status(self) -> int:
        return self._parser.status

    @property
    def headers(self) -> dict[str, str]:
        return self._parser.headers

    async def open(self, request: Request, message: Message, deadlines: Deadlines) -> AsyncSocketResponse:
        connection = self._connection
        assert connection is not None
        deadlines.on_stop = self._abort
        try:
            deadlines.waiting()  # none has passed
            rest = connection.start(self._parser, message)
            if rest:
                await self._send_rest(connection, rest, deadlines)
            while not self.status:
                if connection.failure is not None:
                    raise connection.failure
                await connection.wait(deadlines.waiting())
        except (OSError, ProtocolError) as error:
            await self.close()
            raise failure(error, request, deadlines, retryable=not self._parser.begun) from error
        except BaseException:
            await self.close()
            raise
        return self

    async def receive(self, seconds: float | None) -> bytes:
        connection = self._connection
        ends, has_waited = None, False
        while connection is not None:
            part = connection.take()
            if part:
                return part
            if self._parser.done:
                self._release(connection)
                break
            if connection.failure is not None:
                raise connection.failure
            if has_waited:  # bytes that are no body, as the head of a chunk, do not begin the wait anew
                ends = ends or end_of(seconds)
                seconds = seconds_until(ends)
            await connection.wait(seconds)
            has_waited = True
        return b""

    async def finish(self) -> None:
        left = DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._connection is not None and left > 0:
                    left -= len(await self.receive(None))
        except (OSError, ProtocolError):
            pass  # the answer is complete; only the connection is lost
        await self.close()

    async def close(self) -> None:
        self._abort()

    def __del__(self) -> None:
        self._abort()

    def _abort(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    async def _send_rest(self, connection: Connection, rest: memoryview, deadlines: Deadlines) -> None:
        """The waits begin anew with each piece that has left. A service that has refused the request already may take
        the rest of it before it says why; its answer is not kept waiting for that."""
        while rest and self.status < 300:
            left = connection.send(rest)
            if len(left) < len(rest):
                rest = left
                deadlines.send()
            elif connection.failure is not None:
                raise connection.failure
            else:
                await connection.wait(deadlines.waiting())
        self._is_sent = not rest
        if rest and not self._parser.done:
            connection.send_all(rest)

    def _release(self, connection: Connection) -> None:
        self._connection = None
        if self._parser.reusable and self._is_sent and connection.failure is None and connection.has_sent:
            connection.rest()
            self._pool.give_back(connection)
        else:
            connection.abort()


def _is_number(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            return bool(socket.inet_pton(family, host))
    return False
