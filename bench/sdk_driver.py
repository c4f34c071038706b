"""What one SDK costs, measured in a process of its own in that SDK's environment; prints one JSON object.

    python bench/sdk_driver.py calls NAME URL SCALE        streams and plain requests
    python bench/sdk_driver.py memory NAME URL REQUESTS    growth over so many requests

The figures are CPU time of this process (all its threads), so other work on the machine hardly moves them. Every text
that comes back is compared; a wrong one ends the process. SCALE shortens the work: 1 is all of it.
"""

import asyncio
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sdk_clients
import sdk_wire

NUM_CHUNKS = 1000
PACED_CHUNKS = 250
NUM_STREAMS = 100
CHUNKS_OF_MANY = 100
_TEXTS = {count: sdk_wire.streamed_text(count) for count in (10, CHUNKS_OF_MANY, PACED_CHUNKS, NUM_CHUNKS)}


class WrongTextError(Exception):
    """A client made something else of the bytes than they say."""


def check(got: str, expected: str) -> None:
    if got != expected:
        raise WrongTextError(f"expected {expected[:60]!r}… ({len(expected)}), got {got[:60]!r}… ({len(got)})")


def check_stream(pieces: list[str | None], count: int) -> None:
    """`count` chunks with text, each an object of its own; beyond them only empty ones."""
    texts = [piece for piece in pieces if piece]
    check("".join(texts), _TEXTS[count])
    if len(texts) != count:
        raise WrongTextError(f"{count} chunks were sent, {len(texts)} came out")


def stream(client: Any, count: int) -> None:
    check_stream(list(client.stream(f"chunks-{count}")), count)


async def stream_async(client: Any, count: int) -> None:
    check_stream([piece async for piece in client.stream_async(f"chunks-{count}")], count)


async def many_streams(client: Any) -> None:
    await asyncio.gather(*(stream_async(client, CHUNKS_OF_MANY) for _ in range(NUM_STREAMS)))


class Meter:
    """Wall and CPU time of several runs; their medians per unit, in microseconds."""

    def __init__(self) -> None:
        self.walls: list[float] = []
        self.cpus: list[float] = []

    def __enter__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.cpus.append(time.process_time() - self.cpu)
        self.walls.append(time.perf_counter() - self.wall)

    def medians(self, per: int) -> dict[str, float]:
        return {
            "cpu_us": statistics.median(self.cpus) * 1e6 / per,
            "wall_us": statistics.median(self.walls) * 1e6 / per,
        }


def cost(work: Callable[[], None], repeats: int, per: int) -> dict[str, float]:
    """Of `repeats` runs after one that is not counted."""
    meter = Meter()
    work()
    for _ in range(repeats):
        with meter:
            work()
    return meter.medians(per)


async def cost_async(work: Callable[[], Awaitable[None]], repeats: int, per: int) -> dict[str, float]:
    meter = Meter()
    await work()
    for _ in range(repeats):
        with meter:
            await work()
    return meter.medians(per)


def ask(client: Any, count: int) -> None:
    for _ in range(count):
        check(client.ask(), sdk_wire.ANSWER)


async def ask_async(client: Any, count: int) -> None:
    for _ in range(count):
        check(await client.ask_async(), sdk_wire.ANSWER)


async def calls_async(burst: Any, paced: Any, repeats: int, asked: int) -> dict[str, dict[str, float]]:
    return {
        "stream, async": await cost_async(lambda: stream_async(burst, NUM_CHUNKS), repeats, NUM_CHUNKS),
        "stream, async, paced": await cost_async(lambda: stream_async(paced, PACED_CHUNKS), repeats, PACED_CHUNKS),
        "plain, async": await cost_async(lambda: ask_async(burst, asked), repeats, asked),
        "100 streams": await cost_async(lambda: many_streams(burst), repeats, NUM_STREAMS * CHUNKS_OF_MANY),
    }


def calls(name: str, url: str, scale: float) -> dict[str, dict[str, float]]:
    make = sdk_clients.CLIENTS[name]
    burst, paced = make(url), make(f"{url}/paced")
    repeats, asked = max(1, round(3 * scale)), max(20, round(100 * scale))
    return {
        "stream": cost(lambda: stream(burst, NUM_CHUNKS), repeats, NUM_CHUNKS),
        "stream, paced": cost(lambda: stream(paced, PACED_CHUNKS), repeats, PACED_CHUNKS),
        "plain": cost(lambda: ask(burst, asked), repeats, asked),
        **asyncio.run(calls_async(burst, paced, repeats, asked)),
    }


def resident_kib() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def memory(name: str, url: str, num_requests: int) -> dict[str, float]:
    """Plain requests and short streams in turn. The allocator settles in the first: they are not counted."""
    client = sdk_clients.CLIENTS[name](url)

    def send(count: int) -> None:
        for _ in range(count // 2):
            ask(client, 1)
            stream(client, 10)

    send(500)
    before = resident_kib()
    send(num_requests)
    return {"before_kib": before, "growth_kib": resident_kib() - before, "requests": num_requests}


if __name__ == "__main__":
    what, name, url, amount = sys.argv[1:]
    print(json.dumps(calls(name, url, float(amount)) if what == "calls" else memory(name, url, int(amount))))
