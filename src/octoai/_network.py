"""Which way a request goes: our own sockets, through a proxy, or by the HTTP client that a user brought.

Nothing of any way is imported before it is taken.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from octoai._deadlines import Deadlines
from octoai._transport import AsyncResponse, AsyncTransport, Request, Response, Transport


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
        self._proxied: list[Transport] = []  # the first, whatever several threads have added

    def send(self, request: Request, deadlines: Deadlines) -> Response:
        if not _goes_through_proxy(request.url):
            return self._direct.send(request, deadlines)
        if not self._proxied:
            from octoai._httpx import HttpxTransport

            self._proxied.append(HttpxTransport(None))
        return self._proxied[0].send(request, deadlines)

    def close(self) -> None:
        self._direct.close()
        for proxied in self._proxied[:1]:
            proxied.close()


class _AsyncDirectOrProxied:
    def __init__(self) -> None:
        from octoai._async_pool import AsyncSocketTransport

        self._direct = AsyncSocketTransport()
        self._proxied: list[AsyncTransport] = []  # the first, whatever several threads have added

    async def send(self, request: Request, deadlines: Deadlines) -> AsyncResponse:
        if not _goes_through_proxy(request.url):
            return await self._direct.send(request, deadlines)
        if not self._proxied:
            from octoai._httpx import AsyncHttpxTransport

            self._proxied.append(AsyncHttpxTransport(None))
        return await self._proxied[0].send(request, deadlines)

    async def close(self) -> None:
        await self._direct.close()
        for proxied in self._proxied[:1]:
            await proxied.close()


def _goes_through_proxy(url: str) -> bool:
    """By the same rules as Python's own `urllib`: HTTP(S)_PROXY, ALL_PROXY, NO_PROXY, the system's settings."""
    if sys.platform not in ("darwin", "win32") and not any(name.lower().endswith("_proxy") for name in os.environ):
        return False
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    try:
        parts = urlsplit(url)
    except ValueError:
        return False  # no address: our own connections say so
    if not (proxies.get(parts.scheme) or proxies.get("all")):
        return False
    return not proxy_bypass(parts.netloc)
