"""What an HTTP library raises, and a user's hooks with it, as errors of ours."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from typing import Any

from octoai._deadlines import Deadlines
from octoai._transport import Request, connection_error
from octoai.errors import ApiConnectionError, ApiError, ConfigurationError

_Classes = tuple[type[BaseException], ...]


def _classes(client: Any, *names: str) -> _Classes:
    """The library's own exceptions, found through the client's class: a user's may be a subclass."""
    roots = [cls.__module__.partition(".")[0] for cls in type(client).__mro__]
    modules = [sys.modules[root] for root in roots if root in ("httpx", "httpx2") and root in sys.modules]
    return tuple(getattr(module, name) for module in modules for name in names if hasattr(module, name))


def refusal_in(error: BaseException, request: Any) -> Any:
    """The answer for whose status a user's hook has raised this error. A good one, or one to what a hook itself has
    asked for, does not say what the service says."""
    response: Any = getattr(error, "response", None)
    if response is None or response.status_code < 300:
        return None
    try:
        asked = response.request  # not always the one that was given: who signs requests may send a copy
    except RuntimeError:  # made by the hook: it answers nothing
        return None
    return response if (asked.method, asked.url) == (request.method, request.url) else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


class Failures:
    """What one library raises, mapped."""

    def __init__(self, client: Any) -> None:
        self.connect_timeouts: _Classes = _classes(client, "ConnectTimeout", "PoolTimeout")
        self.timeouts: _Classes = (*_classes(client, "TimeoutException"), TimeoutError)
        self.network: _Classes = (*_classes(client, "TransportError", "StreamError", "DecodingError"), OSError)
        self.protocol: _Classes = _classes(client, "ProtocolError")
        self.requests: _Classes = (*_classes(client, "InvalidURL", "UnsupportedProtocol"), UnicodeEncodeError)
        self.hooks: _Classes = _classes(client, "HTTPStatusError")
        self.all: _Classes = (*self.timeouts, *self.network, *self.requests, *_classes(client, "HTTPError"))

    def mapped(self, error: BaseException, request: Request, deadlines: Deadlines) -> ApiError:
        if self.is_timeout(error):
            return deadlines.passed("connect" if isinstance(error, self.connect_timeouts) else "read")
        if isinstance(error, self.requests):
            return ConfigurationError(message=f"the request cannot be sent: {error}")
        if isinstance(error, self.hooks):  # the libraries themselves never raise them
            return ApiConnectionError(message=f"a hook of the HTTP client ended the call: {error}")
        return connection_error(error, request, retryable=self._may_pass(error))

    def is_timeout(self, error: BaseException) -> bool:
        """Not where the kernel gave the connection up, which the libraries take for a timeout of theirs."""
        given_up = any(getattr(cause, "errno", None) == errno.ETIMEDOUT for cause in _causes(error))
        return isinstance(error, self.timeouts) and not given_up

    def _may_pass(self, error: BaseException) -> bool:
        """Not where a service has said what is no HTTP, nor where its certificate is not to be trusted."""
        if isinstance(error, self.protocol):
            return "without sending a response" in str(error)
        return not any(type(cause).__name__ == "SSLCertVerificationError" for cause in _causes(error))

    def unread(self, error: BaseException) -> OSError:
        """The failure of a wait for the body, as our own connections have it."""
        return (TimeoutError if self.is_timeout(error) else OSError)(str(error) or type(error).__name__)
