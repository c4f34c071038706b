"""How many tokens and how much time a request took, counted as events pass, whatever ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from octoai.server.engines.base import NOTHING, Delta, Deltas, Event, Finished, Started, Usage


class PartMeter:
    """One request to an engine: one prompt, some of its choices."""

    usage = NOTHING
    is_finished = False

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.counted: dict[int, int] = {}

    def count(self, batch: Sequence[Event]) -> int:
        """Returns how many of the events are text."""
        num_texts = 0
        for event in batch:
            if isinstance(event, Deltas):
                self.counted[0] = event.counts[-1]
                num_texts += len(event.texts)
            elif isinstance(event, Delta):
                self.counted[event.index] = event.completion_tokens
                num_texts += 1
            elif isinstance(event, Started):
                self.usage = Usage(event.prompt_tokens, event.cached_tokens)
            else:
                self.usage, self.is_finished = event.usage, True
        return num_texts

    @property
    def completion_tokens(self) -> int:
        """The engine's own sum once it is known, otherwise what was seen until the request was broken off."""
        return self.usage.completion_tokens if self.is_finished else sum(self.counted.values())


class Meter:
    """A whole request. Times are `clock` readings in seconds, None until it happened."""

    turn: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.received = clock()
        self.parts: list[PartMeter] = []
        self.reasons: dict[int, str] = {}

    def part(self, prompt: int) -> PartMeter:
        part = PartMeter(prompt)
        self.parts.append(part)
        return part

    def took_turn(self) -> None:
        if self.turn is None:
            self.turn = self.clock()

    def passed(self, batch: Sequence[Event], *, is_stream: bool) -> float:
        """A batch of a part went by; returns when. Of a whole answer that came in one nobody knows when its first token
        was there."""
        self.last_token = now = self.clock()
        last = batch[-1]
        if self.first_token is None and (is_stream or not _is_several(last)):
            self.first_token = now
        if isinstance(last, Finished):
            self.reasons.update(last.reasons)
        return now

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many choices were made from it."""
        if len(self.parts) == 1:
            part = self.parts[0]
            if part.is_finished:
                return part.usage
            return Usage(part.usage.prompt_tokens, part.usage.cached_tokens, part.completion_tokens)
        prompts: dict[int, Usage] = {}
        for part in self.parts:
            known = prompts.get(part.prompt)
            if known is None or part.usage.prompt_tokens > known.prompt_tokens:
                prompts[part.prompt] = part.usage
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts.values()),
            cached_tokens=sum(usage.cached_tokens for usage in prompts.values()),
            completion_tokens=sum(part.completion_tokens for part in self.parts),
            reasoning_tokens=sum(part.usage.reasoning_tokens for part in self.parts),
        )


def _is_several(event: Event) -> bool:
    """Whether it ends an answer of more than a token."""
    return isinstance(event, Finished) and event.usage.completion_tokens > 1
