"""What goes on together of an answer that arrives fast. By a clock of its own: nothing here waits."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Sequence
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.engines.openai.connection import MAX_GATHERED_BYTES, RELEASE_SECONDS, Connection

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
GATHER = 1 / 30
STALL = 10.0
LITTLE = 1e-6

Taken = list[tuple[float, bytes]]


class Clock(selectors.SelectSelector):
    """Waits by moving the time on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "something waits for what never comes"
        self.now += max(0.0, timeout)
        return []


class Transport(asyncio.Transport):
    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def taken(gaps: Sequence[float], gather: float = GATHER, *, size: int = 3, ends: bool = True) -> tuple[Taken, Taken]:
    """When which bytes came, each so long after the one before, and when which were taken. The last is the end."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    came: Taken = []
    went: Taken = []

    async def main() -> None:
        connection = Connection(loop)
        connection.connection_made(Transport())
        asked = asyncio.ensure_future(connection.ask(b"", STALL))
        await asyncio.sleep(0)
        connection.data_received(HEAD)
        await asked

        def take(block: bytes) -> bool:
            went.append((clock.now, block))
            return True

        feeding = asyncio.ensure_future(connection.feed(take, STALL, gather))
        for number, gap in enumerate(gaps):
            await asyncio.sleep(gap)
            came.append((clock.now, (b"%d," % number).ljust(size, b"x")))
            connection.data_received(chunk(came[-1][1]))
        if ends:
            connection.data_received(b"0\r\n\r\n")
            assert not await feeding
            assert (went[-1][0] if went else 0.0) == clock.now
        else:
            with pytest.raises(TimeoutError):
                await feeding
        connection.abort()

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    return came, went


@pytest.mark.parametrize("seconds", [0.0, 0.0001, 0.0004, 0.0006, 0.01])
def test_who_is_silent_is_given_up_however_short_the_time_is(seconds: float) -> None:
    """By uvloop's clock of whole milliseconds, for which less than half of one is at once."""

    async def main() -> None:
        connection = Connection(asyncio.get_running_loop())
        connection.connection_made(Transport())
        asked = asyncio.ensure_future(connection.ask(b"", STALL))
        await asyncio.sleep(0)
        connection.data_received(HEAD)
        await asked
        for _ in range(20):
            for waiting in (connection.block(seconds), connection.feed(lambda _: True, seconds, GATHER)):
                given_up = asyncio.ensure_future(waiting)
                assert (await asyncio.wait({given_up}, timeout=5))[0] == {given_up}
                assert isinstance(given_up.exception(), TimeoutError)
        connection.data_received(chunk(b"x"))
        assert await connection.block(seconds) == b"x"
        connection.abort()

    uvloop.run(main())


@pytest.mark.parametrize("is_fed", [False, True])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_an_engine_that_was_stopped_together_with_us_has_its_time_again(is_fed: bool, is_stopped: bool) -> None:
    """What it said before is not read yet then, and to say more takes it time. After that it is waited for no more."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]

    async def main() -> float:
        connection = Connection(loop)
        connection.connection_made(Transport())
        waiting: asyncio.Future[Any] = asyncio.ensure_future(connection.ask(b"", STALL))
        await asyncio.sleep(0)
        if is_fed:
            connection.data_received(HEAD)
            await waiting
            waiting = asyncio.ensure_future(connection.feed(lambda _: True, STALL, GATHER))
        await asyncio.sleep(STALL / 2)
        if is_stopped:
            clock.now += 10 * STALL
        began = clock.now
        with pytest.raises(TimeoutError):
            await waiting
        connection.abort()
        return clock.now - began

    try:
        assert loop.run_until_complete(main()) == pytest.approx(STALL if is_stopped else STALL / 2)
    finally:
        loop.close()


def delays(came: Taken, went: Taken) -> list[float]:
    ends = list(itertools.accumulate(len(block) for _, block in went))
    starts = itertools.accumulate((len(block) for _, block in came), initial=0)
    return [
        next(now for (now, _), end in zip(went, ends, strict=True) if end > start) - at
        for (at, _), start in zip(came, starts, strict=False)
    ]


@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=40), st.sampled_from([0.0, GATHER, 0.1]), st.booleans())
def test_all_of_it_goes_on_in_its_order_and_in_time(gaps: list[float], gather: float, ends: bool) -> None:
    came, went = taken(gaps, gather, ends=ends)
    assert b"".join(block for _, block in went) == b"".join(block for _, block in came)
    assert all(-LITTLE < delay <= gather + RELEASE_SECONDS + LITTLE for delay in delays(came, went))
    assert not gather or len(went) <= sum(gaps) / gather + len(gaps) / 2 + 2


@given(st.lists(st.floats(GATHER / 2 + 1e-3, 0.3), min_size=1, max_size=40))
def test_what_comes_slower_than_twice_in_that_time_never_waits(gaps: list[float]) -> None:
    came, went = taken(gaps)
    assert went == came


@pytest.mark.parametrize("gap", [0.001, 0.002, 0.004, 0.008])
def test_what_comes_fast_goes_on_as_often_as_can_be_seen(gap: float) -> None:
    came, went = taken([gap] * 500)
    assert len(went) <= 500 * gap / GATHER * 1.3 + 2
    assert max(delays(came, went)) <= GATHER + LITTLE


def test_one_that_comes_soon_after_one_that_was_late_does_not_wait() -> None:
    came, went = taken([0.02, 0.02, 0.037, 0.003, 0.02, 0.001, 0.039] * 5)
    assert went == came


def test_an_engine_that_stops_where_more_was_expected_is_waited_for_once() -> None:
    came, went = taken([0.08, 0.0002, 0.0002, 0.0002] * 10)
    late = [delay for delay in delays(came, went) if delay > LITTLE]
    assert 0 < len(late) <= 2
    assert max(late) <= GATHER + RELEASE_SECONDS + LITTLE


def test_what_the_engine_stops_after_does_not_wait_for_more() -> None:
    came, went = taken([0.004] * 9, ends=False)
    assert max(delays(came, went)) <= GATHER + RELEASE_SECONDS + LITTLE
    assert went[-1][1].endswith(came[-1][1])


def test_much_does_not_wait() -> None:
    _, went = taken([0.001] * 10, size=MAX_GATHERED_BYTES // 2)
    assert max(len(block) for _, block in went) <= 2 * MAX_GATHERED_BYTES


class Recording(Transport):
    def __init__(self, steps: list[bytes]) -> None:
        self.steps, self.is_aborted = steps, False

    def write(self, data: Any) -> None:
        self.steps.append(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.steps.append(b"hung up")

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


def recorded(steps: list[bytes]) -> Connection:
    connection = Connection(asyncio.get_running_loop())
    connection.connection_made(Recording(steps))
    return connection


def test_what_is_asked_in_one_turn_of_the_loop_goes_out_together_behind_it() -> None:
    """Each request takes its time before it is asked; an engine that is woken for each of them takes ours."""
    steps: list[bytes] = []

    async def ask(number: int) -> None:
        steps.append(b"worked")
        with pytest.raises(TimeoutError):
            await recorded(steps).ask(b"asked %d" % number, 0.05)

    async def main() -> None:
        await asyncio.gather(*map(ask, range(3)))

    asyncio.run(main())
    assert steps == [*[b"worked"] * 3, b"asked 0", b"asked 1", b"asked 2"]


def test_who_hangs_up_before_it_has_gone_out_has_asked_all_the_same() -> None:
    steps: list[bytes] = []

    async def main() -> None:
        connection = recorded(steps)
        asked = asyncio.ensure_future(connection.ask(b"asked", STALL))
        asyncio.get_running_loop().call_soon(connection.hang_up)
        await asyncio.sleep(0.01)
        asked.cancel()
        connection.abort()

    asyncio.run(main())
    assert steps == [b"asked", b"hung up"]


def test_what_an_engine_says_before_it_has_gone_out_is_no_answer_to_it() -> None:
    steps: list[bytes] = []

    async def main() -> None:
        connection = recorded(steps)
        asked = asyncio.ensure_future(connection.ask(b"asked", STALL))
        # As a 408 does, to a connection that was silent for long.
        asyncio.get_running_loop().call_soon(connection.data_received, HEAD)
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(1):
                await asked

    asyncio.run(main())
    assert steps == []
