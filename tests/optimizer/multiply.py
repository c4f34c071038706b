"""Products of kernels beside what they are by definition: `python -m tests.optimizer.multiply KERNELS`.

Prints one line of JSON: for each case, what part of the largest value the largest difference is, or null where the
processor has no kernels for it.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.optimizer.loaded import F32, Loaded

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
BLOCK = 32
NUM_RANDOM = 100


@dataclass(frozen=True)
class Case:
    """`is_extreme`: every level the highest, every activation as large as any other."""

    kind: str = "Q4_1"
    size: int = 576
    rows: int = 64
    activations: int = 1
    threads: int = 2
    is_extreme: bool = False


def cases() -> Iterator[Case]:
    for kind in KINDS:
        yield from (Case(kind, activations=number) for number in (*range(1, 10), 64, 65, 68, 131, 200))
        yield from (Case(kind, activations=number, is_extreme=True) for number in (1, 8))
        yield from (Case(kind, size=32, rows=8, activations=number, threads=3) for number in (1, 4))
    chosen = random.Random(1)
    for _ in range(NUM_RANDOM):
        yield Case(
            kind=chosen.choice(list(KINDS)),
            size=BLOCK * chosen.randint(1, 60),
            rows=8 * chosen.randint(1, 40),
            activations=chosen.choice((1, 2, 3, 4, 5, 8, 21, 70)),
            threads=chosen.randint(1, 5),
        )


def weights(case: Case, chosen: np.random.Generator) -> tuple[bytes, NDArray[Any]]:
    """As they are in a file, and as numbers."""
    shape = (case.rows, case.size // BLOCK)
    d = (chosen.random(shape) * 0.1 + 0.001).astype(np.float16)
    if case.kind == "Q8_0":
        q = np.full((*shape, BLOCK), -128) if case.is_extreme else chosen.integers(-128, 128, size=(*shape, BLOCK))
        kept = np.concatenate([d[..., None].view(np.uint8), q.astype(np.int8).view(np.uint8)], axis=-1)
        return kept.tobytes(), (q * d[..., None].astype(float)).reshape(case.rows, case.size)
    m = (-d * 7.3).astype(np.float16) if case.kind == "Q4_1" else (-8 * d.astype(np.float32))
    q = np.full((*shape, BLOCK), 15) if case.is_extreme else chosen.integers(0, 16, size=(*shape, BLOCK))
    halves = [d, m] if case.kind == "Q4_1" else [d]
    packed = (q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4).astype(np.uint8)
    kept = np.concatenate([np.stack(halves, axis=-1).view(np.uint8), packed], axis=-1)
    numbers = q * d[..., None].astype(float) + m[..., None].astype(float)
    return kept.tobytes(), numbers.reshape(case.rows, case.size)


def rounded(activations: NDArray[Any]) -> NDArray[Any]:
    """As Q8_0 keeps them."""
    blocks = activations.reshape(len(activations), -1, BLOCK)
    highest = np.abs(blocks).max(axis=-1, keepdims=True)
    numbers = np.rint(blocks * (np.float32(127) / highest))
    return (numbers * (highest / np.float32(127)).astype(np.float16).astype(float)).reshape(activations.shape)


def multiplied(loaded: Loaded, case: Case, kept: bytes, activations: NDArray[Any]) -> NDArray[Any] | None:
    """By the kernels that are for such weights, if there are any for this processor."""
    with loaded.context(0, is_empty=True) as place, loaded.context(16 * activations.size) as context:
        sizes = [ctypes.c_int64(case.size), ctypes.c_int64(case.rows)]
        matrix = loaded.call("ggml_new_tensor_2d", place, ctypes.c_int(KINDS[case.kind]), *sizes)
        buffer = loaded.call("ggml_backend_alloc_ctx_tensors_from_buft", place, repacked(loaded))
        assert buffer
        out = loaded.call("ggml_mul_mat", context, matrix, loaded.tensor(context, F32, activations))
        found = None
        if loaded.call("ggml_backend_dev_supports_op", loaded.device, out) & 1:
            loaded.call("ggml_backend_tensor_set", matrix, kept, ctypes.c_size_t(0), ctypes.c_size_t(len(kept)))
            found = loaded.computed(context, out, (case.activations, case.rows), case.threads)
        loaded.call("ggml_backend_buffer_free", buffer)
        return found


def repacked(loaded: Loaded) -> int:
    """The type of buffer in which weights are kept as the kernels want them."""
    place = loaded.call_registered(b"ggml_backend_dev_get_extra_bufts", loaded.device)
    for kind in (ctypes.c_void_p * 8).from_address(place):
        if kind is None:
            break
        name = ctypes.string_at(loaded.call("ggml_backend_buft_name", kind))
        if name == b"CPU_REPACK":
            return int(kind)
    raise LookupError("CPU_REPACK")


def difference(loaded: Loaded, case: Case, chosen: np.random.Generator) -> float | None:
    """The largest, of the largest value. None where there are no kernels for it."""
    kept, numbers = weights(case, chosen)
    activations = chosen.normal(size=(case.activations, case.size)).astype(np.float32)
    if case.is_extreme:
        activations = np.abs(activations) / np.abs(activations) * 3
    found = multiplied(loaded, case, kept, activations)
    if found is None:
        return None
    right = rounded(activations) @ numbers.T
    assert np.isfinite(found).all(), case
    return float(np.abs(found - right).max() / np.abs(right).max())


def main() -> None:
    loaded, chosen = Loaded(Path(sys.argv[1])), np.random.default_rng(1)
    print(json.dumps([{**asdict(case), "difference": difference(loaded, case, chosen)} for case in cases()]))


if __name__ == "__main__":
    main()
