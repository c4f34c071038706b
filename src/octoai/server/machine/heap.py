"""Memory that many requests at once needed, given back to the system when they are over.

The C library gives back only what is free at the end of its heap, and something always lies there. What is free before
that it gives back when it is asked to, in a millisecond: some seconds later, since bursts come one after another.
"""

from __future__ import annotations

import ctypes
import sys

MANY = 64  # requests at once
CALM_LOOKS = 10


class Heap:
    """Of this process."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(library, "malloc_trim", None)  # glibc has it
        self._most = self._num_calm = 0

    def look(self, num_requests: int) -> None:
        """How many are under way now, told once a second. Trims where it has been no more than a quarter of what it
        was for `CALM_LOOKS`."""
        self._most = max(self._most, num_requests)
        is_calm = self._most >= MANY and num_requests <= self._most // 4
        self._num_calm = self._num_calm + 1 if is_calm else 0
        if self._num_calm == CALM_LOOKS:
            self._most = self._num_calm = 0
            if self._trim is not None:
                self._trim(0)
