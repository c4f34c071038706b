"""What a search is told, what it measures, and what comes of it: values, and how speeds are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Literal, Protocol

from octoai.optimizer.space import ALL_RATES, Candidate, Rate
from octoai.optimizer.workload import Speed

Goal = Literal["latency", "throughput", "balanced"]

# Of a prompt's rate, one stream's, and that of several requests at once.
_WEIGHTS: dict[Goal, dict[Rate, float]] = {
    "latency": {"prompt": 0.45, "stream": 0.45, "joint": 0.1},
    "throughput": {"prompt": 0.1, "stream": 0.1, "joint": 0.8},
    "balanced": {"prompt": 1 / 3, "stream": 1 / 3, "joint": 1 / 3},
}


class Loss(Protocol):
    """What is kept of a `Quality`."""

    @property
    def kl_nats(self) -> float: ...
    @property
    def same_top(self) -> float: ...


class TrialFailed(Exception):
    """A candidate that could not be measured; the text is one line."""


class Measuring(Protocol):
    """`share` is how much of the workload is run, `turn` which of its prompts: one turn's are the same for all."""

    def speed(
        self, candidate: Candidate, share: float, turn: int, max_seconds: float | None = None
    ) -> tuple[Speed, int]:
        """And the most memory that it took, in bytes. Raises TrialFailed, also when it takes longer than it may."""

    def loss(self, candidate: Candidate, bound: float | None = None) -> Loss:
        """Of its arithmetic; as little is read as tells on which side of the bound it is. Raises TrialFailed."""

    def steadiness(self, candidate: Candidate, max_seconds: float | None = None) -> float:
        """What is left of the joint rate, as a share of it, while another process takes a core. Raises TrialFailed."""


@dataclass(frozen=True, slots=True)
class Bounds:
    max_loss: float = 0.005
    """In nats: the mean KL divergence from the weights as given."""
    max_memory_bytes: int | None = None
    max_step_seconds: float = 1.0
    """That a batch of a prompt takes: a client that leaves is noticed in between, and who comes meanwhile waits."""
    min_steadiness: float = 0.5
    """Threads that spin are fastest alone and slowest in company: what is chosen must bear company."""

    def allow(self, memory_bytes: int) -> bool:
        return self.max_memory_bytes is None or memory_bytes <= self.max_memory_bytes


@dataclass(frozen=True, slots=True)
class Trial:
    """`score` is how fast it was for the goal, as a multiple of the best so far in the same round."""

    stage: str
    candidate: Candidate
    share: float
    speed: Speed | None = None
    memory_bytes: int = 0
    score: float | None = None
    note: str = ""


@dataclass(slots=True)
class Outcome:
    """`pairs` are speeds of the defaults and of the best, in turn, at the end."""

    best: Candidate
    is_usable: bool = False
    """Whether the best, or where the search began, ran within the bounds."""
    start: Candidate | None = None
    """Where the search began; None until it has."""
    is_interrupted: bool = False
    trials: list[Trial] = field(default_factory=list)
    losses: dict[tuple[str, Path | None], Loss] = field(default_factory=dict)
    """By the arithmetic of candidates that became the best at some time."""
    pairs: list[tuple[Speed, Speed]] = field(default_factory=list)

    @property
    def ratios(self) -> tuple[float, float, float] | None:
        """Of the best to the defaults: medians of a prompt's rate, one stream's, and that of several requests."""
        if not self.pairs:
            return None
        return (
            median(best.prompt_rate / defaults.prompt_rate for defaults, best in self.pairs),
            median(best.stream_rate / defaults.stream_rate for defaults, best in self.pairs),
            median(best.joint_rate / defaults.joint_rate for defaults, best in self.pairs),
        )

    def gain(self, goal: Goal) -> float:
        """How many times as fast as the defaults the best was in the end; 1 where they were not compared."""
        return median(score(best, defaults, goal) for defaults, best in self.pairs) if self.pairs else 1.0


def score(speed: Speed, beside: Speed, goal: Goal, rates: Sequence[Rate] = ALL_RATES) -> float:
    """How many times as fast, for the goal, by these rates alone."""
    times: dict[Rate, float] = {
        "prompt": speed.prompt_rate / beside.prompt_rate,
        "stream": speed.stream_rate / beside.stream_rate,
        "joint": speed.joint_rate / beside.joint_rate,
    }
    weights = {rate: _WEIGHTS[goal][rate] for rate in rates}
    return exp(sum(weight * log(times[rate]) for rate, weight in weights.items()) / sum(weights.values()))


def fastest(one: Speed, other: Speed) -> Speed:
    """The better of each figure: what disturbs a measurement makes it slower."""
    return Speed(
        max(one.prompt_rate, other.prompt_rate),
        max(one.stream_rate, other.stream_rate),
        max(one.joint_rate, other.joint_rate),
    )
