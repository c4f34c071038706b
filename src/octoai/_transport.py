"""The seam between the SDK and the network: a request in; status, headers, blocks of bytes and `close` out.

Whatever has these methods can carry the calls: our own sockets, an `httpx`/`httpx2` client, a fake in a test.
Every failure leaves as an `ApiError`; every wait is bounded by the call's `Deadlines`. Knows nothing of what is
asked or answered.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from octoai._deadlines import Deadlines
from octoai.errors import ApiConnectionError, ApiError

DRAIN_BYTES = 64 * 1024
DRAIN_SECONDS = 0.1


@dataclass(frozen=True)
class Request:
    """One attempt of a call. `headers` has lower-case names and is not shown: it holds the token."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)


class Response(Protocol):
    """The answer, from its head on."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def receive(self, seconds: float | None) -> bytes:
        """The next bytes of the body; empty at its end. `TimeoutError` after so many seconds without any."""

    def finish(self) -> None:
        """What matters has been read: read the rest if it is little and near, so that the connection serves again."""

    def close(self) -> None:
        """Give up at once; the service sees the connection close. May be called again."""


class Transport(Protocol):
    def send(self, request: Request, deadlines: Deadlines) -> Response: ...

    def close(self) -> None: ...


class AsyncResponse(Protocol):
    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    async def receive(self, seconds: float | None) -> bytes: ...

    async def finish(self) -> None: ...

    async def close(self) -> None: ...


class AsyncTransport(Protocol):
    async def send(self, request: Request, deadlines: Deadlines) -> AsyncResponse: ...

    async def close(self) -> None: ...


def sync_transport(httpx_client: Any) -> Transport:
    """The user's own client, else our sockets, which hand over to `httpx2` for addresses behind a proxy."""
    if httpx_client is not None:
        from octoai._httpx import HttpxTransport

        return HttpxTransport(httpx_client)
    return _DirectOrProxied()


def async_transport(httpx_client: Any) -> AsyncTransport:
    """The same choice, for asyncio."""
    if httpx_client is not None:
        from octoai._httpx import AsyncHttpxTransport

        return AsyncHttpxTransport(httpx_client)
    return _AsyncDirectOrProxied()


class _DirectOrProxied:
    def __init__(self) -> None:
        from octoai._pool import SocketTransport

        self._direct = SocketTransport()
        self._proxied: Transport | None = None

    def send(self, request: Request, deadlines: Deadlines) -> Response:
        if not _goes_through_proxy(request.url):
            return self._direct.send(request, deadlines)
        if self._proxied is None:
            from octoai._httpx import HttpxTransport

            self._proxied = HttpxTransport(None)
        return self._proxied.send(request, deadlines)

    def close(self) -> None:
        self._direct.close()
        if self._proxied is not None:
            self._proxied.close()


class _AsyncDirectOrProxied:
    def __init__(self) -> None:
        from octoai._async_pool import AsyncSocketTransport

        self._direct = AsyncSocketTransport()
        self._proxied: AsyncTransport | None = None

    async def send(self, request: Request, deadlines: Deadlines) -> AsyncResponse:
        if not _goes_through_proxy(request.url):
            return await self._direct.send(request, deadlines)
        if self._proxied is None:
            from octoai._httpx import AsyncHttpxTransport

            self._proxied = AsyncHttpxTransport(None)
        return await self._proxied.send(request, deadlines)

    async def close(self) -> None:
        await self._direct.close()
        if self._proxied is not None:
            await self._proxied.close()


def _goes_through_proxy(url: str) -> bool:
    """By the same rules as Python's own `urllib`: HTTP(S)_PROXY, ALL_PROXY, NO_PROXY, the system's settings."""
    if sys.platform not in ("darwin", "win32") and not any(name.lower().endswith("_proxy") for name in os.environ):
        return False
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    proxies, parts = getproxies(), urlsplit(url)
    if not (proxies.get(parts.scheme) or proxies.get("all")):
        return False
    return not proxy_bypass(parts.netloc)


def connection_error(error: BaseException, request: Request, *, retryable: bool = True) -> ApiError:
    """A failure of the network, in the user's words. `retryable`: no byte of an answer has come."""
    reason = str(error) or type(error).__name__
    refused = isinstance(error, ConnectionRefusedError) or reason == "All connection attempts failed"  # anyio's words
    hint = " Is the service running? `octoai serve` starts one; OCTOAI_BASE_URL says where it is." if refused else ""
    where = "/".join(request.url.split("/", 3)[:3])
    return ApiConnectionError(message=f"no answer from {where}: {reason}.{hint}", retryable=retryable)
