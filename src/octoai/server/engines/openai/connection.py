"""One connection to an engine, over which HTTP/1.1 goes: bytes in, and whoever waits is woken.

httptools parses; what arrives is kept until it is asked for, and what arrives fast may go on together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools

MAX_HEAD_BYTES = 64 * 1024
MAX_BUFFERED_BYTES = 256 * 1024
MAX_GATHERED_BYTES = 64 * 1024
LATE_SECONDS = (
    1.0  # a timer that rings so late was stopped with us, as in a container; the engine may have been as well
)
RELEASE_SECONDS = 0.05  # what waits for more is looked at so often


class Connection(asyncio.Protocol):
    """For one request at a time. A connection that is lost raises OSError, one that is silent TimeoutError."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.retry_after = b""
        self.now = loop.time
        self._loop = loop
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._blocks: list[bytes] = []
        self.on_body = self._blocks.append  # the parser calls it for every event of a stream
        self._parser: Any = httptools.HttpResponseParser(self)
        self._num_buffered = self._num_head = 0
        self._is_asked = self._has_length = self._is_over = self._is_kept = self._has_hung_up = False
        self._unsent = b""
        self._failure: OSError | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._take: Callable[[bytes], bool] | None = None
        self._seconds = self._due = self._rings_at = 0.0
        self._timer: asyncio.Handle | None = None  # of uvloop, which does not say when: at once is no timer there
        self._gather = self._came = self._gap = self._fed = 0.0
        self._releasing: asyncio.TimerHandle | None = None

    @property
    def is_usable(self) -> bool:
        """For another request: silent, whole, read to its end, and open."""
        is_whole = self.is_over and self._is_kept and not self._has_hung_up
        return is_whole and self._failure is None and not self._transport.is_closing()

    @property
    def is_over(self) -> bool:
        return self._is_over and not self._blocks

    async def ask(self, message: bytes, seconds: float) -> int:
        self.status = self._num_head = 0
        self.retry_after = b""
        self._is_asked = True
        self._has_length = self._is_over = self._is_kept = False
        # All that are asked in one turn of the loop are at its end: between one and the next an engine would fall
        # asleep, and to wake it takes us as long as a tenth of a request.
        self._unsent = message
        self._loop.call_soon(self._send)
        while not self.status:
            await self._more(seconds)
        return self.status

    def _send(self) -> None:
        message, self._unsent = self._unsent, b""
        if message and not self._transport.is_closing():
            self._transport.write(message)

    async def block(self, seconds: float) -> bytes:
        while not self._blocks:
            if self._is_over:
                return b""
            await self._more(seconds)
        return self._arrived()

    async def feed(self, take: Callable[[bytes], bool], seconds: float, gather: float) -> bool:
        self._gather = gather
        while True:
            if self._blocks:  # also what came before a failure
                self._fed = self.now()
                if not take(self._arrived()):
                    return True
            elif self._is_over:
                return False
            else:
                self._take = take
                try:
                    if await self._more(seconds):
                        return True
                finally:
                    self._take = None

    def _arrived(self) -> bytes:
        blocks = self._blocks
        block = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        blocks.clear()
        if self._num_buffered > MAX_BUFFERED_BYTES:
            self._transport.resume_reading()
        self._num_buffered = 0
        return block

    def hang_up(self) -> bool:
        """End our half of the connection, where it has halves; whether the engine can tell."""
        self._has_hung_up = True
        self._send()
        if self._transport.is_closing() or not self._transport.can_write_eof():  # TLS has no halves
            return False
        try:
            self._transport.write_eof()
        except OSError:  # the engine has just reset it
            return False
        return True

    def abort(self) -> None:
        for timer in (self._timer, self._releasing):
            if timer is not None:
                timer.cancel()
        self._timer = self._releasing = None
        self._transport.abort()

    def _more(self, seconds: float) -> asyncio.Future[bool]:
        """Done when something has happened; True when it was not taken. One timer serves every wait; it is moved where
        it would ring too early."""
        if self._failure is not None:
            raise self._failure
        self._seconds = seconds
        self._due = self.now() + seconds
        if self._timer is None or self._rings_at > self._due:
            self._set_timer()
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = self._due
        self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if (
            self.now() - self._rings_at > LATE_SECONDS
        ):  # what came before has not been read yet, and what is to come has its time again
            self._due = self.now() + self._seconds
        if self.now() >= self._due:
            self._waiter.set_exception(TimeoutError())
        else:
            self._set_timer()  # waits since then have moved it

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(False)

    def _fail(self, failure: OSError) -> None:
        if self._failure is None:
            self._failure = failure
        self._wake()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._unsent or not self._is_asked or self._is_over:
            self._fail(ConnectionResetError("it said something unasked"))
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:  # an upgrade is none of ours
            self._fail(ConnectionResetError(f"not HTTP: {error}"))
            return
        if not self.status:
            self._num_head += len(data)
            if self._num_head > MAX_HEAD_BYTES:
                self._fail(ConnectionResetError("a head without an end"))
            return
        self._num_buffered += len(data)
        before, self._came = self._came, self.now()
        gaps, self._gap = (self._gap, self._came - before), self._came - before
        if self._take is None:
            if self._num_buffered > MAX_BUFFERED_BYTES:
                self._transport.pause_reading()
            self._wake()
        elif self._is_over or not (self._blocks and self._may_wait(max(gaps))):
            self._feed()

    def _may_wait(self, gap: float) -> bool:
        """Whether more is expected in time: as soon after this as this came after what was before, or that."""
        is_fast = gap < self._gather / 2 and self._came + gap < self._fed + self._gather
        if not is_fast or self._num_buffered > MAX_GATHERED_BYTES:
            return False
        if self._releasing is None:
            self._releasing = self._loop.call_later(RELEASE_SECONDS, self._release)
        return True

    def _release(self) -> None:
        """What was to go on with more that did not come."""
        self._releasing = None
        if self._take is None or not self._blocks:
            return
        if self.now() < self._fed + self._gather:
            self._releasing = self._loop.call_later(RELEASE_SECONDS, self._release)
        else:
            self._gather = 0.0  # nothing of this answer waits any more
            self._feed()

    def _feed(self) -> None:
        """Who waits is woken only where it has to be."""
        take, waiter = self._take, self._waiter
        if take is None or waiter is None or waiter.done():
            return
        if not self._blocks:
            self._wake()
            return
        try:
            is_taken = take(self._arrived())
        except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
            if not waiter.done():
                waiter.set_exception(error)
            return
        self._fed = self.now()
        self._due = self._fed + self._seconds
        if (self._is_over or not is_taken) and not waiter.done():  # `take` may have ended who waits
            waiter.set_result(not is_taken)

    def connection_lost(self, error: Exception | None) -> None:
        if self.status and not self._has_length and error is None:
            self._is_over = True  # a body without a length ends with its connection
        self._fail(error if isinstance(error, OSError) else ConnectionResetError("it closed the connection"))
        self._parser = None  # each knows the other: we would be left to the garbage collector

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._is_over:  # in the same read: it would be taken for a part of the answer
            raise ConnectionResetError("it said something unasked")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._has_length = True
        elif name == b"retry-after":
            self.retry_after = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status

    def on_message_complete(self) -> None:
        if self.status:
            self._is_over = True
            self._is_kept = self._parser.should_keep_alive()
