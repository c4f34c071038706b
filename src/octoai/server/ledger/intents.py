"""When a request that has begun gets its intent into the journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

WRITE_SECONDS = 0.02  # many requests to a quick engine are settled before


class Opened(Protocol):
    def write_intent(self) -> None: ...


class Intents:
    """Of those that have none yet. `sync` brings what was written to the disk."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._unwritten: dict[Opened, float] = {}  # since when
        self._timer: asyncio.TimerHandle | None = None

    def add(self, tab: Opened, *, is_alone: bool) -> None:
        """It is written as soon as its engine has been asked where it is alone, so that it is on disk when that
        answers; in a moment, unless it is settled before, where each record is work for many."""
        self._unwritten[tab] = time.monotonic()
        if self._timer is None:
            if is_alone:
                self._timer = asyncio.get_running_loop().call_later(0.0, self._write_alone)
            else:
                self._look_soon()

    def discard(self, tab: Opened) -> None:
        """A settlement says all that the intent would, so that need not be written now."""
        self._unwritten.pop(tab, None)

    def write(self) -> None:
        """All of them, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._write([*self._unwritten])

    def _write_alone(self) -> None:
        """Where others came in the same turn of the loop, it was alone for that turn only: as in a crowd that was
        answered in one."""
        self._timer = None
        if len(self._unwritten) > 1:
            self._look_soon()
        else:
            self._write([*self._unwritten])

    def _write(self, tabs: Sequence[Opened]) -> None:
        for tab in tabs:
            self.discard(tab)
            tab.write_intent()
        if tabs:
            self._sync()

    def _look_soon(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(WRITE_SECONDS / 2, self._look)

    def _look(self) -> None:
        """Write those that would be late when this is looked at again."""
        self._timer = None
        since = time.monotonic() - WRITE_SECONDS / 2
        self._write([tab for tab, opened in self._unwritten.items() if opened <= since])
        if self._unwritten:
            self._look_soon()
