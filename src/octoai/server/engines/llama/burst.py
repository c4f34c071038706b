"""Requests that arrive together begin together, so that an engine reads what they end with in one step.

A step for seven short prompts takes little longer than one for two. Who comes first would else have a step of its own,
beside which the others are prepared, on the same cores, and they would wait until it is done.
"""

from __future__ import annotations

import asyncio

MAX_SECONDS = 0.03  # about a step


class Burst:
    """Those that are being prepared for one engine, known by any object that is theirs."""

    def __init__(self) -> None:
        self._arriving: dict[int, asyncio.Future[None]] = {}

    def arrive(self, who: object) -> None:
        """It is there, and nearly ready. To be ended in any case: the others wait for it."""
        self._arriving[id(who)] = asyncio.get_running_loop().create_future()

    def end(self, who: object) -> None:
        """It is ready, or something longer is in its way, or it has left."""
        arrival = self._arriving.pop(id(who), None)
        if arrival is not None:
            arrival.set_result(None)

    async def join(self, who: object) -> None:
        """It is ready, and waits for those that are nearly so."""
        self.end(who)
        if self._arriving:
            await asyncio.wait(self._arriving.values(), timeout=MAX_SECONDS)
