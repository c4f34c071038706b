"""HTTP/1.1 to an engine over kept connections: one request on each at a time, and what is left when nobody wants it.

httptools parses, a protocol keeps what arrives until it is asked for; no task and no timer of its own for a request.
Leaving tells the engine by ending our half of the connection: asyncio's and aiohttp's servers, uvicorn and llama.cpp's
take that for a client that is gone, and stop. What they wrote until then is still read, so that none of it is lost
from the count. What an answer means is not known here.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import anyio
import httptools

CONNECT_SECONDS = 5.0
LEAVE_SECONDS = 0.9  # in all, with the slot still held: an engine that does not stop by itself is cut off then
MAX_LEFT_BYTES = 64 * 1024 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_BUFFERED_BYTES = 256 * 1024
MAX_IDLE = 256


class CannotConnect(OSError):
    """There is nobody there."""


class Pool:
    """Connections to `http://host:port`, `https://host:port` or `unix:/path/to/socket`; `key` goes as bearer token.

    `keeps_alive` False: the server ends its connection after every answer, without saying so beforehand.
    """

    def __init__(self, url: str, *, key: str | None = None, keeps_alive: bool = True) -> None:
        self.keeps_alive = keeps_alive
        self._socket = url.removeprefix("unix:").removeprefix("//") if url.startswith("unix:") else None
        self._target = urlsplit("http://engine" if self._socket else url)
        self._tls = ssl.create_default_context() if self._target.scheme == "https" else None
        self._headers = self._fixed_headers(key)
        self._idle: list[_Connection] = []

    def exchange(self, method: str, path: str, body: bytes = b"") -> Exchange:
        """A request, to be made by `answered`. Close it in any case."""
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}content-length: {len(body)}\r\n\r\n"
        return Exchange(self, head.encode() + body)

    def close(self) -> None:
        """Those that are not in use; the others are not kept any more."""
        self.keeps_alive = False
        while self._idle:
            self._idle.pop().abort()

    def _fixed_headers(self, key: str | None) -> str:
        """Of every request. A name and a password in the URL count where there is no key."""
        target = self._target
        headers = f"host: {target.netloc.rpartition('@')[2]}\r\naccept: */*\r\ncontent-type: application/json\r\n"
        if key:
            headers += f"authorization: Bearer {key}\r\n"
        elif target.username is not None:
            pair = f"{unquote(target.username)}:{unquote(target.password or '')}"
            headers += f"authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
        return headers

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.abort()
        return None

    async def _connected(self) -> _Connection:
        """A new one. Raises CannotConnect."""
        loop = asyncio.get_running_loop()
        made: Any
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if self._socket is not None:
                    made = loop.create_unix_connection(lambda: _Connection(loop), self._socket)
                else:
                    port = self._target.port or (443 if self._tls else 80)
                    made = loop.create_connection(
                        lambda: _Connection(loop), self._target.hostname or "", port, ssl=self._tls
                    )
                return cast("_Connection", (await made)[1])
        except (OSError, TimeoutError) as error:
            raise CannotConnect(str(error)) from None

    def _take_back(self, connection: _Connection) -> None:
        if self.keeps_alive and connection.is_usable and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.abort()


class Exchange:
    """One request and its answer. A connection that is lost raises OSError, one that is silent TimeoutError."""

    def __init__(self, pool: Pool, message: bytes) -> None:
        self._pool = pool
        self._message = message
        self._connection: _Connection | None = None

    @property
    def status(self) -> int:
        """0 until it is answered."""
        return 0 if self._connection is None else self._connection.status

    async def answered(self, seconds: float) -> int:
        """The answer's status, once its head is here, each part of that in so many seconds.

        A kept connection may have been closed under the request, unanswered: then it goes out once more, on a fresh
        one. Raises CannotConnect.
        """
        kept = self._connection = self._pool._kept()
        if kept is not None:
            try:
                return await kept.ask(self._message, seconds)
            except TimeoutError:
                raise
            except OSError:
                if kept.status:
                    raise
                kept.abort()
                self._connection = None
        self._connection = await self._pool._connected()
        return await self._connection.ask(self._message, seconds)

    async def block(self, seconds: float) -> bytes:
        """All of the body that has arrived, waited for where nothing has; empty at its end."""
        assert self._connection is not None
        return await self._connection.block(seconds)

    async def body(self, limit: int, seconds: float) -> bytes:
        """The rest of the body, at most about `limit` bytes of it."""
        blocks, size = [], 0
        while size < limit and (block := await self.block(seconds)):
            blocks.append(block)
            size += len(block)
        return b"".join(blocks)

    async def leave(self, read: Callable[[bytes], object]) -> None:
        """Hang up, and pass what still comes of a good answer to `read`, at most LEAVE_SECONDS long, also where we are
        cancelled. What `read` raises ends it."""
        connection = self._connection
        if connection is None:
            return  # a request that is not out yet never will be
        # An engine that cannot be told is not waited for: what is here already is read.
        until = connection.now() + (LEAVE_SECONDS if connection.hang_up() else 0)
        num_bytes = 0
        with anyio.CancelScope(shield=True), suppress(OSError, TimeoutError):
            while num_bytes < MAX_LEFT_BYTES and (block := await connection.block(max(0.0, until - connection.now()))):
                num_bytes += len(block)
                if connection.status == 200:
                    read(block)

    def close(self) -> None:
        """Free the connection: for another request where the answer was read to its end, for good where not."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._take_back(connection)


class _Connection(asyncio.Protocol):
    """Bytes in, and whoever waits is woken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.now = loop.time
        self._loop = loop
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._parser: Any = None
        self._blocks: list[bytes] = []
        self._num_buffered = self._num_head = 0
        self._has_length = self._is_over = self._is_kept = False
        self._failure: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_usable(self) -> bool:
        """For another request: silent, whole and open."""
        return self._is_over and self._is_kept and self._failure is None and not self._transport.is_closing()

    async def ask(self, message: bytes, seconds: float) -> int:
        self.status = self._num_head = 0
        self._has_length = self._is_over = self._is_kept = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(message)
        while not self.status:
            await self._more(seconds)
        return self.status

    async def block(self, seconds: float) -> bytes:
        while not self._blocks:
            if self._is_over:
                return b""
            await self._more(seconds)
        blocks, self._blocks = self._blocks, []
        if self._num_buffered > MAX_BUFFERED_BYTES:
            self._transport.resume_reading()
        self._num_buffered = 0
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def hang_up(self) -> bool:
        """End our half of the connection, where it has halves; whether the engine can tell."""
        self._is_kept = False
        if self._transport.is_closing() or not self._transport.can_write_eof():  # TLS has no halves
            return False
        self._transport.write_eof()
        return True

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.abort()

    async def _more(self, seconds: float) -> None:
        """Until something has happened. One timer serves every wait, and is moved only when it would ring too early."""
        if self._failure is not None:
            raise self._failure
        self._due = self.now() + seconds
        if self._timer is None or self._timer.when() > self._due:
            self._set_timer()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self.now() >= self._due:
            self._waiter.set_exception(TimeoutError())
        else:
            self._set_timer()  # waits since then have moved it

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: OSError) -> None:
        if self._failure is None:
            self._failure = failure
        self._wake()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._is_over:
            self._fail(ConnectionResetError("it said something unasked"))
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionResetError(f"not HTTP: {error}"))
            return
        if not self.status:
            self._num_head += len(data)
            if self._num_head > MAX_HEAD_BYTES:
                self._fail(ConnectionResetError("a head without an end"))
            return
        if self._num_buffered > MAX_BUFFERED_BYTES:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self.status and not self._has_length and error is None:
            self._is_over = True  # a body without a length ends with its connection
        self._fail(error if isinstance(error, OSError) else ConnectionResetError("it closed the connection"))

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status

    def on_body(self, body: bytes) -> None:
        self._blocks.append(body)
        self._num_buffered += len(body)

    def on_message_complete(self) -> None:
        if self.status:
            self._is_over = True
            self._is_kept = self._parser.should_keep_alive()
