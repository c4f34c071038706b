"""Turns at an engine: fair between accounts, bounded, and never lost, whoever leaves when."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoai.server.errors import Unavailable
from octoai.server.queue import FairQueue


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 20))


async def ticks(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


class Worker:
    """One request: waits for its turn, says when it has it, keeps it until told."""

    def __init__(self, queue: FairQueue, account: str, order: list[str]) -> None:
        self.release = asyncio.Event()
        self.has_turn = False
        self.task = asyncio.create_task(self._run(queue, account, order))

    async def _run(self, queue: FairQueue, account: str, order: list[str]) -> None:
        async with queue.turn(account):
            self.has_turn = True
            order.append(account)
            await self.release.wait()


def test_slots_are_taken_at_once_while_there_are_any() -> None:
    async def main() -> None:
        queue, order = FairQueue(2, 10), list[str]()
        workers = [Worker(queue, "a", order) for _ in range(3)]
        await ticks()
        assert [worker.has_turn for worker in workers] == [True, True, False]
        assert (queue.num_running, queue.num_waiting) == (2, 1)
        for worker in workers:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in workers))
        assert (queue.num_running, queue.num_waiting) == (0, 0)

    run(main())


def test_an_account_with_a_hundred_waiting_delays_another_by_one_at_most() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 1000), list[str]()
        holder = Worker(queue, "big", order)
        await ticks()
        big = [Worker(queue, "big", order) for _ in range(100)]
        await ticks()
        small = [Worker(queue, name, order) for name in ("small", "small", "third")]
        await ticks()
        for worker in [holder, *big, *small]:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in [*big, *small]))
        assert order[1:8] == ["big", "small", "third", "big", "small", "big", "big"]
        assert order.count("big") == 101

    run(main())


def test_one_account_is_served_in_the_order_of_its_requests() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 100), list[int]()

        async def one(number: int) -> None:
            async with queue.turn("a"):
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(one(number) for number in range(20)))
        assert order == list(range(20))

    run(main())


def test_who_waits_is_not_overtaken_by_who_comes_later() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 100), list[str]()
        first = Worker(queue, "a", order)
        await ticks()
        second = Worker(queue, "b", order)
        await ticks()
        first.release.set()
        late = Worker(queue, "c", order)
        second.release.set()
        late.release.set()
        await asyncio.gather(second.task, late.task)
        assert order == ["a", "b", "c"]

    run(main())


def test_a_full_queue_refuses_with_an_honest_time() -> None:
    async def main() -> None:
        now = 0.0
        queue, order = FairQueue(2, 3, clock=lambda: now), list[str]()
        workers = [Worker(queue, "a", order) for _ in range(5)]
        await ticks()
        with pytest.raises(Unavailable) as caught:
            async with queue.turn("b"):
                pass
        assert caught.value.code == "overloaded"
        assert int(caught.value.headers["retry-after"]) == caught.value.retry_after >= 1
        slow = caught.value.retry_after
        now = 0.1  # the turns turn out to be short
        for worker in workers:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in workers))
        workers = [Worker(queue, "a", order) for _ in range(5)]
        await ticks()
        assert queue.expected_wait < slow
        for worker in workers:
            worker.task.cancel()
        await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)
        assert (queue.num_running, queue.num_waiting) == (0, 0)

    run(main())


def test_a_queue_may_have_no_places_at_all() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 0), list[str]()
        worker = Worker(queue, "a", order)
        await ticks()
        with pytest.raises(Unavailable):
            async with queue.turn("a"):
                pass
        worker.release.set()
        await worker.task
        async with queue.turn("a"):
            assert queue.num_running == 1

    run(main())


def test_who_leaves_the_queue_costs_nobody_a_turn() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 10), list[str]()
        holder, leaving, staying = (Worker(queue, name, order) for name in "abc")
        await ticks()
        leaving.task.cancel()
        await ticks()
        assert queue.num_waiting == 1
        holder.release.set()
        await ticks()
        assert staying.has_turn
        staying.release.set()
        await staying.task
        assert queue.num_running == 0

    run(main())


def test_leaving_in_the_moment_in_which_a_turn_is_given_back_loses_no_slot() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 10), list[str]()
        holder, leaving, staying = (Worker(queue, name, order) for name in "abc")
        await ticks()
        holder.release.set()
        leaving.task.cancel()  # its place is cancelled now; it will know only after the holder gave back
        await ticks()
        assert staying.has_turn
        staying.release.set()
        await asyncio.gather(holder.task, staying.task)
        assert (queue.num_running, queue.num_waiting) == (0, 0)

    run(main())


def test_leaving_in_the_moment_in_which_the_turn_comes_passes_it_on() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 10), list[str]()
        holder, leaving, staying = (Worker(queue, name, order) for name in "abc")
        await ticks()
        holder.release.set()
        await ticks(1)
        assert queue.num_waiting == 1  # the turn has been handed to the one who leaves now
        leaving.task.cancel()
        await ticks()
        assert not leaving.has_turn
        assert staying.has_turn
        staying.release.set()
        await staying.task
        assert queue.num_running == 0

    run(main())


def test_a_failure_during_a_turn_gives_it_back() -> None:
    async def main() -> None:
        queue = FairQueue(1, 10)
        with pytest.raises(ValueError, match="x"):
            async with queue.turn("a"):
                raise ValueError("x")
        assert queue.num_running == 0

    run(main())


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 3), bound=st.integers(0, 6))
def test_no_interleaving_loses_a_slot_or_serves_two_in_one(seed: int, slots: int, bound: int) -> None:
    async def main() -> None:
        dice, queue, order = random.Random(seed), FairQueue(slots, bound), list[str]()
        workers: list[Worker] = []
        for _ in range(60):
            step = dice.random()
            if step < 0.45 or not workers:
                workers.append(Worker(queue, dice.choice("abc"), order))
            elif step < 0.7:
                dice.choice(workers).release.set()
            elif step < 0.9:
                dice.choice(workers).task.cancel()
            else:
                await ticks(dice.randint(1, 2))
            assert 0 <= queue.num_running <= slots
            assert 0 <= queue.num_waiting <= bound
        await ticks(10)
        living = [worker for worker in workers if not worker.task.done()]
        holding = sum(worker.has_turn for worker in living)
        assert holding == queue.num_running
        assert queue.num_waiting == len(living) - holding
        if queue.num_waiting:
            assert queue.num_running == slots  # nobody waits beside a free slot
        for worker in workers:
            worker.release.set()
        results = await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)
        assert all(result is None or isinstance(result, (Unavailable, asyncio.CancelledError)) for result in results)
        assert (queue.num_running, queue.num_waiting) == (0, 0)

    run(main())
