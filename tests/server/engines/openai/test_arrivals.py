"""Text that goes on as it arrives, without its reader: nothing is lost, doubled or out of order, whoever takes what."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.engines.base import Delta, Deltas, Event, Finished, Started
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.arrivals import Arrivals
from octoai.server.errors import EngineFailed
from tests.server.misbehaving import DONE, GENERATION, USAGE, WHOLE, Reply, Upstream, event, run, says, up
from tests.server.singly import singly

WORDS = [f"w{number} " for number in range(8)]


def each_of(batches: Sequence[Sequence[Event]]) -> Iterator[Event]:
    return singly(itertools.chain.from_iterable(batches))


@given(
    texts=st.lists(st.sampled_from(["a", "é", "\n", '"', "", "[DONE]"]), max_size=8),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
    takes=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_whoever_takes_what_it_is_the_answer_in_its_order(texts: list[str], cuts: list[int], takes: list[bool]) -> None:
    data = b"".join([*map(event, texts), event("", "stop"), USAGE, DONE])
    ends = sorted({cut % len(data) for cut in cuts} | {0, len(data)})
    came: list[Sequence[Event]] = []
    willing = iter(takes)

    def on_text(batch: Sequence[Event]) -> bool:
        assert all(isinstance(each, Delta | Deltas) for each in batch)
        assert isinstance(next(each_of(came)), Started)
        takes_it = next(willing, True)
        if takes_it:
            came.append(batch)
        return takes_it

    answer = Answer(GENERATION)
    arrived = Arrivals(answer, on_progress=lambda: None, on_text=on_text)
    for start, end in itertools.pairwise(ends):
        if not arrived.take(data[start:end]):
            given_now = arrived.given()
            assert given_now
            came.append(given_now)
    came.append(arrived.given())
    assert list(each_of(came)) == list(each_of([Answer(GENERATION).events(data)]))
    assert answer.is_whole


async def told(reply: Reply, on_text: object, left: list[Sequence[Event]] | None = None) -> list[Sequence[Event]]:
    batches = []
    async with up(Upstream(reply)) as engine:
        answering = engine.generate(GENERATION, None if left is None else left.append, on_text)  # type: ignore[arg-type]
        async with aclosing(answering) as events:
            async for batch in events:
                batches.append(batch)  # noqa: PERF401  # as they come, to be there when it raises
    return batches


def slow(*blocks: bytes, end: bool = True) -> Reply:
    return says(*(each for block in blocks for each in (block, 0.02)), end=end)


def test_text_after_the_first_does_not_wake_the_reader() -> None:
    async def main() -> None:
        taken: list[Sequence[Event]] = []
        batches = await told(slow(*map(event, WORDS), event("", "stop"), USAGE, DONE), lambda b: not taken.append(b))
        assert [each.text for each in each_of(taken) if isinstance(each, Delta)] == WORDS[1:]
        assert [type(each) for each in each_of(batches)] == [Started, Delta, Finished]

    run(main())


def test_what_is_refused_comes_to_the_reader_in_its_order() -> None:
    async def main() -> None:
        chance, order = random.Random(4), []

        def on_text(batch: Sequence[Event]) -> bool:
            if chance.random() < 0.5:
                return False
            order.extend(each_of([batch]))
            return True

        upstream = Upstream(slow(*map(event, WORDS), event("", "stop"), USAGE, DONE))
        async with up(upstream) as engine, aclosing(engine.generate(GENERATION, None, on_text)) as batches:
            async for batch in batches:
                order.extend(each_of([batch]))
                await asyncio.sleep(0.03)  # more comes meanwhile
        assert [each.text for each in order if isinstance(each, Delta)] == WORDS
        assert isinstance(order[-1], Finished)

    run(main())


def test_what_goes_wrong_with_a_text_is_raised_where_the_answer_is_read() -> None:
    async def main() -> None:
        left: list[Sequence[Event]] = []

        def on_text(_: Sequence[Event]) -> bool:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await told(slow(*map(event, WORDS)), on_text, left)
        (counted,) = left
        assert counted[0] == Started(0)
        assert isinstance(counted[1], Delta)
        assert counted[1].completion_tokens >= 2

    run(main())


def test_an_engine_that_says_nonsense_or_breaks_off_after_text_that_was_taken_is_counted() -> None:
    async def main() -> None:
        for end in (slow(*map(event, WORDS), b"data: [1]\n\n"), slow(*map(event, WORDS), end=False)):
            left: list[Sequence[Event]] = []
            with pytest.raises(EngineFailed):
                await told(end, lambda _: True, left)
            assert left == [[Started(0), Delta(0, "", len(WORDS))]]

    run(main())


def test_a_reader_that_is_cancelled_by_what_it_was_told_leaves() -> None:
    async def main() -> None:
        left: list[Sequence[Event]] = []
        upstream = Upstream(slow(*map(event, WORDS), *[event("more")] * 1000))
        async with up(upstream) as engine:

            def on_text(_: Sequence[Event]) -> bool:
                reading.cancel()
                return True

            async def read() -> None:
                async with aclosing(engine.generate(GENERATION, left.append, on_text)) as batches:
                    async for _ in batches:
                        pass

            reading = asyncio.create_task(read())
            await asyncio.wait({reading}, timeout=5)
            assert reading.cancelled()
            assert upstream.num_generating == 0
        (counted,) = left
        assert isinstance(counted[1], Delta)
        assert 2 <= counted[1].completion_tokens < 100

    run(main())


def test_an_answer_in_one_block_is_given_whole() -> None:
    async def main() -> None:
        (batch,) = await told(says(b"".join(WHOLE)), lambda _: True)
        assert (type(batch[0]), type(batch[-1])) == (Started, Finished)

    run(main())


@pytest.mark.parametrize("takes", [True, False])
def test_text_that_came_with_what_is_wrong_goes_on_before_it(takes: bool) -> None:
    async def main() -> None:
        came: list[Sequence[Event]] = []

        def on_text(batch: Sequence[Event]) -> bool:
            if takes:
                came.append(batch)
            return takes

        reply = slow(event("a"), event("b") + event("c") + b"data: [1]\n\n")
        async with up(Upstream(reply)) as engine, aclosing(engine.generate(GENERATION, None, on_text)) as batches:
            with pytest.raises(EngineFailed):
                async for batch in batches:
                    came.append(batch)  # noqa: PERF401  # as they come, to be there when it raises
        assert [each.text for each in each_of(came) if isinstance(each, Delta)] == ["a", "b", "c"]

    run(main())
