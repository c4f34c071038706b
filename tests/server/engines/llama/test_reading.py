"""Prompts that begin alike are read once, by the real engine; what each request computed is counted as its own."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from octoai.server.engines.base import Event, Generation, Started, Usage
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.prompt import Prompt
from octoai.server.engines.llama.reading import (
    MIN_SHARED_TOKENS,
    PIECE_TOKENS,
    PIECE_TOKENS_BESIDE,
    Reading,
)
from tests.server.llamas import answered, running

pytestmark = pytest.mark.model

SYSTEM = " ".join(f"Rule {number}: think of item {number * 7} before item {number * 3}." for number in range(20))
NUM_SYSTEM = 300  # tokens, about


def chat(question: str, system: str = SYSTEM, **changes: object) -> Generation:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return Generation(max_tokens=4, messages=messages, temperature=0.0, **changes)  # type: ignore[arg-type]


def num_computed(usages: Sequence[Usage]) -> int:
    return sum(usage.prompt_tokens - usage.cached_tokens for usage in usages)


def kept(place: Path) -> list[Path]:
    return list((place / "prefixes").iterdir())


def test_a_burst_reads_its_shared_beginning_once_and_answers_as_without(embedded_model: Path, tmp_path: Path) -> None:
    questions = [f"What is the {name} rule about?" for name in ("first", "second", "third", "last", "best")]

    async def main() -> None:
        async with running(embedded_model, tmp_path) as engine:
            answers = await asyncio.gather(*(answered(engine, chat(question)) for question in questions))
            usages = [usage for _, usage in answers]
            readers = [usage for usage in usages if usage.cached_tokens < NUM_SYSTEM // 2]
            assert len(readers) == 1
            assert readers[0].cached_tokens == 0
            shared = min(usage.cached_tokens for usage in usages if usage is not readers[0])
            distinct = shared + sum(usage.prompt_tokens - shared for usage in usages)
            assert shared > MIN_SHARED_TOKENS
            assert num_computed(usages) <= distinct + len(usages)
            for question, usage in zip(questions, usages, strict=True):
                assert usage.prompt_tokens == await engine.count_tokens(chat(question))
        async with running(embedded_model, tmp_path, prefix_bytes=0) as engine:
            for question, (text, _) in zip(questions, answers, strict=True):
                assert (await answered(engine, chat(question)))[0] == text

    asyncio.run(main())


def test_a_beginning_outlives_a_restart_and_only_its_owner_can_read_the_file(
    embedded_model: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with running(embedded_model, tmp_path) as engine:
            first, usage = await answered(engine, chat("Hello?"))
            assert usage.cached_tokens == 0
        (file,) = kept(tmp_path)
        assert file.stat().st_mode & 0o777 == 0o400
        assert file.parent.stat().st_mode & 0o777 == 0o700
        async with running(embedded_model, tmp_path) as engine:
            again, usage = await answered(engine, chat("Hello?"))
            assert usage.cached_tokens > NUM_SYSTEM // 2
            assert again == first
        other = tmp_path / "other.gguf"
        shutil.copy(embedded_model, other)  # another time: other weights, for all we know
        async with running(other, tmp_path) as engine:
            assert (await answered(engine, chat("Hello?")))[1].cached_tokens == 0

    asyncio.run(main())


@pytest.mark.slow
def test_a_conversation_finds_its_own_slot_among_others(embedded_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(embedded_model, tmp_path, prefix_bytes=0) as engine:
            talks = [[{"role": "user", "content": f"{number} " * 60 + "?"}] for number in (3, 5, 7)]
            for talk in talks:
                text, _ = await answered(engine, Generation(max_tokens=4, messages=talk, temperature=0.0))
                talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
            for talk in reversed(talks):
                _, usage = await answered(engine, Generation(max_tokens=4, messages=talk, temperature=0.0))
                assert usage.cached_tokens > 60

    asyncio.run(main())


def test_prompts_that_branch_without_a_system_message_share_what_they_have_in_common(
    embedded_model: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with running(embedded_model, tmp_path) as engine:
            texts = [f"{SYSTEM} Now tell me about {thing}" for thing in ("cats", "dogs", "hens", "owls")]
            for text in texts[:2]:
                await answered(engine, Generation(max_tokens=2, text=text))
            rest = [answered(engine, Generation(max_tokens=2, text=text)) for text in texts[2:]]
            assert all(usage.cached_tokens > NUM_SYSTEM // 2 for _, usage in await asyncio.gather(*rest))

    asyncio.run(main())


def test_who_leaves_while_reading_is_counted_what_was_read_and_the_next_goes_on(
    embedded_model: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        left: list[Event] = []
        long = SYSTEM * 5

        async def leave(engine: LlamaEngine) -> None:
            async for _ in engine.generate(chat("Hello?", long), left.extend):
                pass

        async with running(embedded_model, tmp_path) as engine:
            leaving = asyncio.create_task(leave(engine))
            await asyncio.sleep(1.5)
            following = asyncio.create_task(answered(engine, chat("And you?", long)))
            await asyncio.sleep(0.2)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            (started,) = left
            assert isinstance(started, Started)
            assert started.cached_tokens == 0
            assert 0 < started.prompt_tokens < 5 * NUM_SYSTEM * 1.5
            _, usage = await following
            assert usage.cached_tokens >= started.prompt_tokens // 2

    asyncio.run(main())


@pytest.mark.slow
def test_a_place_that_cannot_be_written_costs_nothing_but_the_saving(
    embedded_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(embedded_model, tmp_path) as engine:
            shutil.rmtree(tmp_path / "prefixes")
            usages = [usage for _, usage in await asyncio.gather(*(answered(engine, chat(q)) for q in "abc"))]
            assert all(usage.prompt_tokens > NUM_SYSTEM // 2 for usage in usages)
        assert sum("are not saved" in record.message for record in caplog.records) == 1

    asyncio.run(main())


@pytest.mark.slow
def test_files_are_bounded_and_the_least_used_goes_first(embedded_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(embedded_model, tmp_path) as engine:
            await answered(engine, chat("Hello?"))
        (file,) = kept(tmp_path)
        room = int(2.5 * file.stat().st_size)
        async with running(embedded_model, tmp_path, prefix_bytes=room) as engine:
            for number in range(2):
                await answered(engine, chat("Hello?", f"{number}. {SYSTEM}"))
                await answered(engine, chat("Hello again?"))
            files = kept(tmp_path)
            assert file in files
            assert sum(each.stat().st_size for each in files) <= room
        async with running(embedded_model, tmp_path, prefix_bytes=room) as engine:
            assert (await answered(engine, chat("Hello?")))[1].cached_tokens > 0

    asyncio.run(main())


@pytest.mark.slow
def test_beside_others_a_long_prompt_is_read_in_steps(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the engine's batches are, nobody's stream waits for more than a small piece."""
    sizes: dict[str, list[int]] = {}
    read_to = Reading._read_to
    who = "alone"

    async def noted(reading: Reading, prompt: Prompt, end: int) -> None:
        sizes.setdefault(who, []).append(end - max(prompt.num_held, prompt.num_read))
        await read_to(reading, prompt, end)

    monkeypatch.setattr(Reading, "_read_to", noted)

    async def main() -> None:
        nonlocal who
        async with running(embedded_model, tmp_path, batch_tokens=512) as engine:
            await answered(engine, Generation(max_tokens=1, tokens=list(range(1000, 1700))))
            who = "beside"
            victim = Generation(max_tokens=400, tokens=[5, 6, 7], ignore_eos=True)
            async with aclosing(engine.generate(victim)) as batches:
                await anext(batches)
                await answered(engine, Generation(max_tokens=1, tokens=list(range(3000, 3700))))
                who = "short, beside"
                _, usage = await answered(engine, Generation(max_tokens=1, tokens=list(range(4000, 4180))))
                assert (usage.prompt_tokens, usage.cached_tokens) == (180, 0)
            who = "short, alone"
            many = [Generation(max_tokens=1, tokens=list(range(at, at + 180))) for at in (5000, 6000, 7000)]
            await asyncio.gather(*(answered(engine, each) for each in many))
            assert engine._reading is not None
            assert engine._reading._num_answering == 0

    asyncio.run(main())
    assert sizes == {
        "alone": [PIECE_TOKENS],
        "beside": [PIECE_TOKENS_BESIDE] * 5,
        "short, beside": [PIECE_TOKENS_BESIDE],
    }


@pytest.mark.slow
def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(embedded_model: Path, tmp_path: Path) -> None:
    async def first_token(engine: LlamaEngine, tokens: Sequence[int]) -> float:
        began = time.monotonic()
        async with aclosing(engine.generate(Generation(max_tokens=1, tokens=tokens))) as batches:
            await anext(batches)
        return time.monotonic() - began

    async def main() -> None:
        async with running(embedded_model, tmp_path) as engine:
            long = asyncio.create_task(first_token(engine, list(range(1000, 3000))))  # in the first slot
            await asyncio.sleep(0.3)
            short = await first_token(engine, list(range(500, 520)))
            assert not long.done()
            assert short < 0.7 * await long

    asyncio.run(main())
