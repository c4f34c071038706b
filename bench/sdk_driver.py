"""What one SDK costs, measured in a process of its own in that SDK's environment.

    python bench/sdk_driver.py calls NAME URL              a workload's name on a line in, its cost on a line out
    python bench/sdk_driver.py memory NAME URL REQUESTS    growth over so many requests

The figures are CPU time of this process (all its threads), so other work on the machine moves them little. Every text
that comes back is compared; a wrong one ends the process.
"""

import asyncio
import gc
import json
import os
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
NUM_REQUESTS = 50
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


def ask(client: Any) -> None:
    for _ in range(NUM_REQUESTS):
        check(client.ask(), sdk_wire.ANSWER)


async def ask_async(client: Any) -> None:
    for _ in range(NUM_REQUESTS):
        check(await client.ask_async(), sdk_wire.ANSWER)


def workloads(name: str, url: str, runner: asyncio.Runner) -> dict[str, tuple[Callable[[], None], int]]:
    """Each with the number of its units: chunks or requests."""
    make = sdk_clients.CLIENTS[name]
    burst, paced = make(url), make(f"{url}/paced")

    def run(work: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        async def awaited() -> None:
            await work()

        return lambda: runner.run(awaited())

    return {
        "stream": (lambda: stream(burst, NUM_CHUNKS), NUM_CHUNKS),
        "stream, async": (run(lambda: stream_async(burst, NUM_CHUNKS)), NUM_CHUNKS),
        "stream, paced": (lambda: stream(paced, PACED_CHUNKS), PACED_CHUNKS),
        "stream, async, paced": (run(lambda: stream_async(paced, PACED_CHUNKS)), PACED_CHUNKS),
        "plain": (lambda: ask(burst), NUM_REQUESTS),
        "plain, async": (run(lambda: ask_async(burst)), NUM_REQUESTS),
        "100 streams": (run(lambda: many_streams(burst)), NUM_STREAMS * CHUNKS_OF_MANY),
    }


def cost(work: Callable[[], None], units: int) -> dict[str, float]:
    """Per unit, in microseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_us": cpu * 1e6 / units, "wall_us": wall * 1e6 / units}


def calls(name: str, url: str) -> None:
    with asyncio.Runner() as runner:
        known = workloads(name, url, runner)
        for line in sys.stdin:
            print(json.dumps(cost(*known[line.strip()])), flush=True)


def resident_kib() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def memory(name: str, url: str, num_requests: int) -> dict[str, float]:
    """Plain requests and short streams in turn. The allocator settles in the first: they are not counted."""
    client = sdk_clients.CLIENTS[name](url)

    def send(count: int) -> None:
        for _ in range(count // 2):
            check(client.ask(), sdk_wire.ANSWER)
            stream(client, 10)

    send(500)
    before = resident_kib()
    send(num_requests)
    return {"before_kib": before, "growth_kib": resident_kib() - before, "requests": num_requests}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["calls", name, url]:
            calls(name, url)
        case ["memory", name, url, num_requests]:
            print(json.dumps(memory(name, url, int(num_requests))))
