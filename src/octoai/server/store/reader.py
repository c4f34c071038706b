"""Reading from the database without holding up the event loop: a few threads, each with a connection of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from octoai.server.store import Place, connect
from octoai.server.store.database import Connection, StoreAway

NUM_THREADS = 4

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Own:
    """A thread's connection; `in_use` is held while a statement runs on it, and for good once it is closed."""

    connection: Connection
    in_use: threading.Lock = field(default_factory=threading.Lock)

    def close_if_idle(self) -> None:
        if self.in_use.acquire(blocking=False):
            self.connection.close()


class Reader:
    def __init__(self, place: Place, num_threads: int = NUM_THREADS) -> None:
        self._place = place
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="octoai-reader")
        self._here = threading.local()
        self._connections: list[_Own] = []
        self._is_closed = False

    async def run(self, action: Callable[[Connection], T], *, seconds: float = 5.0) -> T:
        """What `action` returns. Raises StoreAway where the database does not answer in time."""
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, action)
        except TimeoutError:
            raise StoreAway(f"the database did not answer within {seconds:g} s") from None

    def close(self) -> None:
        """Does not wait. What is still being asked, though nobody waits for it any more, is asked to its end: a
        connection that is closed under its thread takes the process with it."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for own in self._connections:
            own.close_if_idle()

    def _run(self, action: Callable[[Connection], T]) -> T:
        own: _Own | None = getattr(self._here, "own", None)
        if own is None:
            own = self._here.own = _Own(connect(self._place, migrate=False))
            self._connections.append(own)
        if not own.in_use.acquire(blocking=False):  # only closing takes it from this thread, and for good
            raise StoreAway("the service is stopping")
        try:
            return action(own.connection)
        finally:
            own.in_use.release()
            if self._is_closed:
                own.close_if_idle()
