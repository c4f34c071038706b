"""Waits of asyncio that end when nobody wants the answer any more."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

from octoai._deadlines import Deadlines


def until_stopped(deadlines: Deadlines, seconds: float | None) -> asyncio.Timeout:
    """A limit, to be entered at once, which `deadlines.stop` makes pass."""
    limit = asyncio.timeout(seconds)
    deadlines.on_stop = partial(end, limit)
    return limit


def end(limit: asyncio.Timeout) -> None:
    """Have it pass in the next turn."""
    with suppress(RuntimeError):  # it has passed already, or what it limited is over
        limit.reschedule(0)
