"""Tables of what `gateway.py` measured, and how far ours is from what it must show. Medians over the rounds; what is
added, and ratios, are taken within a round."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway_measure import PACE, STREAM_TOKENS, Samples
from sdk_report import Bar, median, table

Round = dict[str, Any]


@dataclass(frozen=True)
class AtLeast(Bar):
    """`value` should be at least `limit`."""

    @property
    def line(self) -> str:
        verdict = "ok  " if self.value >= self.limit else "MISS"
        share = f"{self.value / self.limit:.2f} of it"
        return f"  {verdict}  {self.value:8.2f}  (at least {self.limit:g}; {share})  {self.what}"


def added(name: str, work: str, figure: str) -> Callable[[Round], float]:
    """Over asking the engine directly."""
    return lambda each: each[name][work][figure] - each["direct"][work][figure]


def of(name: str, work: str, figure: str) -> Callable[[Round], float]:
    return lambda each: each[name][work][figure]


def ratio(work: str, figure: str, peer: str) -> Callable[[Round], float]:
    return lambda each: each["ours"][work][figure] / each[peer][work][figure]


def rates_table(rounds: list[Round], names: list[str]) -> str:
    rows = []
    for name in names:
        rates = [f"{median(rounds, of(name, f'whole, {clients}', 'rate')):,.0f}" for clients in (1, 16, 64)]
        cpu = [f"{median(rounds, of(name, f'whole, {clients}', 'cpu_us')):,.0f}" for clients in (1, 16, 64)]
        rows.append([name, *rates, *(cpu if name != "direct" else [""] * 3)])
    return table(["requests/s", "1 client", "16", "64", "CPU us a request: 1", "16", "64"], rows)


def added_table(rounds: list[Round], names: list[str]) -> str:
    if "direct" not in names:
        return ""
    rows = []
    for name in names:
        cells = [name]
        for work in ("whole, 1", "whole, 16", "whole, 64"):
            cells += [f"{median(rounds, added(name, work, figure)):.2f}" for figure in ("p50_ms", "p99_ms")]
        cells += [
            f"{median(rounds, added(name, 'first event', figure)):.2f}" for figure in ("first_p50_ms", "first_p99_ms")
        ]
        if name == "direct":  # itself, not over itself
            works = [
                (work, figure) for work in ("whole, 1", "whole, 16", "whole, 64") for figure in ("p50_ms", "p99_ms")
            ]
            works += [("first event", "first_p50_ms"), ("first event", "first_p99_ms")]
            cells = ["(direct)", *(f"{median(rounds, of(name, work, figure)):.2f}" for work, figure in works)]
        rows.append(cells)
    head = ["added ms", "1: p50", "p99", "16: p50", "p99", "64: p50", "p99", "first event: p50", "p99"]
    return table(head, rows)


def streams_table(samples: Samples, names: list[str]) -> str:
    rows = []
    for name in names:
        rate = cpu = ""
        if samples.speed:
            rate = f"{median(samples.speed, of(name, 'streams, 16', 'tokens_rate')):,.0f}"
            cpu = f"{median(samples.speed, of(name, 'streams, 16', 'cpu_us')) / STREAM_TOKENS:.1f}"
        held, late, paced_cpu = paced_cells(samples.paced.get(name, []))
        rows.append([name, rate, cpu if name != "direct" else "", held, late, paced_cpu if name != "direct" else ""])
    head = [
        "streams",
        "16: events/s",
        "CPU us an event",
        f"clean at {PACE} a second",
        "p99 of these, ms late",
        "CPU us",
    ]
    return table(head, rows)


def paced_cells(tried: list[dict[str, Any]]) -> tuple[str, str, str]:
    """The most streams that were clean, how late these were, and the CPU time of an event of theirs."""
    most = clean_streams(tried)
    if not most:
        return f"under {tried[0]['streams']}" if tried else "", "", ""
    held = next(each for each in tried if each["streams"] == most)
    return f"{most:,}", f"{held['late_p99_ms']:.0f}", f"{held['cpu_us']:.1f}"


def clean_streams(tried: list[dict[str, Any]]) -> int:
    """The most that were held, of those before the first that were not."""
    return max((each["streams"] for each in tried if each["is_clean"]), default=0)


def memory_table(memory: dict[str, list[dict[str, float]]]) -> str:
    rows = [
        [
            name,
            f"{seen[0]['rss_kib'] / 1024:.1f}",
            f"{seen[-1]['rss_kib'] / 1024:.1f}",
            f"{growth(seen) * 100:+.1f} %",
            f"{growth(seen[len(seen) // 2 :]) * 100:+.1f} %",
            f"{seen[-1]['requests']:,.0f}",
        ]
        for name, seen in memory.items()
    ]
    return table(["memory", "RSS MiB before", "after", "growth", "in the last half", "requests"], rows)


def growth(seen: list[dict[str, float]]) -> float:
    """As a share of what was in use before."""
    return seen[-1]["rss_kib"] / seen[0]["rss_kib"] - 1


def bars(samples: Samples, names: list[str]) -> list[Bar]:
    """What must be shown of ours. A peer that was not measured is not compared with."""
    found: list[Bar] = []
    if "ours" not in names:
        return found
    rounds = samples.speed
    if rounds and {"smg", "direct"} <= set(names):
        ours, smg = added("ours", "whole, 1", "p50_ms"), added("smg", "whole, 1", "p50_ms")
        found.append(Bar("added p50, one client: x smg's", median(rounds, lambda each: ours(each) / smg(each)), 1.5))
    if rounds and "smg" in names:
        found.append(AtLeast("requests/s, 16 clients: x smg's", median(rounds, ratio("whole, 16", "rate", "smg")), 0.5))
    if rounds and "litellm" in names:
        value = median(rounds, ratio("whole, 16", "rate", "litellm"))
        found.append(AtLeast("requests/s, 16 clients: x LiteLLM's", value, 20))
    if rounds and "smg" in names:
        value = median(rounds, ratio("streams, 16", "tokens_rate", "smg"))
        found.append(AtLeast("stream events/s, 16 streams: x smg's", value, 1))
    if samples.paced:
        found.append(AtLeast(f"clean streams at {PACE} events/s", clean_streams(samples.paced["ours"]), 512))
    if seen := samples.memory.get("ours"):
        requests = f"{seen[-1]['requests']:,.0f} requests"
        found.append(Bar(f"RSS after {requests}, MB", seen[-1]["rss_kib"] * 1024 / 1e6, 150))
        found.append(Bar(f"growth of RSS over {requests}, of what was in use", growth(seen), 0.02))
    return found


def report(samples: Samples, names: list[str], versions: dict[str, str]) -> str:
    parts = [table(["gateway", "version"], [[name, versions[name]] for name in names if name != "direct"])]
    if samples.speed:
        parts += [rates_table(samples.speed, names), added_table(samples.speed, names)]
    if samples.speed or samples.paced:
        parts.append(streams_table(samples, names))
    if samples.memory:
        parts.append(memory_table(samples.memory))
    if must := bars(samples, names):
        parts.append("must show (ours)\n" + "\n".join(bar.line for bar in must))
    return "\n\n".join(filter(None, parts))
