"""Events of an answer that have no text, known by what they were like before.

Each answer has a few: one that says who speaks, one that says why it ended, one that says what it came to. From one
answer to the next they differ in an id and in numbers, so that what the rest means need not be found out again. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_ID = b'"id":"'
_QUOTE = b'"'
# The value of a key; without a backslash there is no text that only looks like one.
_NUMBER = re.compile(rb'": ?(0|[1-9][0-9]{0,9})(?=[,}])')
_CUT = b"\0"  # not in JSON
_MAX_DIGITS = 9
_BACKSLASH = ord("\\")
MAX_KNOWN = 64


class Said(NamedTuple):
    """What such an event says. `usage`: tokens of the prompt, of those found in the cache (None: not said), and of the
    answer."""

    has_choice: bool
    reason: str | None
    usage: tuple[int, int | None, int] | None


class _Shape(NamedTuple):
    """Which of the numbers are which; -1: there is no such number."""

    has_choice: bool
    reason: str | None
    choice: int
    prompt: int
    cached: int
    completion: int


class OddEvents:
    """Those of one engine."""

    def __init__(self) -> None:
        self._shapes: dict[bytes, _Shape] = {}

    def read(self, event: bytes) -> Said | None:
        """What it says, where one that was like it has been learnt."""
        key, numbers = _apart(event)
        shape = self._shapes.get(key)
        if shape is None or (shape.choice >= 0 and numbers[shape.choice] != b"0"):
            return None
        if shape.prompt < 0:
            return Said(shape.has_choice, shape.reason, None)
        prompt, completion = numbers[shape.prompt], numbers[shape.completion]
        cached = b"0" if shape.cached < 0 else numbers[shape.cached]
        if max(len(prompt), len(completion), len(cached)) > _MAX_DIGITS:
            return None
        usage = int(prompt), None if shape.cached < 0 else int(cached), int(completion)
        return Said(shape.has_choice, shape.reason, usage)

    def learn(self, event: bytes, chunk: Mapping[str, Any]) -> None:
        """`chunk` is what is in it, which was read and had no text."""
        shape = None if _BACKSLASH in event or _CUT in event else _shape(event, chunk)
        if shape is not None:
            if len(self._shapes) >= MAX_KNOWN:
                self._shapes.clear()
            self._shapes[_apart(event)[0]] = shape


def _apart(event: bytes) -> tuple[bytes, Sequence[bytes]]:
    """All but its id and its numbers, and those."""
    before, found, after = event.partition(_ID)
    parts = _NUMBER.split(before + found + after.partition(_QUOTE)[2])
    return _CUT.join(parts[::2]), parts[1::2]


def _shape(event: bytes, chunk: Mapping[str, Any]) -> _Shape | None:
    """None where a number cannot be told by its name."""
    choices, usage = chunk.get("choices") or (), chunk.get("usage") or {}
    if len(choices) > 1 or "timings" in chunk:
        return None
    choice = choices[0] if choices else {}
    names = [part[part.rfind(_QUOTE) + 1 :].decode("latin-1") for part in _apart(event)[0].split(_CUT)[:-1]]

    def place(name: str, among: Mapping[str, Any]) -> int | None:
        """-1 where it is not said, None where it is not to be found."""
        if among.get(name) is None:
            return -1
        return names.index(name) if names.count(name) == 1 else None

    number = place("index", choice)
    prompt, completion = place("prompt_tokens", usage), place("completion_tokens", usage)
    cached = place("cached_tokens", usage.get("prompt_tokens_details") or {})
    if number is None or prompt is None or completion is None or cached is None:
        return None
    if bool(usage) != (prompt >= 0) or bool(usage) != (completion >= 0):
        return None
    reason = choice.get("finish_reason") or None
    if not isinstance(reason, str | None):
        return None
    return _Shape(bool(choices), reason, number, prompt, cached, completion)
