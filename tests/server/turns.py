"""Requests that wait for their turn in a queue, and keep it until they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from octoai.server.queue import FairQueue

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 20))


async def ticks(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


class Worker:
    """One request: waits for its turn, says when it has it, keeps it until told."""

    def __init__(self, queue: FairQueue, account: str, order: list[str], tokens: int = 1) -> None:
        self.release = asyncio.Event()
        self.has_turn = False
        self.task = asyncio.create_task(self._run(queue, account, order, tokens))

    async def _run(self, queue: FairQueue, account: str, order: list[str], tokens: int) -> None:
        async with queue.turn(account, tokens) as ended:
            self.has_turn = True
            order.append(account)
            await self.release.wait()
            ended()
