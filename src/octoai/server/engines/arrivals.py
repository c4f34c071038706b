"""What has arrived of an answer: handed on at once where somebody takes it, otherwise kept for its reader.

To wake a task for every token is a good part of what a token costs, most of all beside an engine that has emptied the
processor's caches meanwhile. So what is text and nothing else goes on in the loop, as it comes. Of an answer that
nobody sees before it is whole, bytes are gathered for a while, and read together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from octoai.server.engines.answer import Answer
from octoai.server.engines.base import Event, OnText
from octoai.server.engines.reader import DONE
from octoai.server.errors import Refusal

GATHER_SECONDS = 0.1
MAX_GATHERED_BYTES = 64 * 1024


class Arrivals:
    """`gathers`: nobody sees the answer before it is whole. `on_progress` is told of every block."""

    _has_begun = False
    _num_gathered = 0
    _gather_until = 0.0
    _seen = b""  # the last of what was gathered, for an end that comes in pieces

    def __init__(
        self, answer: Answer, *, on_progress: Callable[[], None], on_text: OnText | None, gathers: bool
    ) -> None:
        self._answer = answer
        self._on_progress = on_progress
        self._on_text = on_text
        self._gathers = gathers
        self._events: list[Event] = []
        self._gathered: list[bytes] = []

    def take(self, block: bytes) -> bool:
        """To be called with each block as it comes. False: `given` has something. Raises as `Answer.events` does."""
        self._on_progress()
        if self._gathers and self._has_begun and not self._is_enough(block):
            return True
        events = self.read(block)
        is_text = events and self._has_begun and not (self._events or self._answer.is_whole)
        if is_text and self._on_text is not None and self._on_text(events):
            return True
        self._events += events
        return not self._events

    def read(self, block: bytes = b"") -> Sequence[Event]:
        """What was gathered and this, for nobody but the caller."""
        if self._gathered:
            block = b"".join([*self._gathered, block])
            self._gathered, self._num_gathered = [], 0
        return self._answer.events(block)

    def given(self, *, is_last: bool) -> Sequence[Event]:
        """What nobody took, each event once. `is_last`: nothing more comes."""
        events, self._events = self._events, []
        if is_last:
            events += self.read()
        self._has_begun = self._has_begun or bool(events)
        return events

    def so_far(self) -> Sequence[Event]:
        """As of the `Answer`, when it comes to no end."""
        with suppress(Refusal):  # it is broken off already
            self.read()
        return self._answer.so_far()

    def _is_enough(self, block: bytes) -> bool:
        """Whether it is time to read; a block is kept otherwise."""
        now = time.monotonic()
        if not self._gathered:
            self._gather_until = now + GATHER_SECONDS
        self._seen = self._seen[1 - len(DONE) :] + block
        if DONE in self._seen:
            self._gathers = False  # what is left of the end is waited for
        if not self._gathers or now > self._gather_until or self._num_gathered > MAX_GATHERED_BYTES:
            return True
        self._gathered.append(block)
        self._num_gathered += len(block)
        return False
