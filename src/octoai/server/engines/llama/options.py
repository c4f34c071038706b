"""How a llama.cpp child runs: what is asked of it, and what was found to be fast on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from octoai.server.engines.llama.prefixes import Prefixes, fingerprint
from octoai.server.machine.cores import num_cores

# Options that may change without making a saved prompt useless.
_WITHOUT_SHAPE = ("num_slots", "num_threads", "cache_ram_mib", "stall_seconds", "prefix_dir", "prefix_bytes", "tuning")


@dataclass(frozen=True, slots=True)
class LlamaTuning:
    """What a profile of this machine may say beside `LlamaOptions`; the defaults are safe everywhere.

    `num_batch_threads` read prompts (0: as many as generate). Of a batch, `micro_batch_tokens` are computed at a time
    (0: all). `cache_type` is the type of ggml that the KV cache is kept in; `is_unified` shares one cache between the
    slots. `speculation` guesses tokens from n-grams of the text so far. A thread that waits for the others looks
    `spin_count` times before it sleeps (None: OpenMP's own, some milliseconds): what spins is fastest alone, and
    twenty times slower when a neighbour takes one of two cores. With `gives_way` it spins only while there is none.
    `kernels` were compiled for this CPU (None: those of the wheel).
    """

    num_batch_threads: int = 0
    micro_batch_tokens: int = 0
    flash_attention: Literal["auto", "on", "off"] = "auto"
    cache_type: Literal["f16", "f32", "q8_0"] = "f16"
    is_unified: bool = False
    speculation: Literal["none", "ngram_simple", "ngram_map_k", "ngram_map_k4v", "ngram_mod", "ngram_cache"] = "none"
    spin_count: int | None = 0
    gives_way: bool = False
    kernels: Path | None = None


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How the child runs. `batch_tokens` bounds how long one step of prompt reading takes, and with it others' gap
    between two tokens, and how soon a slot is free after its client left. Beginnings of prompts are kept in
    `prefix_dir`, up to `prefix_bytes`; 0 keeps none. Threads wait awake while they are alone (decision 0009)."""

    context_length: int
    num_slots: int = 4
    num_threads: int = 0
    batch_tokens: int = 128
    cache_ram_mib: int = 0
    stall_seconds: float = 30.0
    prefix_dir: Path | None = None
    prefix_bytes: int = 0
    tuning: LlamaTuning = field(default_factory=lambda: LlamaTuning(spin_count=None, gives_way=True))

    @property
    def threads(self) -> int:
        return self.num_threads or num_cores()

    def prefixes(self, weights: Path) -> Prefixes:
        """Where beginnings of prompts are kept; none of another engine's are ever found there."""
        if self.prefix_dir is None:
            return Prefixes(Path(), "", 0)
        other: dict[str, Any] = dict.fromkeys(_WITHOUT_SHAPE)
        tuning = self.tuning
        kept = (tuning.cache_type, tuning.flash_attention, tuning.is_unified)
        shape = f"xllamacpp {version('xllamacpp')} {replace(self, **other)} {kept}"
        return Prefixes(self.prefix_dir, fingerprint(weights, shape), self.prefix_bytes)


def environment(tuning: LlamaTuning) -> dict[str, str]:
    """Of the child. What the operator says of OpenMP goes before what we think."""
    if tuning.spin_count is None:
        return dict(os.environ)  # uvloop takes nothing else
    waiting = {"GOMP_SPINCOUNT": str(tuning.spin_count)} if tuning.spin_count else {"OMP_WAIT_POLICY": "passive"}
    return {**waiting, **os.environ}
