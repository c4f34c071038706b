"""Requests that arrive together begin together, and nobody waits for long."""

from __future__ import annotations

import asyncio
import time

from octoai.server.engines.llama import burst
from octoai.server.engines.llama.burst import Burst


async def seconds(joining: Burst, who: object) -> float:
    began = time.monotonic()
    await joining.join(who)
    return time.monotonic() - began


def test_who_is_alone_does_not_wait() -> None:
    async def main() -> None:
        together, who = Burst(), object()
        together.arrive(who)
        assert await seconds(together, who) < burst.MAX_SECONDS / 2

    asyncio.run(main())


def test_who_is_ready_first_waits_for_the_others_and_no_longer() -> None:
    async def main() -> None:
        together, first, second, third = Burst(), object(), object(), object()
        for who in (first, second, third):
            together.arrive(who)
        waiting = asyncio.create_task(seconds(together, first))
        await asyncio.sleep(0.001)
        together.end(second)
        await asyncio.sleep(0.001)
        assert not waiting.done()
        together.end(third)
        await asyncio.sleep(0.001)
        assert waiting.done()
        assert await waiting < burst.MAX_SECONDS

    asyncio.run(main())


def test_nobody_waits_for_long_nor_for_who_comes_later() -> None:
    async def main() -> None:
        together, first, slow, late = Burst(), object(), object(), object()
        together.arrive(first)
        together.arrive(slow)
        waiting = asyncio.create_task(seconds(together, first))
        await asyncio.sleep(burst.MAX_SECONDS / 2)
        together.arrive(late)
        assert burst.MAX_SECONDS * 0.9 < await waiting < burst.MAX_SECONDS * 1.4
        together.end(slow)
        together.end(slow)  # by who gives up, whatever had become of it

    asyncio.run(main())
