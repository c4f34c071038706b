"""The seam over `httpx2` behind a proxy, or over the `httpx`/`httpx2` client a user brings (told apart by nothing: same
methods). Imports neither library at import."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from octoai._async_waits import end, until_stopped
from octoai._deadlines import Deadlines
from octoai._httpx_failures import Failures, refusal_in
from octoai._tls import tls_context
from octoai._transport import DRAIN_BYTES, DRAIN_SECONDS, AsyncResponse, Request, Response
from octoai.errors import ApiConnectionError, ApiError, ConfigurationError

_INHERITED: list[Any] = []  # clients of the parent process: kept, so that nothing closes them


def _new_client(name: str) -> Any:
    import httpx2

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=30.0)
    context = tls_context()
    try:
        return getattr(httpx2, name)(limits=limits, timeout=None, verify=context)
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        raise ConfigurationError(message=f"the proxy of the environment cannot be used: {error}") from error


def _request(client: Any, request: Request, timeout: tuple[float | None, ...]) -> Any:
    headers = {name: value.encode("latin-1") for name, value in request.headers.items()}
    built = client.build_request(request.method, request.url, headers=headers, content=request.body, timeout=timeout)
    for name in _LIBRARYS - headers.keys():
        built.headers.pop(name, None)  # left out by us, and so not to be filled in
    return built


_LIBRARYS = frozenset({"accept", "accept-encoding", "user-agent"})  # headers that the libraries have values for

# Redirects are followed by the caller, who knows what must not cross origins.
_SEND_OPTIONS = {"stream": True, "follow_redirects": False}


class _DiedError(Exception):
    """A connection kept from an earlier call died without a byte of an answer."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error)
        self.error = error


def _headers(response: Any) -> dict[str, str]:
    headers = {name.lower(): value for name, value in response.headers.items()}
    if response.is_stream_consumed:
        headers.pop("content-encoding", None)  # what it has read, the library has decoded
    return headers


def _whole(response: Any) -> Iterator[bytes]:
    """The body of an answer that was read before we had it: by a user's hook, or a transport without a network."""
    yield response.content


async def _async_whole(response: Any) -> AsyncIterator[bytes]:
    yield response.content


class HttpxTransport:
    """Synchronous. The library's read timeout is fixed for a request, so the longest of its waits bounds each one."""

    def __init__(self, client: Any) -> None:
        self._given = client
        self._own: dict[int, Any] = {}  # for the process with this id

    def send(self, request: Request, deadlines: Deadlines) -> Response:
        client = self._client()
        failures = Failures(client)
        connect, wait = deadlines.connecting(), deadlines.waiting()
        prepared: Any = None
        try:
            prepared = _request(client, request, (connect, wait, wait, connect))
            response = client.send(prepared, **_SEND_OPTIONS)
        except failures.all as error:
            response = refusal_in(error, prepared)
            if response is None:
                raise failures.mapped(error, request, deadlines) from error
        return HttpxResponse(response, failures)

    def close(self) -> None:
        own = self._own.pop(os.getpid(), None)
        if own is not None:
            own.close()

    def _client(self) -> Any:
        if self._given is not None:
            return self._given
        own = self._own.get(os.getpid())
        if own is None:
            _INHERITED.extend(list(self._own.values()))
            made = _new_client("Client")
            if (own := self._own.setdefault(os.getpid(), made)) is not made:
                made.close()  # another thread was faster
        return own


class HttpxResponse:
    def __init__(self, response: Any, failures: Failures) -> None:
        self._response = response
        self._failures = failures
        self._parts: Iterator[bytes] = _whole(response) if response.is_stream_consumed else response.iter_raw()
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = _headers(response)

    def receive(self, seconds: float | None) -> bytes:
        try:
            return next(self._parts, b"")
        except self._failures.all as error:
            raise self._failures.unread(error) from error

    def finish(self) -> None:
        ends, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
        try:
            while left > 0 and time.monotonic() < ends:
                if not (part := self.receive(None)):
                    break
                left -= len(part)
        except OSError:
            pass  # the answer is complete; only the connection is lost
        self.close()

    def close(self) -> None:
        self._response.close()


class AsyncHttpxTransport:
    """One `httpx2` client for each event loop, since its connections belong to the loop that opened them. It is closed
    when that loop shuts its asynchronous generators down, as `asyncio.run` does at its end: the only hook it offers."""

    def __init__(self, client: Any) -> None:
        if client is None:
            import httpx2  # noqa: F401  # now: its import is not part of any call's deadlines
        self._given = client
        self._pid = os.getpid()
        self._clients: WeakKeyDictionary[Any, tuple[Any, AsyncGenerator[Any, None]]] = WeakKeyDictionary()

    async def send(self, request: Request, deadlines: Deadlines) -> AsyncResponse:
        client = self._given if self._given is not None else await self._own_client()
        try:
            return await self._exchange(client, request, deadlines)
        except _DiedError as died:
            # A kept connection may have died while nobody looked. Nothing came back on it: once more.
            if self._given is not None:
                raise died.error from died
        try:
            return await self._exchange(client, request, deadlines)
        except _DiedError as died:
            raise died.error from died

    async def _exchange(self, client: Any, request: Request, deadlines: Deadlines) -> AsyncResponse:
        failures = Failures(client)
        connect, wait = deadlines.connecting(), deadlines.waiting()
        seen: set[str] = set()
        prepared: Any = None

        async def trace(event: str, _info: Any) -> None:
            seen.add(event)

        try:
            prepared = _request(client, request, (connect, wait, wait, connect))
            prepared.extensions["trace"] = trace
            async with until_stopped(deadlines, deadlines.left()):
                response = await client.send(prepared, **_SEND_OPTIONS)
        except failures.all as error:
            response = refusal_in(error, prepared)
            mapped = failures.mapped(error, request, deadlines)
            is_kept = not any("connect_" in event for event in seen)
            if response is None:
                died = is_kept and isinstance(mapped, ApiConnectionError) and mapped.retryable
                raise (_DiedError(mapped) if died else mapped) from error
        # From here on each wait has its own limit, which is ours.
        prepared.extensions.get("timeout", {})["read"] = None
        received = AsyncHttpxResponse(response, failures)
        deadlines.on_stop = received.stop
        return received

    async def close(self) -> None:
        """Those of the running loop; other loops close their own."""
        _, keeper = self._clients.pop(asyncio.get_running_loop(), (None, None))
        if keeper is not None:
            await keeper.aclose()

    async def _own_client(self) -> Any:
        if self._pid != os.getpid():
            _INHERITED.append(self._clients)
            self._clients, self._pid = WeakKeyDictionary(), os.getpid()
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            for other in [each() for each in self._clients.keyrefs()]:  # a list at once: other threads add theirs
                if other is not None and other.is_closed():
                    self._clients.pop(other, None)
            client = _new_client("AsyncClient")
            keeper = _open_until_closed(client)
            self._clients[loop] = (client, keeper)
            await anext(keeper)
        return self._clients[loop][0]


async def _open_until_closed(client: Any) -> AsyncGenerator[Any, None]:
    try:
        yield client
    finally:
        await client.aclose()


class AsyncHttpxResponse:
    def __init__(self, response: Any, failures: Failures) -> None:
        self._response = response
        self._failures = failures
        consumed = response.is_stream_consumed
        self._parts: AsyncIterator[bytes] = _async_whole(response) if consumed else response.aiter_raw()
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = _headers(response)
        self._wait: asyncio.Timeout | None = None

    async def receive(self, seconds: float | None) -> bytes:
        try:
            async with asyncio.timeout(seconds) as self._wait:
                return await anext(self._parts, b"")
        except self._failures.all as error:
            raise self._failures.unread(error) from error

    async def finish(self) -> None:
        left = DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0:
                    if not (part := await anext(self._parts, b"")):
                        break
                    left -= len(part)
        except self._failures.all:
            pass  # the answer is complete; only the connection is lost
        await self.close()

    def stop(self) -> None:
        """End the wait for bytes that is in progress."""
        if self._wait is not None:
            end(self._wait)

    async def close(self) -> None:
        await self._response.aclose()
