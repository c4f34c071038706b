"""An engine that says what it is told: for tests of the service, and for demonstrations without a model.

A script is a list of steps. Text is one token a step; a number is a pause in seconds; an exception is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from octoai.server.engines.base import Delta, Event, Finished, Generation, OnLeft, OnText, Started, Usage
from octoai.server.errors import ContextLengthExceeded

Step = str | float | Exception
Script = Sequence[Step] | Callable[[Generation], Sequence[Step]]

GREETING: Sequence[Step] = ("Hello", ",", " ", "world", "!")


class ScriptedEngine:
    """Counts a prompt token per word. `running` and `abandoned` tell a test what became of each request.

    `num_late_tokens`: how many more it says to have written, of choice 0, when it is left after its first.
    """

    max_choices = 1

    def __init__(
        self,
        script: Script = GREETING,
        *,
        num_slots: int = 4,
        context_length: int = 8192,
        refused: Sequence[str] = (),
        num_late_tokens: int = 0,
    ) -> None:
        self.script = script
        self.num_late_tokens = num_late_tokens
        self.num_slots = num_slots
        self.context_length: int | None = context_length
        self.is_ready = True
        self.refused = refused
        self.seen: list[Generation] = []
        self.running = 0
        self.abandoned = 0

    async def start(self) -> None:
        self.is_ready = True

    async def close(self) -> None:
        self.is_ready = False

    def unsupported(self, generation: Generation) -> str | None:
        return next((name for name in self.refused if getattr(generation, name)), None)

    async def count_tokens(self, generation: Generation) -> int | None:
        return _num_words(generation)

    async def generate(
        self, generation: Generation, on_left: OnLeft | None = None, on_text: OnText | None = None
    ) -> AsyncGenerator[Sequence[Event]]:
        self.seen.append(generation)
        prompt_tokens = _num_words(generation)
        assert self.context_length is not None
        if prompt_tokens >= self.context_length:
            raise ContextLengthExceeded(prompt_tokens, self.context_length, param="messages")
        self.running += 1
        is_whole = False
        said = 0
        try:
            async for batch in self._play(generation, prompt_tokens):
                is_whole = is_whole or isinstance(batch[-1], Finished)
                said += sum(isinstance(event, Delta) for event in batch)
                yield batch
        finally:
            self.running -= 1
            self.abandoned += not is_whole
            if on_left is not None and said and not is_whole:
                on_left((Started(prompt_tokens), Delta(0, "", said + self.num_late_tokens)))

    async def _play(self, generation: Generation, prompt_tokens: int) -> AsyncGenerator[Sequence[Event]]:
        steps = self.script(generation) if callable(self.script) else self.script
        said = 0
        for step in steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, (int, float)):
                await asyncio.sleep(step)
                continue
            if said == generation.max_tokens:
                break
            said += 1
            delta = Delta(0, step, said)
            yield (Started(prompt_tokens), delta) if said == 1 else (delta,)
        cut = said == generation.max_tokens and said < sum(isinstance(step, str) for step in steps)
        reason = "length" if cut else "stop"
        start = () if said else (Started(prompt_tokens),)
        yield (*start, Finished({0: reason}, Usage(prompt_tokens, 0, said)))


def _num_words(generation: Generation) -> int:
    if generation.messages is None:
        return len(generation.tokens) if generation.tokens is not None else len((generation.text or "").split())
    return sum(len(str(message.get("content", "")).split()) for message in generation.messages)
