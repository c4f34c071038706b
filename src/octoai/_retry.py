"""Whether to send again, and when. Pure: chance and clock are arguments; who sleeps is the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan

from octoai.errors import ApiError

RETRIED_STATUSES = frozenset({408, 409, 429})


@dataclass(frozen=True)
class RetryPolicy:
    """Waits double from `base` to `cap` seconds, less up to a quarter by chance; what the service asks for wins,
    up to `max_retry_after` seconds: beyond that the error is raised at once, with the value in it."""

    max_retries: int = 2
    base: float = 0.5
    cap: float = 8.0
    max_retry_after: float = 60.0

    def delay(self, failures: int, error: ApiError, *, chance: float = 0.5) -> float | None:
        """Seconds until the next attempt after this many failed ones; None: give up. `chance` is in [0, 1)."""
        if failures > self.max_retries or not error.retryable:
            return None
        asked = error.retry_after
        if asked is None:
            return min(self.base * 2.0 ** min(failures - 1, 30), self.cap) * (1 - 0.25 * chance)
        if asked > self.max_retry_after:
            return None
        # Never earlier than asked; a little later by chance, so that refused clients do not come back as one.
        return asked + chance * min(0.1 * asked, 1.0)


def is_retryable(status: int, headers: Mapping[str, str]) -> bool:
    """By the status, unless the service says otherwise itself."""
    said = headers.get("x-should-retry", "").strip().lower()
    if said in ("true", "false"):
        return said == "true"
    return status in RETRIED_STATUSES or status >= 500


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds the service asks to wait; `now` is the time of day, for headers that name a date."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    return seconds if seconds is not None or value is None else _until(value, now)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return None if isnan(value) else max(value, 0.0)


def _until(date: str, now: float) -> float | None:
    from datetime import UTC
    from email.utils import parsedate_to_datetime

    try:
        at = parsedate_to_datetime(date)
        # Without a zone it is not this machine's, but universal time.
        return max((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
