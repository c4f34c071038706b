"""How long to wait, and for what. Pure: the clock is an argument. Knows neither sockets nor event loops."""

from __future__ import annotations

import time

from octoai.errors import ApiTimeoutError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_UNSET: Any = ...
_FIELDS = ("connect", "read", "total", "first_token", "idle")
_NEVER = float("inf")
_FOR_EVER = 1e9  # 31 years. What infinity means, and more than the clocks of sockets can count


class Timeout:
    """The deadlines of a call, in seconds; None, or infinity, is no limit.

    - `connect`: until the connection stands. Default 10.
    - `read`: the longest silence on the connection, also while a whole answer is being generated, and the longest time
      in which nothing of a long request leaves. Default 600.
    - `total`: the whole call, with its retries and to the end of a stream. Default: no limit.
    - `first_token`: in a stream, from sending the request to the first content. Default 600; where only `idle` is
      given, as long as that. While a long request leaves it begins anew with each part, but not by an `httpx` client
      or a proxy, which do not tell: there it has to be enough for all of the request to leave.
    - `idle`: in a stream, between two content events. Keep-alive comments do not count. Default 60.

    A plain number `t` in place of a `Timeout` means: connect within `min(t, 10)`, and no wait longer than `t` for
    bytes (`read`), for the first content (`first_token`) and for the next (`idle`).
    """

    __slots__ = _FIELDS

    connect: float | None
    read: float | None
    total: float | None
    first_token: float | None
    idle: float | None

    def __init__(
        self,
        connect: float | None = 10,
        read: float | None = 600,
        total: float | None = None,
        first_token: float | None = _UNSET,
        idle: float | None = _UNSET,
    ) -> None:
        if first_token is _UNSET:
            first_token = 600 if idle is _UNSET else idle
        values = (connect, read, total, first_token, 60 if idle is _UNSET else idle)
        for name, value in zip(_FIELDS, values, strict=True):
            object.__setattr__(self, name, _checked(name, value))

    @classmethod
    def of(cls, value: Any) -> Timeout:
        """From what users give: a `Timeout`, a number, None (no limits), or an `httpx.Timeout`."""
        if isinstance(value, Timeout):
            return value
        if value is None:
            return cls(None, None, None, None, None)
        if hasattr(value, "connect") and hasattr(value, "read"):
            return cls(value.connect, value.read, None, value.read, value.read)
        seconds = _checked("timeout", value)
        return cls(10 if seconds is None else min(seconds, 10), seconds, None, seconds, seconds)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Timeout is immutable")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Timeout) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return "Timeout(" + ", ".join(f"{n}={v}" for n, v in zip(_FIELDS, self._values(), strict=True)) + ")"

    def __reduce__(self) -> tuple[Any, ...]:
        return Timeout, self._values()

    def _values(self) -> tuple[float | None, ...]:
        return (self.connect, self.read, self.total, self.first_token, self.idle)


class Deadlines:
    """The deadlines of one running call.

    The wait for content counts from the moment somebody waits: a caller who is slow between two events is not
    the service's fault.
    """

    __slots__ = (
        "_between",
        "_clock",
        "_content_at",
        "_ends_at",
        "_idle",
        "_sent_at",
        "_started",
        "_streams",
        "_timeout",
        "on_stop",
    )

    def __init__(self, timeout: Timeout, *, streams: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._streams = streams
        self._ends_at = _NEVER if timeout.total is None else clock() + timeout.total
        self._sent_at = 0.0
        self._started = False
        self._content_at: float | None = None
        self._idle = _NEVER if timeout.idle is None else timeout.idle
        least = self._idle if timeout.read is None else min(self._idle, timeout.read)
        self._between: float | None = None if least == _NEVER else least
        self.on_stop: Callable[[], object] | None = None  # ends the wait of the attempt that is in progress

    def stop(self) -> None:
        """Nobody wants the answer any more. Every deadline has passed, so that nothing is begun anew. May be called by
        another thread than the one that waits."""
        self._ends_at = -_NEVER
        on_stop, self.on_stop = self.on_stop, None  # a wait is ended once
        if on_stop is not None:
            on_stop()

    def send(self) -> None:
        """An attempt begins, or a part of a long request has left: the waits begin anew."""
        self._sent_at = self._clock()
        self._content_at = None

    def content(self, *, started: bool = True) -> None:
        """A content event came; `started`: there was something to read in it."""
        self._started = self._started or started
        if self._started:
            self._content_at = None

    def connecting(self) -> float | None:
        """Seconds that connecting may take."""
        return self._least(self._timeout.connect, self._ends_at - self._clock(), "connect")

    def waiting(self) -> float | None:
        """Seconds that one wait for bytes may take. Raises if a deadline has passed."""
        if not self._streams:
            return self._least(self._timeout.read, self._ends_at - self._clock(), "read")
        if self._started and self._content_at is None and self._ends_at == _NEVER:  # between two tokens
            self._content_at = self._clock() + self._idle
            return self._between
        left = self.left()
        return self._timeout.read if left is None else self._least(self._timeout.read, left, "read")

    def left(self) -> float | None:
        """Seconds until the next deadline that does not start anew with every byte. Raises if it has passed."""
        now = self._clock()
        ends_at = self._ends_at
        if self._streams:
            if self._content_at is None:
                self._content_at = self._next_content(now)
            ends_at = min(ends_at, self._content_at)
        return self._least(None, ends_at - now, "total")

    def allow(self, seconds: float) -> bool:
        """Whether the call may still go on after a pause this long."""
        return self._clock() + seconds < self._ends_at

    def passed(self, otherwise: str = "read") -> ApiTimeoutError:
        """The error for a wait that was as long as it may be."""
        now = self._clock() + 0.002  # sockets wake up a little early
        if now >= self._ends_at:
            otherwise = "total"
        elif self._content_at is not None and now >= self._content_at:
            otherwise = "idle" if self._started else "first_token"
        seconds = getattr(self._timeout, otherwise)
        within = "in time" if seconds is None else f"within {seconds:g} s"
        message = f"{_MEANING[otherwise]} {within} (the `{otherwise}` deadline of octoai.Timeout)"
        return ApiTimeoutError(deadline=otherwise, seconds=seconds, message=message, retryable=otherwise == "connect")

    def _next_content(self, now: float) -> float:
        if self._started:
            return now + self._idle
        return _NEVER if self._timeout.first_token is None else self._sent_at + self._timeout.first_token

    def _least(self, limit: float | None, left: float, name: str) -> float | None:
        if left <= 0:
            raise self.passed(name)
        if limit is None:
            return None if left == _NEVER else left
        return min(limit, left)


_MEANING = {
    "connect": "no connection",
    "read": "no bytes from the service",
    "total": "the call was not complete",
    "first_token": "no first token",
    "idle": "no further content",
}


def _checked(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, a Timeout or None, not {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name} must be more than 0 seconds")
    return None if value >= _FOR_EVER else value


DEFAULT_TIMEOUT = Timeout()
