"""A loop that stays awake between requests that follow one another, and no longer."""

from __future__ import annotations

import asyncio
import time

import pytest

from octoai.server.machine import awake
from octoai.server.machine.awake import AWAKE_SECONDS, FOLLOWS_SECONDS, Awake

LOOK_SECONDS = 0.000005


class Clock:
    """Five microseconds go by whenever it is looked at."""

    now = 1000.0

    def perf_counter(self) -> float:
        self.now += LOOK_SECONDS
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(awake, "time", fake)
    monkeypatch.setattr(awake, "num_cores", lambda: 2)
    return fake


def looked(clock: Clock, *requests: tuple[float, bool]) -> float:
    """How long a loop stays awake for requests at these times, alone or not, that all begin in one turn of it."""

    async def main() -> float:
        kept = Awake()
        for began, is_alone in requests:
            clock.now = began
            kept.begins(began, is_alone=is_alone)
        for _ in range(1000):
            await asyncio.sleep(0)
        return clock.now - requests[-1][0]

    return asyncio.run(main())


def test_it_stays_awake_for_a_while_after_a_request_that_follows_another(clock: Clock) -> None:
    follows = 1000 + FOLLOWS_SECONDS / 2
    assert looked(clock, (1000, True)) == 0
    assert looked(clock, (1000, True), (1000 + 1.01 * FOLLOWS_SECONDS, True)) == 0
    assert looked(clock, (1000, True), (follows, True)) == pytest.approx(AWAKE_SECONDS, abs=2 * LOOK_SECONDS)


def test_it_is_kept_awake_once_and_not_twice(clock: Clock) -> None:
    requests = [(1000.0, True)] * 9
    assert looked(clock, *requests) == pytest.approx(AWAKE_SECONDS, abs=9 * LOOK_SECONDS)


def test_it_sleeps_beside_other_requests(clock: Clock) -> None:
    assert looked(clock, (1000, True), (1000, True), (1000, False)) <= 2 * LOOK_SECONDS


def test_the_only_core_is_left_to_others(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "num_cores", lambda: 1)
    assert looked(clock, (1000, True), (1000, True)) == 0


def test_once_nobody_asks_it_takes_no_time() -> None:
    async def main() -> float:
        kept = Awake()
        for _ in range(3):
            kept.begins(time.perf_counter(), is_alone=True)
        await asyncio.sleep(0.01)
        before = time.process_time()
        await asyncio.sleep(0.1)
        return time.process_time() - before

    assert asyncio.run(main()) < 0.02
