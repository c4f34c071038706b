"""A system prompt of 1,000 tokens that requests share: how often it is read, and how soon the others' first tokens are.
Beside llama.cpp's server with its own defaults.

    python bench/prefixes.py [--short] [--rounds N] [--profiles DIR] [--json PATH]

Each round: a first request with a prompt that nobody has sent; one more; seven at once; after a restart one more; and
eight at once with another prompt that nobody has sent. A wrong count of tokens fails it.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_servers import Answer, answered, defaults, num_computed, ours
from octoai.server.engines.base import Engine, Generation
from sdk_report import Bar, table

ANSWER_TOKENS = 8
BURST = 8
QUESTIONS = ("What is rule two?", "Name an item.", "How many rules?", "Is item 14 allowed?", "Who are you?", "Why?",
             "What comes first?", "Say yes or no.", "And the last one?")  # fmt: skip


def system(number: str) -> str:
    """About 1,000 tokens, different from the first on."""
    return f"{number}. " + " ".join(f"Rule {at}: think of item {at * 7} before item {at * 3}." for at in range(57))


def chat(number: str, question: str) -> Generation:
    messages = [{"role": "system", "content": system(number)}, {"role": "user", "content": question}]
    return Generation(max_tokens=ANSWER_TOKENS, messages=messages, temperature=0.0, ignore_eos=True)


async def burst(engine: Engine, number: str, num_requests: int) -> list[Answer]:
    chosen = QUESTIONS[-num_requests:]
    return list(await asyncio.gather(*(answered(engine, chat(number, question)) for question in chosen)))


def num_distinct(answers: Sequence[Answer], num_shared: int) -> int:
    return num_shared + sum(answer.usage.prompt_tokens - num_shared for answer in answers)


async def measured(engine: Engine, number: int, num_shared: int) -> dict[str, float]:
    await answered(engine, Generation(max_tokens=1, text="Hi"))
    first = await answered(engine, chat(f"{number}a", QUESTIONS[0]))
    second = await answered(engine, chat(f"{number}a", QUESTIONS[1]))
    seven = await burst(engine, f"{number}a", BURST - 1)
    eight = await burst(engine, f"{number}b", BURST)
    delays = sorted(answer.first for answer in eight)
    return {
        "first": first.first,
        "second": second.first / first.first,
        "seven, median": statistics.median(answer.first for answer in seven) / first.first,
        "seven, last": max(answer.first for answer in seven) / first.first,
        "seven, cached": min(answer.usage.cached_tokens for answer in seven),
        "eight, first": delays[0] / first.first,
        "eight, last after first": (delays[-1] - delays[0]) / first.first,
        "eight, read": num_computed(eight) / num_distinct(eight, num_shared),
    }


async def one_round(number: int, place: Path, profiles: Path | None, num_shared: int) -> dict[str, dict[str, float]]:
    async with ours(place, profiles) as engine:
        own = await measured(engine, number, num_shared)
    async with ours(place, profiles) as engine:
        await answered(engine, Generation(max_tokens=1, text="Hi"))
        again = await answered(engine, chat(f"{number}a", QUESTIONS[2]))
        own["restarted"] = again.first / own["first"]
        own["restarted, cached"] = again.usage.cached_tokens
    async with defaults() as engine:
        return {"ours": own, "defaults": await measured(engine, number, num_shared)}


async def rounds(number: int, place: Path, profiles: Path | None) -> list[dict[str, dict[str, float]]]:
    found = []
    async with ours(place, profiles) as engine:
        whole = await engine.count_tokens(chat("0a", ""))
    assert whole is not None
    num_shared = whole - 5  # what ends the question and begins the answer
    for each in range(number):
        found.append(await one_round(each, place, profiles, num_shared))
        if not 0.9 * num_shared < found[-1]["ours"]["seven, cached"] <= num_shared:
            sys.exit(
                f"wrong: {found[-1]['ours']['seven, cached']} of {num_shared} shared tokens were said to be cached"
            )
        print({name: {key: round(value, 3) for key, value in of.items()} for name, of in found[-1].items()}, flush=True)
    return found


def bars(found: list[dict[str, dict[str, float]]]) -> list[Bar]:
    def median(figure: str) -> float:
        return statistics.median(each["ours"][figure] for each in found)

    return [
        Bar("tokens read of eight prompts at once, x the distinct ones", median("eight, read"), 1.3),
        Bar("first token of the second request, x the first's", median("second"), 0.15),
        Bar("of seven at once, the median, x the first's", median("seven, median"), 0.15),
        Bar("of seven at once, the last, x the first's", median("seven, last"), 0.15),
        Bar("after a restart, x the first's", median("restarted"), 0.15),
    ]


def report(found: list[dict[str, dict[str, float]]]) -> str:
    heads = list(found[0]["ours"])
    rows = [
        [head, *(f"{statistics.median(each[name][head] for each in found):.3f}" if head in found[0][name] else ""
                 for name in ("defaults", "ours"))]
        for head in heads
    ]  # fmt: skip
    shown = table(["", "defaults", "ours"], rows)
    return "\n\n".join([shown, "must show (ours)\n" + "\n".join(bar.line for bar in bars(found))])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two rounds")
    parser.add_argument(
        "--profiles", type=Path, metavar="DIR", help="ours runs as `octoai optimize` found with this cache"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "prefixes.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as place:
        found = asyncio.run(rounds(2 if options.short else options.rounds, Path(place), options.profiles))
    print(report(found))
    result: dict[str, Any] = {"cores": os.cpu_count(), "rounds": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
