"""Samplers of kernels beside the engine's own: `python -m tests.optimizer.sample KERNELS`.

Prints one line of JSON: for each case of `dist`, the share of draws that were the same with the same seed; for each of
`top_p`, by how many tokens the nuclei differ; and how many of the engine's samplers are replaced.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.optimizer.loaded import Loaded

SIZES = (1, 2, 255, 256, 257, 1_000, 1_025, 49_152)
NUM_DRAWS = 200
_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class _Candidates(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("is_sorted", ctypes.c_bool),
    )


class Samplers:
    """Of the engine, and those that take their place."""

    def __init__(self, path: Path) -> None:
        self._loaded = Loaded(path)
        self._kernels = ctypes.CDLL(str(path))
        self.num_replaced = self._kernels.replace_calls()

    @contextmanager
    def both(self, name: str, *arguments: Any) -> Iterator[tuple[int, int]]:
        fast = getattr(self._kernels, f"fast_{name}")
        fast.restype = ctypes.c_void_p
        made = self._loaded.call(f"llama_sampler_init_{name}", *arguments), fast(*arguments)
        try:
            yield made
        finally:
            for each in made:
                self._loaded.call("llama_sampler_free", each)

    def applied(self, sampler: int, logits: NDArray[Any], *, is_sorted: bool = False) -> tuple[int, NDArray[Any]]:
        """The position of what is selected, and the candidates that are left."""
        tokens = np.zeros(len(logits), _TOKEN)
        tokens["id"], tokens["logit"] = np.arange(len(logits)), logits
        candidates = _Candidates(tokens.ctypes.data, len(tokens), -1, is_sorted)
        self._loaded.call("llama_sampler_apply", sampler, ctypes.byref(candidates))
        return candidates.selected, tokens[: candidates.size]

    def call(self, name: str, sampler: int) -> int:
        return self._loaded.call(name, sampler)

    def seed(self, sampler: int) -> int:
        self._kernels.fast_seed.restype = ctypes.c_uint32
        return int(self._kernels.fast_seed(ctypes.c_void_p(sampler)))


def logits_of(size: int, spread: float, chosen: np.random.Generator) -> NDArray[Any]:
    """As a model has them, some of them forbidden."""
    logits = (chosen.normal(size=size) * spread).astype(np.float32)
    logits[chosen.random(size) < 0.1] = -np.inf
    logits[chosen.integers(size)] = 2 * spread
    return logits


def probabilities(logits: NDArray[Any]) -> NDArray[Any]:
    weights = np.exp(logits.astype(float) - logits.max())
    return weights / weights.sum()


def draws(samplers: Samplers, size: int, spread: float, chosen: np.random.Generator) -> dict[str, Any]:
    logits = logits_of(size, spread, chosen)
    with samplers.both("dist", ctypes.c_uint32(7)) as made:
        found = [[samplers.applied(each, logits)[0] for _ in range(NUM_DRAWS)] for each in made]
        _, left = samplers.applied(made[1], logits)
        samplers.call("llama_sampler_reset", made[1])
        again = [samplers.applied(made[1], logits)[0] for _ in range(NUM_DRAWS // 2)]
        clone = samplers.call("llama_sampler_clone", made[1])
        cloned = [samplers.applied(clone, logits)[0] for _ in range(NUM_DRAWS // 2)]
        samplers.call("llama_sampler_free", clone)
        return {
            "size": size,
            "spread": spread,
            "same": float(np.mean(np.equal(*found))),
            "forbidden": sum(not np.isfinite(logits[each]) for each in found[1]),
            "difference": float(np.abs(left["p"] - probabilities(logits)).max()),
            "repeats": again + cloned == found[1],
            "seed": samplers.seed(made[1]),
        }


def nuclei(samplers: Samplers, size: int, spread: float, p: float, chosen: np.random.Generator) -> dict[str, Any]:
    logits = logits_of(size, spread, chosen)
    is_sorted = bool(chosen.integers(2))
    if is_sorted:
        logits = np.sort(logits)[::-1].copy()
    min_keep = int(chosen.integers(4))
    with samplers.both("top_p", ctypes.c_float(p), ctypes.c_size_t(min_keep)) as made:
        own, fast = (samplers.applied(each, logits, is_sorted=is_sorted)[1] for each in made)
        shared = min(len(own), len(fast))
        expected = probabilities(logits)[fast["id"]]
        return {
            "size": size,
            "spread": spread,
            "p": p,
            "kept": len(fast),
            "differ": abs(len(own) - len(fast)),
            "same": bool((own["logit"][:shared] == fast["logit"][:shared]).all()),
            "difference": float(np.abs(fast["p"] - expected).max()) if p < 1 else 0.0,  # at 1 nothing is computed
        }


def without_numbers(samplers: Samplers, value: float) -> dict[str, Any]:
    """What is left, and drawn, where a grammar forbids every token, or a model computes none."""
    logits = np.full(1_000, value, np.float32)
    with samplers.both("top_p", ctypes.c_float(0.9), ctypes.c_size_t(0)) as made:
        left = [len(samplers.applied(each, logits)[1]) for each in made]
    with samplers.both("dist", ctypes.c_uint32(7)) as made:
        drawn = [samplers.applied(each, logits)[0] for each in made]
    return {"value": str(value), "left": left, "drawn": drawn}


def main() -> None:
    samplers, chosen = Samplers(Path(sys.argv[1])), np.random.default_rng(1)
    spreads = (0.5, 2.0, 6.0)
    found = {
        "replaced": samplers.num_replaced,
        "draws": [draws(samplers, size, spread, chosen) for size in SIZES for spread in spreads],
        "nuclei": [
            nuclei(samplers, size, spread, p, chosen)
            for size in SIZES
            for spread in spreads
            for p in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
        ],
        "without numbers": [without_numbers(samplers, value) for value in (-np.inf, np.nan)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
