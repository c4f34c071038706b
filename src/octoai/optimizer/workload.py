"""What an engine is asked while it is measured: a long prompt, one stream, and several requests at once.

Prompts are passages of English prose, no two alike, so that no cache answers them and guesses from n-grams are worth
what they are worth in use. Knows engines by their interface only, neither candidates nor the search.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache

from octoai.server.engines.base import Delta, Engine, Generation, Started

_CHARACTERS_PER_TOKEN = 4
_STRIDE = 104_729  # a prime: passages in turn come from all over the text


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens. The full one is `Workload()`; `part(1 / 4)` takes about a quarter of its time."""

    long_prompt: int = 600
    stream: int = 64
    num_requests: int = 8
    prompt: int = 180
    completion: int = 64

    def part(self, share: float) -> Workload:
        return Workload(
            long_prompt=max(64, round(self.long_prompt * share)),
            stream=max(16, round(self.stream * share)),
            num_requests=self.num_requests,
            prompt=max(24, round(self.prompt * share)),
            completion=max(8, round(self.completion * share)),
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """`first_token_seconds` of the long prompt; tokens generated per second by one stream after its first token, and by
    several requests at once, their prompts included in the time."""

    first_token_seconds: float
    stream_rate: float
    joint_rate: float


class Passages:
    """Passages of a number of tokens, each another one."""

    def __init__(self, seed: int = 0) -> None:
        self._number = seed * 1009

    async def take(self, engine: Engine, num_tokens: int) -> str:
        """The next, cut by the engine's own count to within a token or so."""
        self._number += 1
        text = _prose()
        start = self._number * _STRIDE % (len(text) // 2)
        length = num_tokens * _CHARACTERS_PER_TOKEN
        for _ in range(6):
            counted = await engine.count_tokens(Generation(max_tokens=1, text=text[start : start + length]))
            if counted is None or abs(counted - num_tokens) <= 1:
                break
            length = max(1, round(length * num_tokens / counted))
        return text[start : start + length]


async def measure(engine: Engine, workload: Workload, passages: Passages) -> Speed:
    """Raises Refusal where the engine does."""
    long_prompt = await passages.take(engine, workload.long_prompt)
    short = await passages.take(engine, 16)
    prompts = [await passages.take(engine, workload.prompt) for _ in range(workload.num_requests)]
    return Speed(
        first_token_seconds=await first_token_seconds(engine, long_prompt),
        stream_rate=await stream_rate(engine, short, workload.stream),
        joint_rate=await joint_rate(engine, prompts, workload.completion),
    )


async def first_token_seconds(engine: Engine, prompt: str) -> float:
    began = time.perf_counter()
    first, _, _ = await _generated(engine, prompt, 1)
    return first - began


async def stream_rate(engine: Engine, prompt: str, num_tokens: int) -> float:
    first, last, num_generated = await _generated(engine, prompt, num_tokens)
    return (num_generated - 1) / max(1e-9, last - first)


async def joint_rate(engine: Engine, prompts: Sequence[str], num_tokens: int) -> float:
    began = time.perf_counter()
    answers = await asyncio.gather(*(_generated(engine, prompt, num_tokens) for prompt in prompts))
    return sum(num_generated for _, _, num_generated in answers) / (time.perf_counter() - began)


async def _generated(engine: Engine, prompt: str, num_tokens: int) -> tuple[float, float, int]:
    """When the first token came, when the last, and how many there were.

    Sampled, since greedy text of a small model repeats itself, which would flatter guesses from n-grams.
    """
    generation = Generation(max_tokens=num_tokens, text=prompt, seed=len(prompt), ignore_eos=True)
    first = last = 0.0
    num_generated = 0
    async with aclosing(engine.generate(generation)) as batches:
        async for batch in batches:
            last = time.perf_counter()
            for event in batch:
                if isinstance(event, Started | Delta):
                    first = first or last
                if isinstance(event, Delta):
                    num_generated = event.completion_tokens
    return first, last, num_generated


@cache
def _prose() -> str:
    """Python's own reference, half a megabyte that is on every machine."""
    from pydoc_data.topics import topics

    return " ".join(" ".join(topics.values()).split())
