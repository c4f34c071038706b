"""What can be varied in how a model runs, and in which order it is worth trying: what matters most comes first.

Pure: candidates are values, and a stage is a function from the best so far to others worth measuring beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from octoai.server.engines.llama.options import LlamaOptions, LlamaTuning

AS_GIVEN = "as given"
SMALLEST_BATCH, LARGEST_BATCH = 64, 512
MOST_SLOTS = 8
MOST_SPINS = 1000
CACHE_TYPES = ("f16", "f32")
"""Those that round are not tried: what they lose is not measured."""
WAITING: tuple[Mapping[str, Any], ...] = (
    {"spin_count": None, "gives_way": True},
    {"spin_count": MOST_SPINS, "gives_way": False},
)
"""How threads wait for each other: awake while they are alone, or for some ten microseconds and then asleep. Asleep at
once halves one stream and is no better in company, awake always collapses there: neither is worth a trial."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a model. `weights` is the name of a recipe."""

    weights: str = AS_GIVEN
    num_slots: int = 4
    num_threads: int = 1
    batch_tokens: int = 64
    tuning: LlamaTuning = field(default_factory=LlamaTuning)

    def __str__(self) -> str:
        """Only what a reader may want to know: what is as in `LlamaTuning()` is left out."""
        tuning = self.tuning
        reading = tuning.num_batch_threads or self.num_threads
        threads = f"{self.num_threads}" if reading == self.num_threads else f"{self.num_threads}+{reading}"
        words = [
            self.weights,
            f"{threads} thread{'s' if threads != '1' else ''}",
            "compiled for this CPU" if tuning.kernels else "",
            _waiting(tuning),
            f"{self.num_slots} slots",
            f"batch {self.batch_tokens}" + (f"/{tuning.micro_batch_tokens}" if tuning.micro_batch_tokens else ""),
            "" if tuning.flash_attention == "auto" else f"flash attention {tuning.flash_attention}",
            "" if tuning.cache_type == "f16" else f"KV {tuning.cache_type}",
            "unified KV" if tuning.is_unified else "",
            "" if tuning.speculation == "none" else tuning.speculation.replace("_", "-"),
        ]
        return ", ".join(filter(None, words))

    @property
    def arithmetic(self) -> tuple[str, Path | None]:
        """What decides what the model says, and so what is lost: the weights, and what computes with them."""
        return self.weights, self.tuning.kernels

    @property
    def options(self) -> LlamaOptions:
        """How the engine is told. The context's length and the patience with it are for who starts it to say."""
        return LlamaOptions(
            context_length=0,
            num_slots=self.num_slots,
            num_threads=self.num_threads,
            batch_tokens=self.batch_tokens,
            tuning=self.tuning,
        )

    def can_be_chosen(self, num_cores: int) -> bool:
        """Whether a search on that many cores may have found it."""
        tuning = self.tuning
        return (
            1 <= self.num_slots <= MOST_SLOTS
            and 1 <= self.num_threads <= num_cores
            and 0 <= tuning.num_batch_threads <= num_cores
            and SMALLEST_BATCH <= self.batch_tokens <= LARGEST_BATCH
            and 0 <= tuning.micro_batch_tokens <= self.batch_tokens
            and 0 <= (tuning.spin_count or 0) <= MOST_SPINS
            and tuning.cache_type in CACHE_TYPES
        )

    def tuned(self, **changes: Any) -> Candidate:
        return replace(self, tuning=replace(self.tuning, **changes))


Rate = Literal["prompt", "stream", "joint"]
ALL_RATES: tuple[Rate, ...] = ("prompt", "stream", "joint")


@dataclass(frozen=True, slots=True)
class Stage:
    """`others` are candidates that differ from the best so far in what the stage is about. It can change no other than
    these `rates`: what is seen of others is noise."""

    title: str
    others: Callable[[Candidate], list[Candidate]]
    rates: tuple[Rate, ...] = ALL_RATES


def engine_defaults(num_cores: int) -> Candidate:
    """As `llama-server` runs a model when told nothing (four slots, one cache): what others are compared with."""
    tuning = LlamaTuning(micro_batch_tokens=512, spin_count=None, is_unified=True)
    return Candidate(num_slots=4, num_threads=num_cores, batch_tokens=2048, tuning=tuning)


def stages(recipes: Sequence[str], num_cores: int) -> list[Stage]:
    return [
        Stage("weights", lambda best: [replace(best, weights=name) for name in recipes]),
        Stage("threads", lambda best: _threads(best, num_cores)),
        Stage("batches", _batches, ("prompt", "joint")),
        Stage("kernels", lambda best: [best.tuned(kernels=None, is_unified=False)]),
        Stage("slots", _slots, ("joint",)),
        Stage("speculation", _speculation, ("stream", "joint")),
        Stage("attention", _attention),
    ]


def first_guesses(num_cores: int, kernels: Path | None = None, *, is_unified: bool = False) -> list[Candidate]:
    """Where the search starts, the first that runs: not the best, but good everywhere, also in company. `kernels` are
    those compiled for this CPU, if any: which formats of weights are fast hangs on them. `is_unified`: with them, since
    one cache for all slots is fast where attention knows which keys a position sees, and slow otherwise."""
    guess = Candidate(num_slots=MOST_SLOTS, num_threads=num_cores, batch_tokens=128)
    if num_cores > 1:
        guess = guess.tuned(**WAITING[0])
    return [guess.tuned(kernels=kernels, is_unified=is_unified), guess] if kernels else [guess]


def _waiting(tuning: LlamaTuning) -> str:
    if tuning.spin_count is None:
        return "spinning while alone" if tuning.gives_way else "spinning"
    return f"spinning {tuning.spin_count}" if tuning.spin_count else ""


def _threads(best: Candidate, num_cores: int) -> list[Candidate]:
    """How many, how many more of them for prompts, and how they wait: one hangs on the other. Decoding waits for its
    slowest thread at every step, so that fewer are often faster; reading a prompt does not. Where one core is left,
    what is beside them, the server's own threads and the service, does not have to take one from them."""
    counts = sorted({1, num_cores // 2, 3 * num_cores // 4, num_cores - 1} - {0, num_cores}, reverse=True)
    all_cores = replace(best, num_threads=num_cores).tuned(num_batch_threads=0)
    fewer = [replace(best, num_threads=count).tuned(num_batch_threads=num_cores) for count in counts]
    return [each.tuned(**waiting) for waiting in WAITING for each in (all_cores, *fewer)]


def _slots(best: Candidate) -> list[Candidate]:
    """No more than the requests at once that are measured: of further ones only the memory would show. One cache is not
    given up: the requests that are measured are as long as each other and begin differently, and what it is for are
    others."""
    return [*(replace(best, num_slots=count) for count in (2, 4, MOST_SLOTS)), best.tuned(is_unified=True)]


def _batches(best: Candidate) -> list[Candidate]:
    sizes = [(SMALLEST_BATCH, 0), (128, 0), (256, 0), (LARGEST_BATCH, 0)]
    return [replace(best, batch_tokens=batch).tuned(micro_batch_tokens=micro) for batch, micro in sizes]


def _attention(best: Candidate) -> list[Candidate]:
    other = "on" if best.tuning.flash_attention == "off" else "off"
    return [best.tuned(flash_attention=other), *(best.tuned(cache_type=each) for each in CACHE_TYPES)]


def _speculation(best: Candidate) -> list[Candidate]:
    return [best.tuned(speculation=kind) for kind in ("ngram_simple", "ngram_mod", "ngram_cache")]
