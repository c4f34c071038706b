"""HTTP/1.1 to an engine over kept connections: one request on each at a time, and what is left when nobody wants it.

A request has no task and no timer of its own. Leaving tells the engine by ending our half of the connection: asyncio's
and aiohttp's servers, uvicorn and llama.cpp's take that for a client that is gone, and stop. What they wrote until then
is still read, so that none of it is lost from the count. What an answer means is not known here.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import anyio

from octoai.server.engines.openai.connection import Connection

CONNECT_SECONDS = 5.0
CLOSED_SECONDS = 0.5  # until it is seen that a kept connection was closed, also over a long way
END_SECONDS = 0.5
LEAVE_SECONDS = 0.9  # in all, with the slot still held: an engine that does not stop by itself is cut off then
MAX_LEFT_BYTES = 64 * 1024 * 1024
MAX_IDLE = 256


class CannotConnect(OSError):
    """There is nobody there."""


class Failures:
    """To be entered where a connection may fail. It keeps nothing: one is enough for all requests."""

    def __init__(self, named: Callable[[OSError], Exception]) -> None:
        self._named = named

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):  # TimeoutError is one
            raise self._named(error) from error


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
        self._idle: list[Connection] = []

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

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.abort()
        return None

    async def _connected(self) -> Connection:
        """A new one. Raises CannotConnect."""
        loop = asyncio.get_running_loop()
        made: Any
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if self._socket is not None:
                    made = loop.create_unix_connection(lambda: Connection(loop), self._socket)
                else:
                    port = self._target.port or (443 if self._tls else 80)
                    made = loop.create_connection(
                        lambda: Connection(loop), self._target.hostname or "", port, ssl=self._tls
                    )
                return cast("Connection", (await made)[1])
        except (OSError, TimeoutError) as error:
            raise CannotConnect(*error.args) from None

    def _take_back(self, connection: Connection) -> None:
        if self.keeps_alive and connection.is_usable and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.abort()


class Exchange:
    """One request and its answer. A connection that is lost raises OSError, one that is silent TimeoutError."""

    def __init__(self, pool: Pool, message: bytes) -> None:
        self._pool = pool
        self._message = message
        self._connection: Connection | None = None

    @property
    def status(self) -> int:
        """0 until it is answered."""
        return 0 if self._connection is None else self._connection.status

    @property
    def retry_after(self) -> bytes:
        """What the answer says of when to come again."""
        return b"" if self._connection is None else self._connection.retry_after

    @property
    def is_over(self) -> bool:
        """Whether the answer was read to the end of its body."""
        return self._connection is not None and self._connection.is_over

    async def answered(self, seconds: float) -> int:
        """The answer's status, once its head is here, each part of that in so many seconds.

        A kept connection may have been closed under the request, unanswered: then it goes out once more, on a fresh
        one. That is seen in a moment; later it is the answer that broke off. Raises CannotConnect.
        """
        kept = self._connection = self._pool._kept()
        if kept is not None:
            until = kept.now() + CLOSED_SECONDS
            try:
                return await kept.ask(self._message, seconds)
            except TimeoutError:
                raise
            except OSError:
                if kept.status or kept.now() > until:
                    raise
                kept.abort()
                self._connection = None
        self._connection = await self._pool._connected()
        return await self._connection.ask(self._message, seconds)

    def block(self, seconds: float) -> Coroutine[Any, Any, bytes]:
        """All of the body that has arrived, waited for where nothing has; empty at its end."""
        assert self._connection is not None
        return self._connection.block(seconds)

    def feed(self, take: Callable[[bytes], bool], seconds: float, gather: float) -> Coroutine[Any, Any, bool]:
        """Call `take` with what has arrived of the body, then with what arrives, in the loop as it comes, until it
        returns False. Returns False at the end of the body. What `take` raises is raised here. What comes faster than
        every `gather` seconds goes on together about so often."""
        assert self._connection is not None
        return self._connection.feed(take, seconds, gather)

    async def body(self, limit: int, seconds: float, blocks: list[bytes] | None = None) -> bytes:
        """The rest of the body, at most about `limit` bytes of it; also in `blocks`, as far as it has come."""
        blocks, size = [] if blocks is None else blocks, 0
        while size < limit and (block := await self.block(seconds)):
            blocks.append(block)
            size += len(block)
        return b"".join(blocks)

    async def end(self) -> None:
        """A moment for the body to end, so that its connection can be used again; no more, the answer is whole."""
        with suppress(OSError):
            await self.block(END_SECONDS)

    async def leave(self, read: Callable[[bytes], object], *, hangs_up: bool = True) -> None:
        """Hang up, and pass what still comes of a good answer to `read`, at most LEAVE_SECONDS long, also where we are
        cancelled. What `read` raises ends it. `hangs_up` False: without telling the engine."""
        connection = self._connection
        if connection is None:
            return  # a request that is not out yet never will be
        # An engine that cannot be told is not waited for: what is here already is read.
        until = connection.now() + (LEAVE_SECONDS if not hangs_up or connection.hang_up() else 0)
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
