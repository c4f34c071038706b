"""What has arrived of an answer: handed on at once where somebody takes it, otherwise kept for its reader.

To wake a task for every token is a good part of what a token costs. So what is text and nothing else goes on in the
loop, as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from octoai.server.engines.base import Event, OnText
from octoai.server.engines.openai.answer import Answer


class Arrivals:
    """`on_progress` is told of every block."""

    _has_begun = False

    def __init__(self, answer: Answer, *, on_progress: Callable[[], None], on_text: OnText | None) -> None:
        self._answer = answer
        self._on_progress = on_progress
        self._on_text = on_text
        self._events: list[Event] = []

    def take(self, block: bytes) -> bool:
        """To be called with each block as it comes. False: `given` has something. Raises as `Answer.read` does, after
        what came before that was handed on."""
        self._on_progress()
        events: list[Event] = []
        try:
            self._answer.read(block, events)
        except Exception:
            self._hand_on(events)
            raise
        return self._hand_on(events)

    def _hand_on(self, events: list[Event]) -> bool:
        is_text = events and self._has_begun and not (self._events or self._answer.is_whole)
        if is_text and self._on_text is not None and self._on_text(events):
            return True
        self._events += events
        return not self._events

    def given(self) -> Sequence[Event]:
        """What nobody took, each event once."""
        events, self._events = self._events, []
        self._has_begun = self._has_begun or bool(events)
        return events
