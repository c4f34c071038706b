"""An event loop that does not sleep while requests follow one another at once.

To be woken costs tens of microseconds, most of all on a virtual machine, whose idle processor is given away; and a
request whose answer is there at once has three such waits: for the engine, the disk, and the client's next request.
Where one follows the other within a millisecond, the loop looks again and again instead: it would be busy for most of
that time anyway. Not beside a second request, whose events wake it for both, nor where it has the only core.
"""

from __future__ import annotations

import asyncio
import time

from octoai.server.machine.cores import num_cores

FOLLOWS_SECONDS = 0.001
AWAKE_SECONDS = 0.0006  # from a request's beginning to the next one's, or the end of patience


class Awake:
    """Of one event loop."""

    def __init__(self) -> None:
        self._can_stay = num_cores() > 1
        self._began = self._until = 0.0
        self._looks = False

    def begins(self, now: float, *, is_alone: bool) -> None:
        """A request, at this time of `time.perf_counter`. Called in the loop."""
        follows = now - self._began < FOLLOWS_SECONDS
        self._began = now
        self._until = now + AWAKE_SECONDS if follows and is_alone and self._can_stay else 0.0
        if self._until and not self._looks:
            self._look()

    def _look(self) -> None:
        self._looks = time.perf_counter() < self._until
        if self._looks:  # what is to be called soon keeps the loop from waiting for events
            asyncio.get_running_loop().call_soon(self._look)
