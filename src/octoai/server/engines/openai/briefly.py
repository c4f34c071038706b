"""Whether an answer may be asked for as a whole: it is brief, and its engine quick.

Who leaves such an answer is not gone for long when it is there: so it is counted. One that does not come is not.
"""

from __future__ import annotations

import asyncio
import math
import time
from types import TracebackType

from octoai.server.engines.base import Generation

MAX_TOKENS = 32
QUICK_SECONDS = 0.4  # of the 0.9 for which one that is left is waited for
KEPT = 0.9  # of how long the longest took, with each after it


class Briefly:
    """How an engine answers brief requests. `gives_whole`: it says how many tokens a whole answer has."""

    def __init__(self, *, gives_whole: bool) -> None:
        self.gives_whole = gives_whole
        self._seconds = math.inf  # that the longest took lately

    def is_brief(self, generation: Generation) -> bool:
        is_short = generation.max_tokens <= MAX_TOKENS and generation.n == 1 and not generation.is_stream
        return is_short and self.gives_whole and not generation.has_images

    @property
    def is_quick(self) -> bool:
        return self._seconds < QUICK_SECONDS

    def timed(self) -> Timed:
        """To be entered with an answer, from its being asked for to its end."""
        return Timed(self)

    def took(self, seconds: float) -> None:
        known = 0.0 if self._seconds == math.inf else self._seconds * KEPT
        self._seconds = max(seconds, known)

    def takes_longer(self, than: float) -> None:
        """One that was left by then."""
        self._seconds = max(than, self._seconds)


class Timed:
    """One that fails says nothing of how long they take."""

    def __init__(self, briefly: Briefly) -> None:
        self._briefly = briefly
        self._began = time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        seconds = time.monotonic() - self._began
        if error is None:
            self._briefly.took(seconds)
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            self._briefly.takes_longer(seconds)
