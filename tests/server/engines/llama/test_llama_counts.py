"""The real engine: what it counts of a prompt beforehand, and of an answer that is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from octoai.server.engines.base import Finished, Generation
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.options import LlamaOptions
from octoai.server.engines.openai import exchange
from octoai.server.errors import BadRequest
from octoai.server.metering import PartMeter
from tests.server.llamas import PROMPTS, user


@pytest.mark.slow
@pytest.mark.model
def test_llama_cpp_counts_beforehand_what_it_counts_afterwards(embedded_model: Path) -> None:
    async def main(engine: LlamaEngine) -> None:
        for name, prompt in PROMPTS.items():
            asked = Generation(max_tokens=1, **prompt)
            events = [event async for batch in engine.generate(asked) for event in batch]
            assert isinstance(events[-1], Finished)
            assert (name, await engine.count_tokens(asked)) == (name, events[-1].usage.prompt_tokens)
        assert await engine.count_tokens(Generation(max_tokens=1, text="word " * 9000)) == 9001
        with pytest.raises(BadRequest):
            image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
            await engine.count_tokens(Generation(max_tokens=1, messages=[user([image])]))

    with_llama(embedded_model, main)


@pytest.mark.model
def test_llama_cpp_stops_at_once_when_it_is_left_and_everything_it_wrote_is_counted(embedded_model: Path) -> None:
    long = Generation(max_tokens=2000, messages=[user("Count to a million.")], ignore_eos=True)

    async def main(engine: LlamaEngine) -> None:
        for num_batches in (1, 2, 5, 11):
            part = PartMeter(0)
            async with aclosing(engine.generate(long, part.count)) as batches:
                for _ in range(num_batches):
                    part.count(await anext(batches))
                seen, began = part.completion_tokens, time.monotonic()
            assert time.monotonic() - began < exchange.LEAVE_SECONDS
            assert seen <= part.completion_tokens <= seen + 3
            # Its only slot is free: the next prompt is not kept waiting.
            short = Generation(max_tokens=1, text="Hi")
            assert [event async for batch in engine.generate(short) for event in batch]
            assert time.monotonic() - began < 2

    with_llama(embedded_model, main, num_slots=1)


def with_llama(weights: Path, main: Callable[[LlamaEngine], Awaitable[None]], num_slots: int = 2) -> None:
    async def started() -> None:
        engine = LlamaEngine(weights, model="m", options=LlamaOptions(context_length=8192, num_slots=num_slots))
        await engine.start()
        try:
            await main(engine)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(started(), 100))
