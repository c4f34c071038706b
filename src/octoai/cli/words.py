"""How values are said to a person."""

from __future__ import annotations

from datetime import UTC, datetime


def minute(at: int | None) -> str:
    """A moment in Unix seconds, in UTC; "-" where there is none."""
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def second(at_us: int) -> str:
    """A moment in microseconds, in UTC."""
    return datetime.fromtimestamp(at_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
