"""Whether the engine's threads have their cores for themselves, and how they wait for each other when they have not.

Threads of OpenMP that wait awake are fastest alone and slowest in company: while a neighbour has the core of one, the
others spin on theirs, and several hundred times a token. GNU's OpenMP spins a few microseconds only, and then sleeps,
whenever the process has more of its threads than cores, and looks at that before each wait. So, while there is company,
a team of threads with nothing to do is kept here; when it goes, waiting is as before. For the child process only.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TICK_SECONDS = 0.03
RESCAN_SECONDS = 1.0
BUSY_SHARE = 0.2  # of a tick that a thread ran or wanted to: what computes
CROWDED_SHARE = 0.2  # of a tick that it was ready and did not run; alone 0 to 0.14, beside a neighbour 0.25 to 0.6
CROWDED_TICKS = 3
MIN_CALM_SECONDS = 0.4
MAX_CALM_SECONDS = 8.0
_TASKS = "/proc/self/task"
_SAID_BYTES = 256  # more than three numbers take

Times = Mapping[int, tuple[float, float]]
"""Of each thread: seconds that it ran, and that it was ready and another ran instead."""


def is_visible() -> bool:
    """Whether the kernel tells how long threads wait for a core."""
    return bool(_times([threading.get_native_id()]))


class Crowding:
    """Decides by what threads say of their times. Pure: it is told the time.

    Two ticks may be the system at work, or requests that come together; three are a neighbour. What goes away only
    for a moment has to stay away longer the next time.
    """

    def __init__(self) -> None:
        self.is_crowded = False
        self.busy: frozenset[int] = frozenset()
        self._last: tuple[float, Times] | None = None
        self._num_crowded = 0
        self._calm_since: float | None = None
        self._calm_seconds = MIN_CALM_SECONDS
        self._left_at = float("-inf")

    def told(self, now: float, times: Times) -> bool:
        """Returns `is_crowded`."""
        last, self._last = self._last, (now, times)
        if last is None or now <= last[0]:
            return self.is_crowded
        seconds = now - last[0]
        shares = {
            thread: ((ran - last[1][thread][0]) / seconds, (waited - last[1][thread][1]) / seconds)
            for thread, (ran, waited) in times.items()
            if thread in last[1]
        }
        self.busy = frozenset(thread for thread, (ran, waited) in shares.items() if ran + waited > BUSY_SHARE)
        most = max((waited for _, waited in shares.values()), default=0.0)
        self._decide(now, most > CROWDED_SHARE)
        return self.is_crowded

    def _decide(self, now: float, is_crowded: bool) -> None:
        self._num_crowded = self._num_crowded + 1 if is_crowded else 0
        if is_crowded:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        if not self.is_crowded and self._num_crowded >= CROWDED_TICKS:
            is_back = now - self._left_at < self._calm_seconds
            self._calm_seconds = min(2 * self._calm_seconds, MAX_CALM_SECONDS) if is_back else MIN_CALM_SECONDS
            self.is_crowded = True
        elif self.is_crowded and self._calm_since is not None and now - self._calm_since >= self._calm_seconds:
            self.is_crowded = False
            self._left_at = now


@dataclass(slots=True)
class IdleTeam:
    """Threads of GNU's OpenMP in `library` with nothing to do: so many that with `num_threads` others there are more
    than cores."""

    library: Any
    num_threads: int
    _leave: threading.Event | None = None

    def keep(self, is_kept: bool) -> None:
        if is_kept and self._leave is None:
            self._leave = threading.Event()
            threading.Thread(target=self._keep, args=(self._leave,), daemon=True).start()
        elif not is_kept and self._leave is not None:
            self._leave.set()
            self._leave = None

    def _keep(self, leave: threading.Event) -> None:
        """The team is this thread's, and goes with it."""
        num_threads = max(2, self.library.omp_get_num_procs() - self.num_threads + 2)
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        self.library.GOMP_parallel(nothing, None, ctypes.c_uint(num_threads), ctypes.c_uint(0))
        leave.wait()


def watch(library: Any, num_threads: int) -> None:
    """From a thread of its own, until the process ends. `library` is any that uses GNU's OpenMP; with another one
    nothing is done."""
    if num_threads > 1 and hasattr(library, "GOMP_parallel") and is_visible():
        threading.Thread(target=_watch, args=(IdleTeam(library, num_threads),), daemon=True).start()


def _watch(team: IdleTeam) -> None:
    crowding = Crowding()
    scanned = float("-inf")
    ran = time.process_time()
    while True:
        time.sleep(TICK_SECONDS)
        before, ran = ran, time.process_time()
        if ran - before < BUSY_SHARE * TICK_SECONDS:
            continue  # nothing computes
        now = time.monotonic()
        threads: Iterable[int] = crowding.busy
        if not crowding.busy or now - scanned > RESCAN_SECONDS:
            scanned, threads = now, _threads()
        team.keep(crowding.told(now, _times(threads)))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir(_TASKS)]


def _times(threads: Iterable[int]) -> Times:
    found = {}
    for thread in threads:
        try:
            ran, waited, _ = _read(f"{_TASKS}/{thread}/schedstat").split()
        except (OSError, ValueError):
            continue  # it has ended, or the kernel does not say
        found[thread] = (int(ran) / 1e9, int(waited) / 1e9)
    return found


def _read(path: str) -> bytes:
    """With nothing between us and the system: what is done at every tick is done on a core of the engine's."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, _SAID_BYTES)
    finally:
        os.close(fd)
