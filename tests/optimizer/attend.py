"""Attention of kernels beside what it is by definition: `python -m tests.optimizer.attend KERNELS`.

Prints one line of JSON: for each case, how far the largest difference is from the largest value.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.optimizer.loaded import F16, F32, Loaded

NUM_RANDOM = 150


@dataclass(frozen=True)
class Case:
    streams: int = 1
    groups: int = 3
    heads_per_group: int = 3
    positions: int = 1
    keys: int = 64
    key_size: int = 64
    value_size: int = 64
    max_bias: float = 0.0
    softcap: float = 0.0
    threads: int = 2
    sequences: int = 0  # that share the keys, and whose positions follow each other; 0: a stream is one
    is_foul: bool = False  # some keys and values that others see are no numbers


def cases() -> Iterator[Case]:
    for streams, positions, keys in itertools.product((1, 2, 8), (1, 9, 70), (16, 272, 1040)):
        yield Case(streams=streams, positions=positions, keys=keys)
    yield from (Case(streams=3, positions=1, keys=2048, threads=threads) for threads in (1, 2, 3, 5))
    for sequences, positions, keys in itertools.product((2, 8, 9), (9, 29, 140), (64, 272, 2048)):
        yield Case(sequences=sequences, positions=positions, keys=keys)
    for sequences, positions, keys in itertools.product((2, 8), (2, 9, 140), (64, 272)):
        yield Case(sequences=sequences, positions=positions, keys=keys, is_foul=True)
    chosen = random.Random(1)
    for _ in range(NUM_RANDOM):
        yield Case(
            streams=chosen.randint(1, 5),
            groups=chosen.choice((1, 2, 3, 8)),
            heads_per_group=chosen.choice((1, 2, 3, 4, 7)),
            positions=chosen.choice((1, 1, 2, 5, 21, 63, 64, 65, 140)),
            keys=16 * chosen.randint(1, 30),
            key_size=chosen.choice((16, 64, 80, 128)),
            value_size=chosen.choice((16, 64, 80, 128)),
            threads=chosen.randint(1, 4),
            sequences=chosen.choice((0, 0, 1, 3, 5)),
        )


def left_to_llama_cpp() -> Iterator[Case]:
    yield from (Case(keys=100, positions=9), Case(key_size=72, value_size=72), Case(softcap=20.0), Case(max_bias=8.0))


def attended(
    loaded: Loaded, case: Case, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], masks: Sequence[NDArray[Any]]
) -> list[NDArray[Any]]:
    """With each of the masks, in two layers that must not differ: what is known of a mask is good for one graph."""
    with loaded.context(8 * (q.size * 4 + k.size + v.size + masks[0].size)) as context:
        order = [ctypes.c_int(each) for each in (0, 2, 1, 3)]  # as llama.cpp has them: heads of a position together
        turned = [
            loaded.call("ggml_permute", context, loaded.tensor(context, kind, values), *order)
            for kind, values in ((F32, q), (F16, k), (F16, v))
        ]
        numbers = (1 / case.key_size**0.5, case.max_bias, case.softcap)
        scale, max_bias, softcap = (ctypes.c_float(each) for each in numbers)
        masked = loaded.tensor(context, F16, masks[0])
        loaded.call("ggml_set_input", masked)
        layers = [
            loaded.call("ggml_flash_attn_ext", context, *turned, masked, scale, max_bias, softcap) for _ in range(2)
        ]
        shape = (case.streams, case.positions, case.groups * case.heads_per_group, case.value_size)
        found = []
        for mask in masks:
            loaded.fill(masked, mask)
            first, second = loaded.all_computed(context, layers, shape, case.threads)
            assert np.array_equal(first, second, equal_nan=True), case
            found.append(second)
        return found


def difference(loaded: Loaded, case: Case, chosen: np.random.Generator) -> float:
    """The largest, of the largest value."""
    heads = case.groups * case.heads_per_group
    q = chosen.normal(size=(case.streams, case.positions, heads, case.key_size)).astype(np.float32) * 2
    k = chosen.normal(size=(case.streams, case.keys, case.groups, case.key_size)).astype(np.float16)
    v = chosen.normal(size=(case.streams, case.keys, case.groups, case.value_size)).astype(np.float16)
    masks = [(mask_of_sequences if case.sequences else mask_of_streams)(case, chosen) for _ in range(2)]
    if case.is_foul:
        return difference_beside_foul(loaded, case, q, k, v, masks[0])
    differences = []
    for mask, found in zip(masks, attended(loaded, case, q, k, v, masks), strict=True):
        right = by_definition(case, q.astype(float), k.astype(float), v.astype(float), mask.astype(float))
        assert np.isfinite(found).all(), case
        differences.append(float(np.abs(found - right).max() / np.abs(right).max()))
    return max(differences)


def difference_beside_foul(
    loaded: Loaded, case: Case, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: NDArray[Any]
) -> float:
    """Of the positions that see nothing that is no number."""
    is_seen = np.isfinite(mask[0, 0])
    foul = np.flatnonzero(~is_seen[0])[::3]
    is_clean = ~is_seen[:, foul].any(axis=1)
    right = by_definition(case, q.astype(float), k.astype(float), v.astype(float), mask.astype(float))
    differences = []
    for place, number in itertools.product((k, v), (np.nan, np.inf)):
        before = place[:, foul].copy()
        place[:, foul] = number
        found = attended(loaded, case, q, k, v, [mask])[0]
        place[:, foul] = before
        assert np.isfinite(found[:, is_clean]).all(), case
        differences.append(float(np.abs(found - right)[:, is_clean].max() / np.abs(right).max()))
    return max(differences)


def mask_of_streams(case: Case, chosen: np.random.Generator) -> NDArray[Any]:
    """What positions do not see: what comes later, here and there a key, in some streams whole tiles."""
    last = chosen.integers(0, case.keys, size=(case.streams, 1, 1, 1)) + np.arange(case.positions)[:, None]
    is_hidden = (np.arange(case.keys) > last) | (chosen.random((case.streams, 1, case.positions, case.keys)) < 0.1)
    is_hidden[..., : case.keys // 2] |= (chosen.random((case.streams, 1, 1, 1)) < 0.2) & (case.streams > 1)
    is_hidden[:, :, -1:, 0] = False
    return np.where(is_hidden, -np.inf, 0.0).astype(np.float16)


def mask_of_sequences(case: Case, chosen: np.random.Generator) -> NDArray[Any]:
    """A position sees what its sequence has of the keys: a third that all have, runs of its own, and what lies
    scattered among the others'. Some keys are nobody's, some positions see nothing."""
    sequences, keys = case.sequences, np.arange(case.keys)
    of_position = np.sort(chosen.integers(0, sequences, size=case.positions))
    runs = np.repeat(chosen.integers(-1, sequences, size=case.keys // 16 + 1), 16)[: case.keys]
    scattered = chosen.integers(-1, sequences, size=case.keys)
    owner = np.where(keys < 2 * case.keys // 3, runs, scattered)
    is_seen = (owner == of_position[:, None]) | (keys < case.keys // 3)
    is_seen[chosen.random(case.positions) < 0.05] = False
    is_seen[-1, 0] = True
    mask = np.where(is_seen, 0.0, -np.inf).astype(np.float16)
    return np.broadcast_to(mask, (case.streams, 1, case.positions, case.keys))


def by_definition(case: Case, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    k, v = (np.repeat(each, case.heads_per_group, axis=2) for each in (k, v))
    scores = np.einsum("sphd,skhd->shpk", q, k) / case.key_size**0.5
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if case.max_bias:
        mask = mask * slopes(case)[:, None, None]
    scores = scores + mask
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0.0))
    sums = weights.sum(axis=-1, keepdims=True)
    return np.einsum("shpk,skhd->sphd", weights / np.where(sums == 0, 1.0, sums), v)


def slopes(case: Case) -> NDArray[Any]:
    heads = case.groups * case.heads_per_group
    whole = 1 << (heads.bit_length() - 1)
    first, second = 2.0 ** (-case.max_bias / whole), 2.0 ** (-case.max_bias / 2 / whole)
    return np.array([first ** (h + 1) if h < whole else second ** (2 * (h - whole) + 1) for h in range(heads)])


def main() -> None:
    loaded, chosen = Loaded(Path(sys.argv[1])), np.random.default_rng(1)
    ours = [{**asdict(case), "difference": difference(loaded, case, chosen)} for case in cases()]
    theirs = [{**asdict(case), "difference": difference(loaded, case, chosen)} for case in left_to_llama_cpp()]
    print(json.dumps({"ours": ours, "llama.cpp's": theirs}))


if __name__ == "__main__":
    main()
