"""One connection of asyncio: bytes out, and bytes in, by which somebody is woken. Knows no pool and no deadlines.

One timer a connection serves every wait, and is moved only when it would ring too early.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress
from typing import Any

from octoai._connection import MAX_IDLE_SECONDS, PIECE_BYTES, is_silent
from octoai._http1 import ProtocolError, ResponseParser
from octoai._sockets import tune
from octoai._transport import Message, Origin

_BLOCK_BYTES = 32 * 1024
_MAX_BUFFERED_BYTES = 256 * 1024
_NEVER = float("inf")


class Connection(asyncio.BufferedProtocol):
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
        self._is_full = False
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def is_usable(self) -> bool:
        """Not too old, open, and silent: bytes that nobody asked for mean that the service has given it up. A loop that
        was busy may not have read them yet."""
        is_young = time.monotonic() - self.idle_since < MAX_IDLE_SECONDS
        is_open = self.failure is None and self._pid == os.getpid() and not self._transport.is_closing()
        return is_young and is_open and is_silent(self._transport.get_extra_info("socket"))

    def start(self, parser: ResponseParser, message: Message) -> memoryview:
        """Send a request. What is left of a long one, to be sent by `send`."""
        self.parser = parser
        if len(message) <= PIECE_BYTES:
            self._transport.write(message)
            return memoryview(b"")
        self._transport.set_write_buffer_limits(1, 0)  # full until all of a piece has left
        return self.send(memoryview(message))

    def send(self, rest: memoryview) -> memoryview:
        """The next piece, where the one before has left. What is left then."""
        if self._is_full:
            return rest
        self._transport.write(rest[:PIECE_BYTES])
        return rest[PIECE_BYTES:]

    def send_all(self, rest: memoryview) -> None:
        """Whenever it leaves: nobody waits for that."""
        self._transport.write(rest)

    @property
    def has_sent(self) -> bool:
        return not self._transport.get_write_buffer_size()

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

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._wake()

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


def _shut_down(raw: Any) -> None:
    """The peer sees it at once, even where a forked child has a copy of the descriptor. By way of a twin: loops do not
    all let their sockets be shut down."""
    # It may be closed already, or no socket.
    with suppress(OSError, AttributeError), socket.socket(fileno=os.dup(raw.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)
