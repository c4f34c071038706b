"""Each endpoint as a `Call`: everything about a request that can be decided before anything is sent. Pure."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urljoin

from octoai import _credentials
from octoai._deadlines import Timeout
from octoai._json import encoded, text
from octoai._retry import RetryPolicy
from octoai._transport import Request
from octoai.errors import ConfigurationError
from octoai.version import __version__

OMIT: Any = ...
_HEADERS = {
    "accept-encoding": "identity",
    "user-agent": f"octoai-python/{__version__} python/{sys.version_info[0]}.{sys.version_info[1]}",
    "x-fern-language": "Python",
    "x-fern-sdk-name": "octoai",
    "x-fern-sdk-version": __version__,
}
_FOR_ANYBODY = frozenset({"accept", "accept-encoding", "user-agent"})
_FRAMING = frozenset({"content-length", "transfer-encoding"})
_NAME_CHARS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_OPTIONS = frozenset(
    {
        "additional_body_parameters",
        "additional_headers",
        "additional_query_parameters",
        "max_retries",
        "timeout_in_seconds",
    }
)


@dataclass(frozen=True)
class Call:
    """One call, however often it is sent. `headers` has lower-case names; the token is added to each attempt.
    `may_lead_away`: its answer may be with another service."""

    method: str
    url: str
    timeout: Timeout
    policy: RetryPolicy
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
    streams: bool = False
    wants_token: bool = True
    may_lead_away: bool = False

    def request(self, token: str | None, failures: int) -> Request:
        """The attempt after this many failed ones."""
        headers = dict(self.headers)
        if token and self.wants_token:
            headers["authorization"] = f"Bearer {token}"
        if failures:
            headers["x-octoai-retry-count"] = str(failures)
        return Request(self.method, self.url, headers, self.body)

    def redirected(self, request: Request, status: int, headers: Mapping[str, str]) -> Request | None:
        """Where a redirect leads, if it may be followed: to the same origin, with the same method and body. Results may
        be elsewhere, as those in a store are, which gets to know nothing of ours."""
        location = headers.get("location")
        if not location or not _keeps_method(request.method, status):
            return None
        try:
            url = _credentials.checked_url(urljoin(request.url, location))
        except (ValueError, ConfigurationError):
            return None
        if _credentials.origin(url) == _credentials.origin(request.url):
            return Request(request.method, url, request.headers, request.body)
        if not self.may_lead_away:
            return None
        return Request("GET", url, {name: value for name, value in request.headers.items() if name in _FOR_ANYBODY})

    def token_advice(self, request: Request, access: _credentials.Access) -> str | None:
        """What to say of our token where this last request of an attempt got a 401; None where it is not about that.
        Where results may be elsewhere, the call's address may itself be that of a store."""
        if "authorization" in request.headers:
            return access.refused(request.url) if self.wants_token else None
        own = access.base_url if self.may_lead_away else self.url
        is_own = _credentials.origin(request.url) == _credentials.origin(own)
        return access.missing(request.url) if is_own else None


def _keeps_method(method: str, status: int) -> bool:
    return status in (307, 308) or (method == "GET" and status in (301, 302, 303))


@dataclass(frozen=True)
class Defaults:
    """What the client was made with, for every call that does not say otherwise."""

    base_url: str
    timeout: Timeout
    max_retries: int
    headers: Mapping[str, Any] = field(repr=False)

    def call(
        self,
        method: str,
        url: str,
        *,
        body: Any = None,
        options: Mapping[str, Any] | None = None,
        streams: bool = False,
    ) -> Call:
        options = _checked_options(options)
        headers: dict[str, Any] = {**_HEADERS, "accept": "text/event-stream" if streams else "application/json"}
        if method == "POST":
            headers["content-type"] = "application/json"
            headers["idempotency-key"] = str(uuid.uuid4())
        headers.update(_lower(self.headers))
        headers.update(_lower(options.get("additional_headers")))
        if isinstance(body, Mapping):
            body = {**body, **(options.get("additional_body_parameters") or {})}
        return Call(
            method=method,
            url=_with_query(url, options.get("additional_query_parameters")),
            timeout=_timeout(options, self.timeout),
            policy=RetryPolicy(max_retries=_retries(options.get("max_retries"), self.max_retries)),
            headers=_sendable(headers),
            body=encoded(body) if method == "POST" else None,
            streams=streams,
            wants_token="authorization" not in headers,
        )


@dataclass(frozen=True)
class Endpoint:
    """One of the two endpoints, in its plain or its streaming form; `name` is the client's method."""

    name: str
    path: str
    streams: bool
    parameters: frozenset[str]
    required: frozenset[str]

    def call(
        self,
        defaults: Defaults,
        params: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None,
        extra_body: Mapping[str, Any] | None,
    ) -> Call:
        """Raises TypeError for parameters the endpoint does not have, as calling any function does."""
        check_names(self.name, params, self.parameters)
        given = {name: value for name, value in params.items() if value is not OMIT}
        missing = sorted(self.required - given.keys())
        if missing:
            raise TypeError(f"{self.name}() needs {' and '.join(map(repr, missing))}")
        # The method's name says whether it streams; nothing else may.
        extra = {**(extra_body or {}), **((options or {}).get("additional_body_parameters") or {})}
        body = {**dict(sorted(given.items())), **extra, "stream": self.streams}
        options = {**(options or {}), "additional_body_parameters": None}
        return defaults.call("POST", defaults.base_url + self.path, body=body, options=options, streams=self.streams)


def check_names(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = set(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{_advice(name, known)}")


def _advice(name: str, known: Iterable[str]) -> str:
    if name == "stream":
        return ": the methods whose names end in _stream do stream"
    from difflib import get_close_matches

    nearest = get_close_matches(name, sorted(known), n=1)
    return f". Did you mean {nearest[0]!r}?" if nearest else ". What is not a parameter can be sent by extra_body="


def _checked_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    options = options or {}
    check_names("request_options", options, _OPTIONS)
    return options


def _timeout(options: Mapping[str, Any], default: Timeout) -> Timeout:
    seconds = options.get("timeout_in_seconds")
    return default if seconds is None else Timeout.of(seconds)


def _retries(asked: Any, default: int) -> int:
    retries = default if asked is None else asked
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise TypeError(f"max_retries must be a whole number, 0 or more, not {retries!r}")
    return retries


def _sendable(headers: Mapping[str, Any]) -> dict[str, str]:
    """As text that HTTP can carry, whatever library then carries it."""
    sendable = {name: text(value).strip() for name, value in headers.items() if value is not None}
    for name, value in sendable.items():
        if name in _FRAMING:
            raise ConfigurationError(message=f"the header {name!r} follows from the body and cannot be set")
        if not name or not _NAME_CHARS.issuperset(name):
            raise ConfigurationError(message=f"{name!r} is not the name of a header")
        if any(char in "\r\n\0" for char in value):
            raise ConfigurationError(message=f"the header {name!r} holds a line break")
        if any(char > "\xff" for char in value):
            raise ConfigurationError(message=f"the header {name!r} holds characters that HTTP cannot carry")
    return sendable


def _lower(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name.lower(): value for name, value in (headers or {}).items()}


def _with_query(url: str, query: Mapping[str, Any] | None) -> str:
    try:
        pairs = [
            f"{quote(str(name), safe='')}={quote(_query_text(one), safe='')}"
            for name, value in (query or {}).items()
            if value is not None
            for one in (value if isinstance(value, list | tuple) else (value,))
        ]
    except UnicodeEncodeError as error:
        raise ConfigurationError(message=f"a query parameter holds what is not text: {error}") from error
    if not pairs:
        return url
    url = url.partition("#")[0]  # a fragment is never sent
    return url + ("&" if "?" in url else "?") + "&".join(pairs)


def _query_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else text(value)


def bearer(token: Any) -> str | None:
    """The token as it may stand in a header."""
    if token is None or token == "":
        return None
    if not isinstance(token, str):
        close = getattr(token, "close", None)
        if close is not None:
            close()  # a coroutine, which would warn that nobody awaited it
        raise ConfigurationError(message=f"api_key gave {type(token).__name__}, not a string")
    token = token.strip()
    if not token.isascii() or any(ord(char) <= 32 or ord(char) == 127 for char in token):
        raise ConfigurationError(message="the token holds spaces or characters that HTTP cannot carry")
    return token or None
