"""HTTP/1.1 over connections of our own, for asyncio: the twin of `_pool`.

A protocol that wakes its reader, instead of a library that parses every chunk of a stream in layers: a third of the
cost per event. One timer a connection serves every wait, and is moved only when it would ring too early.
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

from octoai._deadlines import Deadlines
from octoai._happy_eyeballs import connected
from octoai._http1 import ProtocolError, ResponseParser
from octoai._pool import MAX_IDLE, MAX_IDLE_SECONDS, is_silent, tls_context
from octoai._sockets import end_of, seconds_until, tune
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

_BLOCK_BYTES = 32 * 1024
_MAX_BUFFERED_BYTES = 256 * 1024
_NEVER = float("inf")
_INHERITED: list[Any] = []  # connections of the parent process: kept, so that nothing closes them


class _LoopPool:
    """The idle connections of one event loop, closed when that loop ends."""

    def __init__(self) -> None:
        self.idle: dict[Origin, deque[_Connection]] = {}
        self.keeper: AsyncGenerator[None, None] = self._until_closed()

    async def _until_closed(self) -> AsyncGenerator[None, None]:
        # `asyncio.run` closes asynchronous generators at its end: the only hook that a loop offers.
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        idle, self.idle = self.idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.abort()

    def take(self, origin: Origin) -> _Connection | None:
        idle = self.idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return None

    def give_back(self, connection: _Connection) -> None:
        idle = self.idle.setdefault(connection.origin, deque())
        connection.idle_since = time.monotonic()
        idle.append(connection)
        if len(idle) > MAX_IDLE:
            idle.popleft().abort()


class AsyncSocketTransport:
    """A pool for each event loop, since a connection belongs to the loop that opened it."""

    def __init__(self) -> None:
        self._pools: WeakKeyDictionary[Any, _LoopPool] = WeakKeyDictionary()
        self._pid = os.getpid()
        self._tls: Any = None

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
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.keeper.aclose()

    async def _own_pool(self) -> _LoopPool:
        if self._pid != os.getpid():
            _INHERITED.append(self._pools)
            self._pools, self._pid = WeakKeyDictionary(), os.getpid()
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            # A pool refers to its loop, and so would keep it for as long as the client lives.
            for other in [other for other in self._pools if other.is_closed()]:
                self._pools.pop(other).close()
            pool = self._pools[loop] = _LoopPool()
            await anext(pool.keeper)
        return pool

    async def _connect(self, origin: Origin, request: Request, deadlines: Deadlines) -> _Connection:
        scheme, host, port = origin
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"host": host, "port": port}
        if scheme == "https":
            self._tls = self._tls or tls_context()
            options.update(ssl=self._tls, server_hostname=host)
        try:
            async with asyncio.timeout(deadlines.connecting()):
                # uvloop opens its sockets itself. A number is one address, and needs no thread that looks it up.
                if isinstance(loop, asyncio.BaseEventLoop) and not _is_number(host):
                    options.update(host=None, port=None, sock=await connected(host, port))
                _, connection = await loop.create_connection(lambda: _Connection(origin, loop), **options)
        except (OSError, UnicodeError, ValueError) as error:
            if is_timeout(error):
                raise deadlines.passed("connect") from error
            certificate = type(error).__name__ == "SSLCertVerificationError"
            raise connection_error(error, request, retryable=not certificate) from error
        return connection


class _Connection(asyncio.BufferedProtocol):
    """Bytes in, and somebody woken. Idle between two answers, when `parser` is None.

    The bytes come into a buffer of its own: for a plain `Protocol`, the event loop makes one of 256 KiB for every read,
    which costs more than all that is done with a token.
    """

    def __init__(self, origin: Origin, loop: asyncio.AbstractEventLoop) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.parser: ResponseParser | None = None
        self.failure: Exception | None = None
        self._loop = loop
        self._pid = os.getpid()
        self._transport: Any = None
        self._buffer = memoryview(bytearray(_BLOCK_BYTES))
        self._parts: list[bytes] = []
        self._num_buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def is_usable(self) -> bool:
        """Not too old, open, and silent: bytes that nobody asked for mean that the service has given it up. A loop that
        was busy may not have read them yet."""
        is_young = time.monotonic() - self.idle_since < MAX_IDLE_SECONDS
        is_open = self.failure is None and self._pid == os.getpid() and not self._transport.is_closing()
        return is_young and is_open and is_silent(self._transport.get_extra_info("socket"))

    def start(self, parser: ResponseParser, message: Message) -> None:
        self.parser = parser
        self._transport.write(message)

    def rest(self) -> None:
        """The answer is over; another request may follow."""
        self.parser = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def abort(self) -> None:
        self.rest()
        # After a fork, closing would say goodbye on the parent's connection.
        if self._pid == os.getpid():
            _shut_down(self._transport.get_extra_info("socket"))
            if not self._loop.is_closed():
                self._transport.abort()

    def take(self) -> bytes:
        """What has arrived of the body; empty when nothing has."""
        parts = self._parts
        if not parts:
            return b""
        self._parts = []
        if self._num_buffered > _MAX_BUFFERED_BYTES:
            self._transport.resume_reading()
        self._num_buffered = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def wait(self, seconds: float | None) -> asyncio.Future[None]:
        """To be awaited: until something happens. `TimeoutError` after so many seconds."""
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("another task is reading this answer")  # nothing would ever wake it
        self._waiter = waiter = self._loop.create_future()
        if seconds is None:
            self._due = _NEVER
        else:
            self._due = self._loop.time() + seconds
            if self._timer is None or self._timer.when() > self._due:
                self._set_timer()
        return waiter

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done() or self._due == _NEVER:
            return
        if self._loop.time() >= self._due:
            self._waiter.set_exception(TimeoutError())
        else:
            self._set_timer()  # waits since then have moved it

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # What the event loop calls

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        raw = transport.get_extra_info("socket")
        if raw is not None:
            tune(raw)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, num_bytes: int) -> None:
        parser = self.parser
        if parser is None:
            self.failure = ProtocolError("the service said something unasked")
            return
        try:
            part = parser.feed(bytes(self._buffer[:num_bytes]))
        except ProtocolError as error:
            self.failure = error
            self._wake()
            return
        if part:
            self._parts.append(part)
            self._num_buffered += len(part)
            if self._num_buffered > _MAX_BUFFERED_BYTES:
                self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self.failure is None:
            self.failure = error or self._end()
        self._wake()

    def _end(self) -> Exception:
        """The peer closed: the end of some bodies, and the loss of others."""
        if self.parser is not None:
            try:
                self.parser.end()
            except ProtocolError as error:
                return error
        return ConnectionResetError("the service closed the connection")


class AsyncSocketResponse:
    """One exchange on one connection."""

    def __init__(self, pool: _LoopPool, connection: _Connection) -> None:
        self._pool = pool
        self._connection: _Connection | None = connection
        self._parser = ResponseParser()

    @property
    def status(self) -> int:
        return self._parser.status

    @property
    def headers(self) -> dict[str, str]:
        return self._parser.headers

    async def open(self, request: Request, message: Message, deadlines: Deadlines) -> AsyncSocketResponse:
        connection = self._connection
        assert connection is not None
        try:
            connection.start(self._parser, message)
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
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def __del__(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def _release(self, connection: _Connection) -> None:
        self._connection = None
        if self._parser.reusable and connection.failure is None:
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


def _shut_down(raw: Any) -> None:
    """The peer sees it at once, even where a forked child has a copy of the descriptor. By way of a twin: loops do not
    all let their sockets be shut down."""
    # It may be closed already, or no socket.
    with suppress(OSError, AttributeError), socket.socket(fileno=os.dup(raw.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)
