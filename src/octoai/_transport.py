"""The seam between the SDK and the network: a request in; status, headers, blocks of bytes and `close` out.

Whatever has these methods can carry the calls: our own sockets, an `httpx`/`httpx2` client, a fake in a test.
Every failure leaves as an `ApiError`; every wait is bounded by the call's `Deadlines`. Knows nothing of what is
asked or answered.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote, urlsplit

from octoai._deadlines import Deadlines
from octoai.errors import ApiConnectionError, ApiError, ConfigurationError

Origin = tuple[str, str, int]

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


def is_timeout(error: BaseException) -> bool:
    """Whether a wait of ours was over. Where the kernel gives a connection up, that is a TimeoutError, too."""
    return isinstance(error, TimeoutError) and error.errno != errno.ETIMEDOUT


def failure(error: BaseException, request: Request, deadlines: Deadlines, *, retryable: bool = True) -> ApiError:
    """Of a wait for an answer: the deadline that passed, or why the network failed."""
    return deadlines.passed() if is_timeout(error) else connection_error(error, request, retryable=retryable)


def connection_error(error: BaseException, request: Request, *, retryable: bool = True) -> ApiError:
    """A failure of the network, in the user's words. `retryable`: no byte of an answer has come."""
    reason = str(error) or type(error).__name__
    refused = isinstance(error, ConnectionRefusedError) or reason == "All connection attempts failed"  # anyio's words
    hint = " Is the service running? `octoai serve` starts one; OCTOAI_BASE_URL says where it is." if refused else ""
    where = "/".join(request.url.split("/", 3)[:3])
    return ApiConnectionError(message=f"no answer from {where}: {reason}.{hint}", retryable=retryable)


class Message(bytes):
    """A request as it is sent. Not shown, where a traceback shows what its functions held: the token is in it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<a request of {len(self)} bytes>"


def message_of(request: Request) -> tuple[Origin, Message]:
    """Where to connect, and what to send there."""
    try:
        parts = urlsplit(request.url)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        netloc = parts.netloc if parts.netloc.isascii() else _international(host, port)
        target = _ascii((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
    except ValueError as error:
        raise ConfigurationError(message=f"not a valid address: {request.url!r}") from error
    headers: dict[str, object] = {"host": netloc, **request.headers}
    if request.body is not None:
        headers["content-length"] = len(request.body)
    message = _message(f"{request.method} {target} HTTP/1.1", headers, request.body or b"")
    return (scheme, host, port or (443 if scheme == "https" else 80)), message


def _message(first: str, headers: Mapping[str, object], body: bytes) -> Message:
    lines = [first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return Message("\r\n".join(lines).encode("latin-1") + body)


def _international(host: str, port: int | None) -> str:
    """The name as the network knows it, and as it is looked up."""
    name = host.encode("idna").decode()
    return name if port is None else f"{name}:{port}"


def _ascii(text: str) -> str:
    return text if text.isascii() else quote(text, safe="/?&=%:[]@!$'()*+,;~")
