"""One answer's body becomes events: bytes in, what `reader` makes of its server-sent events out. Pure."""

from __future__ import annotations

from octoai.server.engines.base import Event, Generation
from octoai.server.engines.openai.plain import Habits
from octoai.server.engines.openai.reader import Reader
from octoai.server.errors import EngineFailed
from octoai.sse import EventDecoder, EventTooLargeError


class Answer:
    """One answer's body, read as its bytes come."""

    def __init__(self, generation: Generation | None = None, habits: Habits | None = None) -> None:
        self.is_whole = False
        self._decoder = EventDecoder()
        self._reader = Reader(generation, habits)

    def events(self, block: bytes) -> list[Event]:
        """As `read`, by themselves."""
        events: list[Event] = []
        self.read(block, events)
        return events

    def read(self, block: bytes, events: list[Event]) -> None:
        """Add what it means. Raises EngineFailed for what is not the protocol, and what the engine's own error events
        mean; what came before that is added."""
        try:
            texts = self._decoder.split(block)
        except EventTooLargeError:
            raise EngineFailed("The engine sent an event without an end.") from None
        self._reader.read_events(texts, events)
        self.is_whole = self._reader.is_done

    def so_far(self) -> list[Event]:
        """Everything counted until now, again, in as few events as that takes."""
        return self._reader.so_far(is_whole=self.is_whole)
