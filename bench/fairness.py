"""A client that streams while another sends a prompt that fills the context: its gaps between tokens, and how late the
long prompt's first token is, beside llama.cpp's server with its own defaults.

    python bench/fairness.py [--short] [--rounds N] [--tokens N] [--profiles DIR] [--json PATH]
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama_servers import answered, defaults, ours
from octoai.server.engines.base import Engine, Generation
from sdk_report import Bar, table

FULL_TOKENS = 7600  # and the rest of 8192 for the one who streams: by default both share them
SHORT_TOKENS = 2000
WARM = 10  # tokens of the stream before the long prompt comes


@dataclass
class Measured:
    first: float  # of the long prompt, in seconds
    gaps: list[float]

    def gap(self, share: float) -> float:
        return sorted(self.gaps)[min(len(self.gaps) - 1, int(len(self.gaps) * share))]

    @property
    def figures(self) -> dict[str, float]:
        return {"first": self.first, "p50": self.gap(0.5), "p99": self.gap(0.99), "gaps": len(self.gaps)}


def prompt(num_tokens: int, seed: int) -> Generation:
    dice = random.Random(seed)
    return Generation(max_tokens=1, tokens=[dice.randrange(1000, 40_000) for _ in range(num_tokens)], temperature=0.0)


class Stream:
    """The victim: when each of its tokens came."""

    def __init__(self, engine: Engine) -> None:
        self.times: list[float] = []
        self.is_warm = asyncio.Event()
        self.has_more = asyncio.Event()
        self.task = asyncio.create_task(self._read(engine))

    async def _read(self, engine: Engine) -> None:
        told = Generation(max_tokens=4000, text="Once upon a time", ignore_eos=True, seed=1)
        async with aclosing(engine.generate(told)) as batches:
            async for _ in batches:
                self.times.append(time.perf_counter())
                self.has_more.set()
                if len(self.times) == WARM:
                    self.is_warm.set()

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def measured(engine: Engine, num_tokens: int, seed: int) -> Measured:
    await answered(engine, prompt(5, seed + 1))
    stream = Stream(engine)
    await stream.is_warm.wait()
    began = time.perf_counter()
    first = (await answered(engine, prompt(num_tokens, seed))).first
    stream.has_more.clear()
    await stream.has_more.wait()  # the gap in which that token came ends later
    await stream.stop()
    times = [at for at in stream.times if at <= began][-1:] + [at for at in stream.times if at > began]
    return Measured(first, [later - at for at, later in itertools.pairwise(times) if at <= began + first])


async def rounds(number: int, num_tokens: int, place: Path, profiles: Path | None) -> list[dict[str, dict[str, float]]]:
    servers: dict[str, Callable[[], AbstractAsyncContextManager[Engine]]] = {
        "defaults": defaults,
        "ours": partial(ours, place, profiles),
    }
    found = []
    for each in range(number):
        figures = {}
        for name in sorted(servers, reverse=each % 2 == 1):
            async with servers[name]() as engine:
                figures[name] = (await measured(engine, num_tokens, each)).figures
        print({name: {key: round(value, 3) for key, value in of.items()} for name, of in figures.items()}, flush=True)
        found.append(figures)
    return found


def bars(found: list[dict[str, dict[str, float]]]) -> list[Bar]:
    def ratio(figure: str) -> float:
        return statistics.median(each["ours"][figure] / each["defaults"][figure] for each in found)

    return [
        Bar("p99 gap of the stream, x the defaults' (aim: 0.05)", ratio("p99"), 0.12),
        Bar("first token of the long prompt, x the defaults'", ratio("first"), 1.2),
    ]


def report(found: list[dict[str, dict[str, float]]]) -> str:
    heads = ["first", "p50", "p99", "gaps"]
    rows = [
        [name, *(f"{statistics.median(each[name][head] for each in found):.3f}" for head in heads)]
        for name in ("defaults", "ours")
    ]
    shown = table(["seconds", "long prompt's first token", "gap, p50", "gap, p99", "gaps"], rows)
    return "\n\n".join([shown, "must show (ours)\n" + "\n".join(bar.line for bar in bars(found))])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{SHORT_TOKENS} tokens instead of {FULL_TOKENS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="in the long prompt")
    parser.add_argument(
        "--profiles", type=Path, metavar="DIR", help="ours runs as `octoai optimize` found with this cache"
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "fairness.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    num_tokens = options.tokens or (SHORT_TOKENS if options.short else FULL_TOKENS)
    with tempfile.TemporaryDirectory() as place:
        found = asyncio.run(rounds(options.rounds, num_tokens, Path(place), options.profiles))
    print(report(found))
    result: dict[str, Any] = {"cores": os.cpu_count(), "tokens": num_tokens, "rounds": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
