"""One request to an engine over HTTP: sent, answered, and left when nobody wants its answer any more.

Leaving tells the engine by ending our half of the connection: asyncio's and aiohttp's servers, uvicorn and llama.cpp's
take that for a client that is gone, and stop. What they wrote until then is still read, so that none of it is lost
from the count. What the answer means is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress

import aiohttp
import anyio

from octoai.server.errors import EngineFailed, Refusal

LEAVE_SECONDS = 0.9  # in all, with the slot still held: an engine that does not stop by itself is cut off then
MAX_LEFT_BYTES = 64 * 1024 * 1024

Read = Callable[[bytes], object]
Send = Callable[[aiohttp.ClientMiddlewareType], Awaitable[aiohttp.ClientResponse]]


class Call:
    """Made, it is on its way; `close` it in any case. `send` makes the request, with the middleware it is given.

    The request is a task of its own, so that it can outlive, for a moment, who waits for it.
    """

    def __init__(self, send: Send) -> None:
        self._request: aiohttp.ClientRequest | None = None
        self._read_rest: Read | None = None  # once it is left
        self._sending = asyncio.ensure_future(self._sent(send))

    async def _sent(self, send: Send) -> aiohttp.ClientResponse:
        response = await send(self._note)
        if self._read_rest is not None:
            # Here and at once: aiohttp forgets what it has received when the connection is lost before it is read.
            with closing(response):
                await _read_on(response, self._read_rest)
        return response

    async def _note(self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if self._read_rest is not None:
            raise aiohttp.ClientConnectionError("nobody wants an answer any more")  # a second try comes too late
        self._request = request
        return await handler(request)

    async def response(self, seconds: float) -> aiohttp.ClientResponse:
        """When the answer's head is here. Raises EngineFailed when it does not come in time, and aiohttp's errors."""
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self._sending)
        except TimeoutError:
            if self._sending.done():  # a connection that timed out by itself
                raise
            raise EngineFailed(f"The engine did not answer for {seconds:.0f} s.") from None

    async def leave(self, read: Read) -> None:
        """Hang up, and pass what still comes to `read`, at most LEAVE_SECONDS long, also where we are cancelled."""
        self._read_rest = read
        is_told = self._hang_up()
        if not is_told:
            self._sending.cancel()  # a request that is not out yet never will be
        with anyio.CancelScope(shield=True), suppress(TimeoutError):
            # An engine that cannot be told is not waited for: what is here already is read.
            async with asyncio.timeout(LEAVE_SECONDS if is_told else 0):
                if (response := self._answered()) is not None:
                    await _read_on(response, read)
                else:
                    await asyncio.wait({self._sending})

    def _hang_up(self) -> bool:
        """End our half of the connection, where it has halves; whether the engine can tell."""
        response = None if self._request is None else self._request.response
        connection = None if response is None else response.connection
        if connection is None or connection.protocol is None or connection.transport is None:
            return False
        connection.protocol.force_close()  # never to be used again, however the answer ends
        if not connection.transport.can_write_eof():  # TLS has no halves
            return False
        connection.transport.write_eof()
        return True

    async def close(self) -> None:
        """Free the connection: for another request where the answer was read to its end, for good where not."""
        if self._sending.cancel():
            with anyio.CancelScope(shield=True):
                await asyncio.wait({self._sending})
        if (response := self._answered()) is not None:
            response.release()

    def _answered(self) -> aiohttp.ClientResponse | None:
        is_answered = self._sending.done() and not self._sending.cancelled() and self._sending.exception() is None
        return self._sending.result() if is_answered else None


async def _read_on(response: aiohttp.ClientResponse, read: Read) -> None:
    num_bytes = 0
    # However the engine fails now, there is nobody left to tell.
    with suppress(aiohttp.ClientError, OSError, RuntimeError, Refusal):
        while response.status == 200 and num_bytes < MAX_LEFT_BYTES and (block := await response.content.readany()):
            num_bytes += len(block)
            read(block)
