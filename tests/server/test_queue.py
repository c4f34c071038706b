"""Turns at an engine: fair between accounts, bounded, and never lost, whoever leaves when."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoai.server.errors import Unavailable
from octoai.server.queue import FairQueue
from tests.server.turns import Worker, run, ticks


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
        assert (queue.running_tokens, queue.waiting_tokens, queue._accounts) == (0, 0, {})

    run(main())


def test_another_number_of_slots_counts_at_once_and_takes_no_turn_back() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 10), list[str]()
        workers = [Worker(queue, "a", order) for _ in range(5)]
        await ticks()
        queue.resize(3)
        await ticks()
        assert [worker.has_turn for worker in workers] == [True, True, True, False, False]
        queue.resize(1)
        workers[0].release.set()
        workers[1].release.set()
        await ticks()
        assert (queue.num_running, queue.num_waiting) == (1, 2)
        for worker in workers:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in workers))
        assert (queue.num_running, queue.num_waiting, order) == (0, 0, ["a"] * 5)

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
        assert order.index("small") <= 2
        assert order.index("third") <= 3
        assert len(order) - order[::-1].index("small") <= 7
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
            async with queue.turn("a"):
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
        assert (queue.running_tokens, queue.waiting_tokens, queue._accounts) == (0, 0, {})

    run(main())


def test_tokens_that_wait_are_bounded_as_well() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 100, 1000), list[str]()
        workers = [Worker(queue, "a", order, tokens) for tokens in (5000, 5000)]  # the larger one has to be able to
        await ticks()
        assert (queue.num_waiting, queue.waiting_tokens) == (1, 5000)
        with pytest.raises(Unavailable, match="tokens"):
            async with queue.turn("a", 1):
                pass
        with pytest.raises(Unavailable, match="tokens"):
            async with queue.turn("b", 501):  # more than its part
                pass
        workers[0].release.set()
        workers += [Worker(queue, "b", order, 400), Worker(queue, "c", order, 600)]
        await ticks()
        assert (queue.num_waiting, queue.waiting_tokens) == (2, 1000)
        with pytest.raises(Unavailable):
            async with queue.turn("d", 1):
                pass
        workers[2].task.cancel()
        await ticks()
        assert queue.waiting_tokens == 600
        for worker in workers:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)
        assert (queue.waiting_tokens, queue.running_tokens) == (0, 0)

    run(main())


def test_the_time_to_come_again_is_what_waits_over_what_is_done_in_a_second() -> None:
    async def main() -> None:
        now = 0.0
        queue, order = FairQueue(1, 10, clock=lambda: now), list[str]()
        for _ in range(80):
            worker = Worker(queue, "a", order, 500)
            await ticks()
            now += 2.0
            worker.release.set()
            await worker.task
            left = Worker(queue, "a", order, 100_000)  # and goes, which was not done
            await ticks()
            left.task.cancel()
            await ticks()
            now += 60.0  # in which nothing waits: it says nothing of how fast the engine is
        assert queue.tokens_per_second == pytest.approx(250, rel=0.01)
        assert queue.expected_wait == 0
        workers = [Worker(queue, "a", order, 500) for _ in range(11)]
        await ticks()
        with pytest.raises(Unavailable) as caught:
            async with queue.turn("a", 500):
                pass
        assert caught.value.retry_after in (21, 22)  # ten that wait, and half of the one that runs, at 250
        for worker in workers:
            worker.task.cancel()
        await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)

    run(main())


def test_large_requests_have_fewer_turns_than_small_ones() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 1000), list[str]()
        holder = Worker(queue, "other", order)
        await ticks()
        workers = [Worker(queue, "large", order, 1000) for _ in range(20)]
        workers += [Worker(queue, "small", order, 100) for _ in range(100)]
        await ticks()
        for worker in [holder, *workers]:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in workers))
        assert 8 <= order[:100].count("large") <= 12

    run(main())


def test_accounts_that_come_and_go_without_end_starve_nobody() -> None:
    async def main() -> None:
        queue, order = FairQueue(1, 1000), list[str]()
        patient = [Worker(queue, "patient", order, 1000) for _ in range(2)]
        patient[0].release.set()
        patient[1].release.set()
        others = [Worker(queue, f"other{number}", order, 100) for number in range(4)]
        for number in range(4, 200):
            others.append(Worker(queue, f"other{number}", order, 100))  # always three and more waiting
            await ticks(2)
            others[len(others) - 5].release.set()
            await ticks(2)
            if patient[1].has_turn:
                break
        assert patient[1].has_turn
        assert len(order) < 80
        for worker in others:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in others))

    run(main())


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 4))
def test_a_single_request_waits_for_at_most_one_of_an_account_with_a_hundred(seed: int, slots: int) -> None:
    async def main() -> None:
        dice, queue, order = random.Random(seed), FairQueue(slots, 1000), list[str]()
        big = [Worker(queue, "big", order, dice.randint(1, 9000)) for _ in range(100)]
        await ticks()
        for worker in dice.sample(big, 30):
            worker.release.set()
            await ticks(3)
        await ticks(500)  # those who may end as soon as their turn comes hand it on, one after the other
        before = len(order)
        single = Worker(queue, "single", order, dice.randint(1, 9000))
        await ticks()
        for worker in big:
            worker.release.set()
            await ticks(3)
            if single.has_turn:
                break
        assert order[before:].index("single") <= 1
        for worker in [single, *big]:
            worker.release.set()
        await asyncio.gather(*(worker.task for worker in [single, *big]))

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
        assert (queue.running_tokens, queue.waiting_tokens, queue._accounts) == (0, 0, {})

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
                workers.append(Worker(queue, dice.choice("abc"), order, dice.randint(1, 2000)))
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
        assert (queue.running_tokens, queue.waiting_tokens, queue._accounts) == (0, 0, {})

    run(main())
