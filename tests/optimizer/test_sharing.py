"""What an engine with kernels of ours does once for several slots: what their prompts begin with in common."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octoai.server.engines.base import Delta, Finished, Generation, Started, Usage
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.options import LlamaOptions, LlamaTuning
from tests.optimizer.told import told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here"),
]
HEADER_BYTES = 12  # of a saved slot, before its tokens: two numbers, and how many tokens there are
QUESTIONS = ("Who are you?", "Name an item.", "How many rules?", "Is item 14 allowed?")


def rules(name: str) -> str:
    return f"{name}. " + " ".join(f"Rule {at}: think of item {at * 7} before item {at * 3}." for at in range(20))


async def asked(engine: LlamaEngine, system: str, question: str) -> tuple[Started, dict[str, float]]:
    """How the prompt was read, and how likely the first tokens are."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    generation = Generation(max_tokens=1, messages=messages, temperature=0.0, logprobs=5)
    events = [event async for batch in engine.generate(generation) for event in batch]
    started = next(event for event in events if isinstance(event, Started))
    first = next(event for event in events if isinstance(event, Delta) and event.logprobs)
    assert first.logprobs is not None
    return started, {each["token"]: each["logprob"] for each in first.logprobs[0]["top_logprobs"]}


def is_like(one: dict[str, float], other: dict[str, float]) -> bool:
    """Steps of other sizes add up in another order."""
    likely = [token for token in one if one[token] > math.log(0.1)]
    return all(token in other and abs(one[token] - other[token]) < 0.15 for token in likely)


def engine_of(model: Path, kernels: Path, *, num_slots: int, directory: Path | None) -> LlamaEngine:
    options = LlamaOptions(
        context_length=1024,
        num_slots=num_slots,
        prefix_dir=directory,
        prefix_bytes=1 << 30 if directory else 0,
        tuning=LlamaTuning(spin_count=None, gives_way=True, is_unified=True, kernels=kernels),
    )
    return LlamaEngine(model, model="m", options=options)


async def alone(model: Path, kernels: Path, system: str, questions: Sequence[str]) -> list[dict[str, float]]:
    """With nothing shared."""
    engine = engine_of(model, kernels, num_slots=1, directory=None)
    await engine.start()
    try:
        return [(await asked(engine, system, question))[1] for question in questions]
    finally:
        await engine.close()


def without_cells(directory: Path) -> None:
    """Cut a saved slot off behind its tokens: an engine cannot read it."""
    (file,) = directory.glob("*.bin")
    num_tokens = int.from_bytes(file.read_bytes()[8:HEADER_BYTES], "little")
    os.truncate(file, HEADER_BYTES + 4 * num_tokens)


def test_slots_are_given_what_another_one_holds_without_its_file(
    embedded_model: Path, tmp_path: Path, made: Path
) -> None:
    async def main() -> None:
        right = await alone(embedded_model, made, rules("One"), QUESTIONS)
        engine = engine_of(embedded_model, made, num_slots=4, directory=tmp_path)
        await engine.start()
        try:
            first, likely = await asked(engine, rules("One"), QUESTIONS[0])
            assert first.cached_tokens == 0
            assert is_like(right[0], likely)
            without_cells(tmp_path)
            burst = await asyncio.gather(*(asked(engine, rules("One"), question) for question in QUESTIONS))
        finally:
            await engine.close()
        assert min(started.cached_tokens for started, _ in burst) > 300
        assert all(is_like(each, likely) for each, (_, likely) in zip(right, burst, strict=True)), (right, burst)

    asyncio.run(main())


def test_what_no_slot_holds_any_more_is_read_from_its_file(embedded_model: Path, tmp_path: Path, made: Path) -> None:
    async def main() -> None:
        right = await alone(embedded_model, made, rules("One"), QUESTIONS[:2])
        engine = engine_of(embedded_model, made, num_slots=2, directory=tmp_path)
        await engine.start()
        try:
            await asked(engine, rules("One"), QUESTIONS[0])
            for name in ("Two", "Three"):  # in both slots
                await asyncio.gather(*(asked(engine, rules(name), question) for question in QUESTIONS))
            burst = await asyncio.gather(*(asked(engine, rules("One"), question) for question in QUESTIONS[:2]))
        finally:
            await engine.close()
        assert min(started.cached_tokens for started, _ in burst) > 300
        assert all(is_like(each, likely) for each, (_, likely) in zip(right, burst, strict=True)), (right, burst)

    asyncio.run(main())


def test_all_slots_may_be_full_at_once_and_none_takes_the_room_of_others(
    embedded_model: Path, tmp_path: Path, made: Path
) -> None:
    async def main() -> None:
        engine = engine_of(embedded_model, made, num_slots=4, directory=tmp_path)
        await engine.start()
        try:
            assert engine.context_length == 1024
            for turn in range(2):  # of other prompts, over those that slots hold by then
                fills = [Generation(max_tokens=2_000, text=f"{turn * 4 + at} is " * 270) for at in range(4)]
                usages = await asyncio.gather(*(used(engine, replace(fill, ignore_eos=True)) for fill in fills))
                assert [usage.prompt_tokens + usage.completion_tokens for usage in usages] == [1024] * 4
        finally:
            await engine.close()

    asyncio.run(main())


async def used(engine: LlamaEngine, generation: Generation) -> Usage:
    events = [event async for batch in engine.generate(generation) for event in batch]
    assert isinstance(events[-1], Finished)
    return events[-1].usage


def test_texts_that_begin_alike_are_taken_apart_as_the_engine_does(embedded_model: Path, made: Path) -> None:
    found: dict[str, Any] = told("tokenize", made, embedded_model)
    assert found["texts"] > 1_000
    assert found["different"] == []
    assert found["share"] < 0.5
