"""Tables of what `sdk.py` measured, and how far ours is from what it must show. Medians over the rounds; ratios are
taken within a round."""

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdk_measure import STAGES, WORKLOADS, Samples


@dataclass(frozen=True)
class Bar:
    """`value` should be at most `limit`."""

    what: str
    value: float
    limit: float

    @property
    def line(self) -> str:
        verdict = "ok  " if self.value <= self.limit else "MISS"
        share = f"{self.value / self.limit:.2f} of it"
        return f"  {verdict}  {self.value:8.2f}  (at most {self.limit:g}; {share})  {self.what}"


def median(rounds: list[dict[str, Any]], figure: Callable[[dict[str, Any]], float]) -> float:
    """Over the rounds that have the figure."""
    values = []
    for each in rounds:
        with contextlib.suppress(KeyError):
            values.append(figure(each))
    return statistics.median(values) if values else math.nan


def measured(rounds: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Those that did at least one of the rounds."""
    return [name for name in names if any(name in each for each in rounds)]


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        [cell.ljust(widths[0]) if not at else cell.rjust(widths[at]) for at, cell in enumerate(row)] for row in rows
    ]
    first = [cell.ljust(widths[0]) if not at else cell.rjust(widths[at]) for at, cell in enumerate(head)]
    return "\n".join("  ".join(line) for line in [first, *lines])


def cold_table(rounds: list[dict[str, Any]], names: list[str]) -> str:
    def times_bare(name: str, stage: str, figure: str) -> float:
        return median(rounds, lambda each: each[name][stage][figure] / each["bare"][stage][figure])

    bare = median(rounds, lambda each: each["bare"]["import"]["wall_ms"])
    rows = [["bare Python", f"{bare:.1f} (1.0 x)", "", "", "", "", ""]]
    for name in measured(rounds, names):
        cells = [name]
        for stage in STAGES:
            wall = median(rounds, lambda each, name=name, stage=stage: each[name][stage]["wall_ms"])
            cells.append(f"{wall:.1f} ({times_bare(name, stage, 'wall_ms'):.1f} x)")
        cells += [f"{times_bare(name, stage, 'cpu_ms'):.1f} x" for stage in STAGES]
        rows.append(cells)
    head = ["ms (x bare)", "import", "ready client", "first answer", *(f"{stage}, CPU" for stage in STAGES)]
    return table(head, rows)


def calls_table(rounds: list[dict[str, Any]], names: list[str], figure: str) -> str:
    rows = []
    for name in measured(rounds, names):
        values = [median(rounds, lambda each, n=name, w=work: each[n][w][figure]) for work in WORKLOADS]
        rate = median(rounds, lambda each, n=name: 1e6 / each[n]["100 streams"]["wall_us"])
        rows.append([name, *(f"{value:.1f}" for value in values), f"{rate:,.0f}"])
    heads = [work.replace("stream, ", "").replace(",", "") for work in WORKLOADS]
    return table([f"{figure[:-3]} us", *heads, "chunks/s of the 100"], rows)


def memory_table(memory: dict[str, Any]) -> str:
    rows = [
        [name, f"{each['before_kib'] / 1024:.1f}", f"{each['growth_kib']:.0f}", f"{each['requests']:,}"]
        for name, each in memory.items()
    ]
    return table(["memory", "RSS MiB", "growth KiB", "requests"], rows)


def ratio_to_best(rounds: list[dict[str, Any]], names: list[str], what: str, figure: str) -> float:
    """Ours to the best of the named: the highest of the medians of the ratios, each taken within a round."""

    def ratio(name: str) -> float:
        return median(rounds, lambda each: each["ours"][what][figure] / each[name][what][figure])

    return max(map(ratio, names))


def cold_bars(rounds: list[dict[str, Any]], names: list[str]) -> list[Bar]:
    peers = measured(rounds, names)

    def added(each: dict[str, Any]) -> float:
        bare = each["bare"]["import"]["wall_ms"]
        return (each["ours"]["import"]["wall_ms"] - bare) * 20 / bare

    found = [
        Bar("import over bare Python, ms where bare is 20 ms", median(rounds, added), 10),
        Bar("import and a ready client, x bare Python", ratio_to_best(rounds, ["bare"], "client", "wall_ms"), 3),
    ]
    if peers:
        first = ratio_to_best(rounds, peers, "answer", "wall_ms")
        found.append(Bar("first answer from a cold start, x the fastest peer", first, 0.7))
    return found


def chunk_bars(rounds: list[dict[str, Any]], names: list[str]) -> list[Bar]:
    peers = measured(rounds, names)
    against = (("openai", ["openai"], 0.2), ("ollama", ["ollama"], 1.0), ("the best peer", peers, 0.6))
    return [
        Bar(f"CPU per chunk, {work}: x {words}", ratio_to_best(rounds, others, work, "cpu_us"), limit)
        for work in WORKLOADS
        if "stream" in work
        for words, others, limit in against
        if others and set(others) <= set(peers)
    ]


def bars(samples: Samples, names: list[str], packages: dict[str, dict[str, str]]) -> list[Bar]:
    """What must be shown of ours. A peer that was not measured is not compared with."""
    if "ours" not in names:
        return []
    peers = [name for name in names if name != "ours"]
    found = [
        Bar("installed packages", len(packages["ours"]), 12),
        Bar("boto3 among them", float("boto3" in packages["ours"]), 0.5),
        *(cold_bars(samples.cold, peers) if measured(samples.cold, ["ours"]) else []),
        *(chunk_bars(samples.calls, peers) if measured(samples.calls, ["ours"]) else []),
    ]
    if own := samples.memory.get("ours"):
        share = own["growth_kib"] / own["before_kib"]
        found.append(Bar(f"growth of memory over {own['requests']:,} requests, of what was in use", share, 0.02))
    return found


def report(samples: Samples, names: list[str], packages: dict[str, dict[str, str]]) -> str:
    parts = [
        table(
            ["installed", "packages"],
            [[f"{name} {packages[name].get(_dist(name), '')}", str(len(packages[name]))] for name in names],
        )
    ]
    if samples.cold:
        parts.append(cold_table(samples.cold, names))
    if samples.calls:
        parts += [calls_table(samples.calls, names, "cpu_us"), calls_table(samples.calls, names, "wall_us")]
    if samples.memory:
        parts.append(memory_table(samples.memory))
    if samples.failed:
        parts.append("left out from some time on\n" + "\n".join(samples.failed.values()))
    must = bars(samples, names, packages)
    if must:
        parts.append("must show (ours)\n" + "\n".join(bar.line for bar in must))
    return "\n\n".join(parts)


def _dist(name: str) -> str:
    return "octoai" if name == "ours" else name
