"""The gateways in turn, for `gateway.py`: whatever is compared is measured within a second or two.

In a round every gateway has its turn at one thing, in a turning order, before the next thing begins; the engine itself,
asked directly, has a turn like any other. All they were ever asked is counted: the ledger of ours must have as much.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gateway_candidates import Failed, Running
from gateway_load import Order, Seen
from sdk_measure import rotated

WHOLE_TOKENS = 16
STREAM_TOKENS = 100
PACE = 50  # tokens a second, of a stream that is paced
CLEAN_MS = 250.0  # at the 99th percentile, behind the schedule
SPEEDS: dict[str, dict[str, Any]] = {
    "whole, 1": {"num_tokens": WHOLE_TOKENS, "clients": 1},
    "whole, 16": {"num_tokens": WHOLE_TOKENS, "clients": 16},
    "whole, 64": {"num_tokens": WHOLE_TOKENS, "clients": 64},
    # Its later tokens are sent apart, so that the first is what an engine has when it begins.
    "first event": {"num_tokens": 3, "is_stream": True, "pace": 200, "clients": 1},
    "streams, 16": {"num_tokens": STREAM_TOKENS, "is_stream": True, "clients": 16},
}
PARTS = ("speed", "paced", "memory")


@dataclass(frozen=True)
class Plan:
    """`levels` are numbers of paced streams at once, of `paced_tokens` each; `memory_seconds` is the longest that a
    peer is asked for the sake of its memory."""

    parts: tuple[str, ...]
    rounds: int
    seconds: float
    levels: tuple[int, ...]
    paced_tokens: int
    requests: int
    memory_seconds: float


@dataclass
class Samples:
    """`speed` is one dict a round, by name and workload; `paced` and `memory` are lists by name."""

    speed: list[dict[str, Any]] = field(default_factory=list)
    paced: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    memory: dict[str, list[dict[str, float]]] = field(default_factory=dict)


@dataclass
class Asked:
    """All that a gateway was asked since it started."""

    answers: int = 0
    unanswered: int = 0
    num_wrong: int = 0
    wrong: str = ""
    is_counted: bool = True

    def add(self, seen: Seen) -> None:
        self.answers += seen.answers
        self.unanswered += seen.unanswered
        self.num_wrong += seen.num_wrong
        self.wrong = self.wrong or seen.wrong
        self.is_counted &= seen.is_counted


class Bench:
    """The process that makes the load, and what it has asked of whom."""

    def __init__(self, gateways: list[Running], plan: Plan) -> None:
        self.gateways, self.plan = gateways, plan
        self.asked = {gateway.name: Asked() for gateway in gateways}
        command = [sys.executable, str(Path(__file__).with_name("gateway_load.py"))]
        self.load = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        assert self.load.stdin is not None
        self.load.stdin.close()
        self.load.wait(10)

    def carried_out(self, gateway: Running, **order: Any) -> dict[str, Any]:
        """What was seen, and the CPU time that the gateway took for each answer."""
        assert self.load.stdin is not None
        assert self.load.stdout is not None
        used = gateway.cpu_seconds()
        print(json.dumps(asdict(Order(gateway.port, gateway.headers, **order))), file=self.load.stdin, flush=True)
        line = self.load.stdout.readline()
        if not line:
            raise Failed(f"{gateway.name} was lost at {order}")
        seen = Seen(**json.loads(line))
        self.asked[gateway.name].add(seen)
        cpu_us = (gateway.cpu_seconds() - used) * 1e6 / max(1, seen.answers)
        return {**asdict(seen), "cpu_us": cpu_us}

    def measure(self) -> Samples:
        samples = Samples()
        parts: dict[str, Callable[[Samples], None]] = {"speed": self.speed, "paced": self.paced, "memory": self.memory}
        for gateway in self.gateways:  # connects, builds what is built once, warms up
            self.carried_out(gateway, num_tokens=WHOLE_TOKENS, clients=16, seconds=0.5)
            self.carried_out(gateway, num_tokens=STREAM_TOKENS, is_stream=True, clients=16, requests=32)
        for part in self.plan.parts:
            parts[part](samples)
        return samples

    # ---- the parts ----

    def speed(self, samples: Samples) -> None:
        for number in range(self.plan.rounds):
            figures: dict[str, Any] = {gateway.name: {} for gateway in self.gateways}
            for work, order in SPEEDS.items():
                for gateway in rotated(self.gateways, number):
                    figures[gateway.name][work] = self.carried_out(gateway, seconds=self.plan.seconds, **order)
            samples.speed.append(figures)
            print(f"speed, round {number + 1}/{self.plan.rounds}", file=sys.stderr)

    def paced(self, samples: Samples) -> None:
        """More and more streams at once, of each gateway until it cannot keep up any more."""
        samples.paced = {gateway.name: [] for gateway in self.gateways}
        still = list(self.gateways)
        for number, streams in enumerate(self.plan.levels):
            tried = {gateway.name: self.held(gateway, streams) for gateway in rotated(still, number)}
            for name, found in tried.items():
                samples.paced[name].append(found)
            still = [gateway for gateway in still if tried[gateway.name]["is_clean"]]
            print(f"{streams} paced streams: held by {', '.join(each.name for each in still)}", file=sys.stderr)
            if not still:
                return

    def held(self, gateway: Running, streams: int) -> dict[str, Any]:
        """One try, and another if the first was not clean: it may have been the machine."""
        for _ in range(2):
            order = {"num_tokens": self.plan.paced_tokens, "is_stream": True, "pace": PACE}
            seen = self.carried_out(gateway, **order, clients=streams, requests=streams, spread_seconds=1.0)
            is_clean = not seen["num_wrong"] and not seen["unended"] and seen["late_p99_ms"] <= CLEAN_MS
            if is_clean:
                break
        return {"streams": streams, "is_clean": is_clean, **seen, "cpu_us": seen["cpu_us"] / self.plan.paced_tokens}

    def memory(self, samples: Samples) -> None:
        """RSS before, and after each fiftieth of the requests: as many of a peer as there is time for."""
        part = max(1, self.plan.requests // 50)
        for gateway in self.gateways:
            if gateway.pid is None:
                continue
            seen = [{"requests": 0.0, "rss_kib": float(gateway.rss_kib())}]
            end = time.monotonic() + self.plan.memory_seconds
            while seen[-1]["requests"] < self.plan.requests and (gateway.service or time.monotonic() < end):
                self.carried_out(gateway, num_tokens=WHOLE_TOKENS, clients=16, requests=part)
                seen.append({"requests": seen[-1]["requests"] + part, "rss_kib": float(gateway.rss_kib())})
            samples.memory[gateway.name] = seen
            print(f"memory of {gateway.name}: {seen[-1]['requests']:,.0f} requests", file=sys.stderr)
