"""Quantities as a person writes them at the command line; for what is none it is said what would be one."""

from __future__ import annotations

import argparse
import math

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def seconds(text: str) -> float:
    return _number(text, 1, 86_400, "seconds")


def nats(text: str) -> float:
    return _number(text, 0, 100, "nats")


def _number(text: str, least: float, most: float, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {least} to {most} {unit}, not {text!r:.20}")
    return value


def num_bytes(text: str) -> int:
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        value = float(number.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        value = 0.0
    if not 1 << 20 <= value < 1 << 60:
        raise argparse.ArgumentTypeError(f"expected a size as 900M or 4G, not {text!r:.20}")
    return int(value)
