"""Formats of evenly spaced levels (Q4_0, Q4_1, Q5_0, Q5_1) as Q8_0, without the loss of rounding twice.

Such a block has the numbers `d q + m`, q from 0 to 15 or 31. Q8_0 has `D p`, p from -127 to 127. With `D = d / k` for a
whole k all of them fall on the grid at once where `m k / d` is near a whole number, and of the k that fit the best is
taken: exact where m is a multiple of d (Q4_0, Q5_0), else half the error that rounding each number leaves. Knows
nothing of files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octoai.optimizer.ggml import converted, formats

_HALF, _WORDS, _NIBBLES = ("d", "<f2"), ("high", "<u4"), ("low", "u1", (16,))
_LAYOUTS = {
    "Q4_0": np.dtype([_HALF, _NIBBLES]),
    "Q4_1": np.dtype([_HALF, ("m", "<f2"), _NIBBLES]),
    "Q5_0": np.dtype([_HALF, _WORDS, _NIBBLES]),
    "Q5_1": np.dtype([_HALF, ("m", "<f2"), _WORDS, _NIBBLES]),
}
_Q8_0 = np.dtype([_HALF, ("p", "i1", (32,))])
_MAX_STEP = 16  # 254 / 15: more steps between two levels do not fit

Floats = npt.NDArray[np.float32]


def is_affine(name: str) -> bool:
    return name in _LAYOUTS


def as_q8_0(rows: bytearray, name: str) -> bytes:
    """Whole blocks of the format of that name, as Q8_0."""
    blocks = np.frombuffer(rows, _LAYOUTS[name])
    num_levels = 32 if name.startswith("Q5") else 16
    spacing = blocks["d"].astype(np.float32)
    lowest = blocks["m"].astype(np.float32) if name.endswith("_1") else -num_levels / 2 * spacing
    step, first, fits = _grids(spacing, lowest, num_levels)
    made = np.zeros(len(blocks), _Q8_0)
    made["d"] = spacing / step
    made["p"] = (_levels(blocks) * step[:, None] + first[:, None]).astype(np.int8)
    if not fits.all():
        rest = bytearray(blocks[~fits].tobytes())
        rounded = converted(rest, formats()[name], formats()["Q8_0"], formats()[name].block_length)
        made[~fits] = np.frombuffer(rounded, _Q8_0)
    return made.tobytes()


def _levels(blocks: npt.NDArray[np.void]) -> Floats:
    """The q of every number, (blocks, 32)."""
    low = blocks["low"]
    levels = np.concatenate([low & 15, low >> 4], axis=1)
    if blocks.dtype.names is not None and "high" in blocks.dtype.names:
        bits = blocks["high"][:, None] >> np.arange(32, dtype=np.uint32) & 1
        levels = levels | (bits << 4).astype(np.uint8)
    return levels.astype(np.float32)


def _grids(spacing: Floats, lowest: Floats, num_levels: int) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """For every block the number of steps between two levels, where the lowest level is, in steps, and whether there
    is any such grid; the one of least expected square error where each level is as likely as any other."""
    last = num_levels - 1
    steps = np.arange(1, _MAX_STEP + 1, dtype=np.float32)[:, None]
    with np.errstate(all="ignore"):  # a block of equal numbers has no spacing: nothing fits
        width = (spacing / steps).astype(np.float16).astype(np.float32)
        first = np.rint(lowest / width)
        slope, shift = width * steps - spacing, width * first - lowest
        error = slope**2 * (last * (2 * last + 1) / 6) + slope * shift * last + shift**2
        outside = (np.abs(first) > 127) | (np.abs(first + last * steps) > 127) | ~np.isfinite(error)
    error[outside] = np.inf
    best, position = error.argmin(axis=0), np.arange(len(spacing))
    fits = np.isfinite(error[best, position])
    return steps[best, 0], np.where(fits, first[best, position], 0), fits
