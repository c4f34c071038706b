"""Dates as people write them on the command line, as moments: microseconds since 1970. Days and months are of UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_MOMENT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.][0-9]{1,6})?)([Zz]|[+-][0-9]{2}:[0-9]{2}))?"
)
_MONTH = re.compile(r"([0-9]{4})-([0-9]{2})")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(text: str) -> int:
    """The beginning of a day, `2026-11-22`, or a time as in RFC 3339, `2026-11-22T13:45:00Z`. Raises ValueError."""
    wrong = f"a time is like 2026-11-22, or 2026-11-22T13:45:00Z, not {text!r:.60}"
    found = _MOMENT.fullmatch(text)
    if found is None:
        raise ValueError(wrong)
    day, clock, offset = found.groups()
    try:
        return _us(datetime.fromisoformat(f"{day}T{clock or '00:00:00'}{(offset or 'Z').upper()}"))
    except (ValueError, OverflowError):
        raise ValueError(wrong) from None


def months(text: str) -> tuple[int, int]:
    """When a month, `2026-11`, begins and when the next one does. Raises ValueError."""
    found = _MONTH.fullmatch(text)
    year, month = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (1970 <= year < 9999 and 1 <= month <= 12):
        raise ValueError(f"a month is like 2026-11, not {text!r:.60}")
    following = (year + 1, 1) if month == 12 else (year, month + 1)
    return _us(datetime(year, month, 1, tzinfo=UTC)), _us(datetime(*following, 1, tzinfo=UTC))


def rfc3339(at_us: int) -> str:
    """In UTC, with microseconds: `2026-11-22T13:45:00.000000Z`."""
    seconds, microseconds = divmod(at_us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{microseconds:06}Z"


def _us(at: datetime) -> int:
    """Exact: seconds as a float are not."""
    past = at.astimezone(UTC) - _EPOCH
    return (past.days * 86_400 + past.seconds) * 1_000_000 + past.microseconds


LATEST_US = _us(datetime(9999, 12, 31, 23, 59, tzinfo=UTC))  # the last minute that can be written
