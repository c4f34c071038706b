"""A prompt on its way into a slot: how far it has come there, and what the request that asks it has computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from octoai.server.engines.base import Event, Finished, Started
from octoai.server.engines.llama.slots import TOKEN_BYTES


@dataclass(slots=True)
class Prompt:
    """A prompt on its way into a slot. Its first `num_shared` tokens are worth keeping for others; `num_read` have
    been read in pieces, of which `num_computed` were not in the slot before."""

    tokens: Sequence[int] = ()
    packed: bytes = b""
    num_shared: int = 0
    goes_as_tokens: bool = False  # to the engine
    slot: int = -1  # before it has one
    num_held: int = 0
    num_read: int = 0
    num_computed: int = 0
    is_counted: bool = False  # by the engine, in what was told of it or in what it said when it was left

    @property
    def shared(self) -> bytes:
        return self.packed[: self.num_shared * TOKEN_BYTES]

    @property
    def held(self) -> bytes:
        """What its slot holds of it, as far as is known."""
        return self.packed if self.is_counted else self.packed[: max(self.num_held, self.num_read) * TOKEN_BYTES]

    def read(self, events: Sequence[Event]) -> None:
        """What the engine says of a piece at its end, or when it is left."""
        for event in events:
            if isinstance(event, (Started, Finished)):
                usage = event if isinstance(event, Started) else event.usage
                self.num_read = usage.prompt_tokens
                self.num_computed += usage.prompt_tokens - usage.cached_tokens

    def counted(self, events: Sequence[Event]) -> Sequence[Event]:
        """Events of the answer. What was read in pieces is cached to the engine; the request has computed it."""
        self.is_counted = True
        return [self._corrected(event) for event in events] if self.num_computed else events

    def _corrected(self, event: Event) -> Event:
        if isinstance(event, Started):
            return replace(event, cached_tokens=max(0, event.cached_tokens - self.num_computed))
        if isinstance(event, Finished):
            cached_tokens = max(0, event.usage.cached_tokens - self.num_computed)
            return replace(event, usage=replace(event.usage, cached_tokens=cached_tokens))
        return event
