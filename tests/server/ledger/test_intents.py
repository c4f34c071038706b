"""When intents are written: at once where a request is alone, in a crowd of those alone that have run for a moment."""

from __future__ import annotations

import asyncio
import time

from octoai.server.ledger.intents import WRITE_SECONDS, Intents


class Opened:
    def __init__(self) -> None:
        self.opened = time.monotonic()
        self.waited: float | None = None

    def write_intent(self) -> None:
        assert self.waited is None
        self.waited = time.monotonic() - self.opened


def test_one_that_is_alone_is_written_in_the_next_turn_of_the_loop() -> None:
    async def main() -> None:
        synced: list[float | None] = []
        alone = Opened()
        intents = Intents(lambda: synced.append(alone.waited))
        intents.add(alone, is_alone=True)
        assert alone.waited is None
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert synced == [alone.waited]
        assert alone.waited is not None

    asyncio.run(main())


def test_a_crowd_that_comes_at_once_is_one_from_its_first_on() -> None:
    async def main() -> None:
        synced: list[int] = []
        intents = Intents(lambda: synced.append(1))
        opened = [Opened() for _ in range(4)]
        for number, each in enumerate(opened):
            intents.add(each, is_alone=number == 0)
        await asyncio.sleep(WRITE_SECONDS / 4)
        assert not any(each.waited for each in opened)
        for each in opened[1:]:
            intents.discard(each)
        await asyncio.sleep(2 * WRITE_SECONDS)
        assert [each.waited is not None for each in opened] == [True, False, False, False]
        assert synced == [1]

    asyncio.run(main())


def test_in_a_crowd_those_that_last_are_written_in_time_and_others_never() -> None:
    async def main() -> None:
        synced: list[int] = []
        intents = Intents(lambda: synced.append(1))
        lasting, brief = [], []
        end = time.monotonic() + 10 * WRITE_SECONDS
        while time.monotonic() < end:
            for some in (lasting, brief):
                some.append(Opened())
                intents.add(some[-1], is_alone=False)
            await asyncio.sleep(0.002)
            intents.discard(brief[-1])
        await asyncio.sleep(2 * WRITE_SECONDS)
        assert not any(each.waited for each in brief)
        waits = [each.waited for each in lasting if each.waited is not None]
        assert len(waits) == len(lasting)
        assert min(waits) >= WRITE_SECONDS / 2
        assert sorted(waits)[len(waits) // 2] <= WRITE_SECONDS + 0.005
        assert len(synced) <= 30  # many at once

    asyncio.run(main())


def test_who_cannot_wait_has_all_written() -> None:
    async def main() -> None:
        synced: list[int] = []
        intents = Intents(lambda: synced.append(1))
        opened = [Opened(), Opened()]
        for each in opened:
            intents.add(each, is_alone=False)
        intents.write()
        intents.write()
        assert all(each.waited is not None for each in opened)
        assert synced == [1]

    asyncio.run(main())
