"""Whose turn it is at an engine: its slots, and a bounded queue that is fair between accounts.

Turns go round robin over accounts, first come first served within one: an account with a hundred requests waiting
delays another account's next request by at most one of its own. Leaving the queue (a client that went away) costs
nobody a slot.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from octoai.server.errors import Unavailable

_FIRST_GUESS_SECONDS = 5.0
_WEIGHT = 0.2  # of the newest turn in the moving average


class FairQueue:
    """`num_slots` turns at once, at most `max_waiting` waiting; more are refused with an honest `retry-after`."""

    def __init__(self, num_slots: int, max_waiting: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.num_running = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._clock = clock
        self._turn_seconds = _FIRST_GUESS_SECONDS

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def expected_wait(self) -> float:
        """Seconds until a request that came now would have its turn, judged by recent turns."""
        ahead = self.num_waiting + max(0, self.num_running - self.num_slots + 1)
        return ahead * self._turn_seconds / self.num_slots

    @asynccontextmanager
    async def turn(self, account: str, *, is_admitted: bool = False) -> AsyncIterator[None]:
        """`is_admitted`: more of a request that had a turn already, which must not be refused half-way."""
        await self._take(account, is_admitted)
        began = self._clock()
        try:
            yield
        finally:
            self._turn_seconds += _WEIGHT * (self._clock() - began - self._turn_seconds)
            self._give_back()

    async def _take(self, account: str, is_admitted: bool) -> None:
        if self.num_running < self.num_slots and not self._waiting:
            self.num_running += 1
            return
        if self.num_waiting >= self.max_waiting and not is_admitted:
            raise Unavailable(
                f"Too many requests are waiting ({self.num_waiting}).",
                retry_after=self.expected_wait,
                code="overloaded",
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(account, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._give_back()  # the turn came in the same moment as the client left
            else:
                self._leave(account, place)
            raise

    def _leave(self, account: str, place: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(account, ())
        if place in waiting:  # a turn that came in the same moment has passed it over already
            self._waiting[account].remove(place)
            if not waiting:
                del self._waiting[account]

    def _give_back(self) -> None:
        """Hand the slot to the account whose turn it is, which then goes to the end of the round."""
        while self._waiting:
            account, waiting = self._waiting.popitem(last=False)
            place = waiting.popleft()
            if waiting:
                self._waiting[account] = waiting
            if not place.cancelled():  # its task may not have noticed yet that it was cancelled
                place.set_result(None)
                return
        self.num_running -= 1
