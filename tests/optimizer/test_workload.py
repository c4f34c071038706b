"""How fast an engine was, and what it is asked: also where who measures is late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.optimizer.workload import NotMeasured, Workload, stream_rate
from octoai.server.engines.base import Deltas, Event, Finished, Generation, Started, Usage
from octoai.server.engines.scripted import ScriptedEngine

TOKEN_SECONDS = 0.004


class Steady(ScriptedEngine):
    """A token each four milliseconds, read as they are there by who is late for the first by `late` seconds."""

    def __init__(self, late: float) -> None:
        super().__init__()
        self.late = late

    async def generate(self, generation: Generation, *_: object) -> AsyncGenerator[Sequence[Event]]:
        began, number = time.perf_counter(), 0
        while number < generation.max_tokens:
            if number == 0:
                time.sleep(self.late)  # noqa: ASYNC251  # nothing else of this process runs meanwhile
            await asyncio.sleep(max(0.0, began + TOKEN_SECONDS * (number + 1) - time.perf_counter()))
            before, number = number, min(int((time.perf_counter() - began) / TOKEN_SECONDS), generation.max_tokens)
            counts = range(before + 1, number + 1)
            if counts:
                yield [*([Started(1)] if before == 0 else []), Deltas(["x"] * len(counts), counts)]
        yield [Finished({0: "length"}, Usage(1, 0, number))]


@pytest.mark.parametrize("late", [0.0, 0.02, 0.04, 0.05])
def test_a_stream_is_not_faster_for_who_is_late_to_read_its_first_token(late: float) -> None:
    rate = asyncio.run(stream_rate(Steady(late), "once", 32))
    assert 0 < rate < 1.2 / TOKEN_SECONDS


def test_a_stream_that_is_read_nearly_all_at_once_is_measured_by_a_longer_one() -> None:
    rate = asyncio.run(stream_rate(Steady(0.05), "once", 8))
    assert 0 < rate < 1.2 / TOKEN_SECONDS


def test_a_longer_stream_that_is_read_nearly_all_at_once_says_nothing() -> None:
    with pytest.raises(NotMeasured, match="most of the 8 tokens of one stream came at once"):
        asyncio.run(stream_rate(Steady(0.05), "once", 2))
    with pytest.raises(NotMeasured):
        asyncio.run(stream_rate(ScriptedEngine([]), "once", 8))


def test_a_longer_stream_is_no_longer_than_the_context() -> None:
    engine = Steady(0.05)
    engine.context_length = 40
    with pytest.raises(NotMeasured, match="most of the 16 tokens of one stream came at once"):
        asyncio.run(stream_rate(engine, "once", 8))


@given(st.floats(1 / 32, 1), st.integers(32, 4096))
def test_whatever_the_context_what_is_asked_fits(share: float, context_length: int) -> None:
    part = Workload().part(share)
    within = part.within(context_length)
    assert max(within.long_prompt + 1, within.prompt + within.completion, within.stream + 16) < context_length - 4
    assert min(within.long_prompt, within.prompt, within.completion, within.stream) > 0
    assert within == part or context_length < 620


def test_what_fits_is_asked_as_it_is() -> None:
    assert Workload().within(2048) == Workload().within(None) == Workload()
