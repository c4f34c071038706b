"""Reading from the database without holding up the event loop: a few threads, each with a connection of its own.

What nobody waits for any more is ended: a thread that reads on for nobody is one less for everybody else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from octoai.server.store import Place, connect
from octoai.server.store.database import Connection, StoreAway

NUM_THREADS = 4
# Between attempts to end what nobody waits for. What ends by itself meanwhile leaves its connection whole.
END_SECONDS = 1.0

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Own:
    """A thread's connection; `in_use` is held while a statement runs on it, and for good once it is closed."""

    connection: Connection
    in_use: threading.Lock = field(default_factory=threading.Lock)

    def close_if_idle(self) -> None:
        if self.in_use.acquire(blocking=False):
            self.connection.close()


@dataclass(eq=False, slots=True)
class _Asked(Generic[T]):
    """An action, and while it runs the connection that it runs on."""

    action: Callable[[Connection], T]
    connection: Connection | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, connection: Connection) -> T:
        self.connection = connection
        try:
            return self.action(connection)
        finally:
            with self._lock:  # or the end of this one would be that of the next on its connection
                self.connection = None

    def end(self, running: Future[T]) -> None:
        """In a thread of its own. Said again, where it came between two statements."""
        while wait([running], END_SECONDS).not_done:
            with self._lock:
                if self.connection is not None:
                    self.connection.interrupt()


class Reader:
    def __init__(self, place: Place, num_threads: int = NUM_THREADS) -> None:
        self._place = place
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="octoai-reader")
        self._here = threading.local()
        self._connections: list[_Own] = []
        self._is_closed = False

    async def run(self, action: Callable[[Connection], T], *, seconds: float = 5.0) -> T:
        """What `action` returns. Raises StoreAway where the database does not answer in time."""
        asked = _Asked(action)
        running = self._threads.submit(self._run, asked)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(running)
        except TimeoutError:
            raise StoreAway(f"the database did not answer within {seconds:g} s") from None
        finally:
            if running.running():
                threading.Thread(target=asked.end, args=(running,), name="octoai-reader-end", daemon=True).start()

    def close(self) -> None:
        """Does not wait. What is still being asked keeps its connection until it has ended: one that is closed under
        its thread takes the process with it."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for own in self._connections:
            own.close_if_idle()

    def _run(self, asked: _Asked[T]) -> T:
        own: _Own | None = getattr(self._here, "own", None)
        if own is None:
            own = self._here.own = _Own(connect(self._place, migrate=False))
            self._connections.append(own)
        if not own.in_use.acquire(blocking=False):  # only closing takes it from this thread, and for good
            raise StoreAway("the service is stopping")
        try:
            return asked.run(own.connection)
        finally:
            own.in_use.release()
            if self._is_closed:
                own.close_if_idle()
