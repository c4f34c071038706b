"""Reading from the database without holding up the event loop: a few threads, each with a connection of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from octoai.server.store import Place, connect
from octoai.server.store.database import Connection, StoreAway

NUM_THREADS = 4

T = TypeVar("T")


class Reader:
    def __init__(self, place: Place, num_threads: int = NUM_THREADS) -> None:
        self._place = place
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="octoai-reader")
        self._own = threading.local()
        self._connections: list[Connection] = []

    async def run(self, action: Callable[[Connection], T], *, seconds: float = 5.0) -> T:
        """What `action` returns. Raises StoreAway where the database does not answer in time."""
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, action)
        except TimeoutError:
            raise StoreAway(f"the database did not answer within {seconds:g} s") from None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for connection in self._connections:
            connection.close()

    def _run(self, action: Callable[[Connection], T]) -> T:
        connection: Connection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = connect(self._place, migrate=False)
            self._connections.append(connection)
        return action(connection)
