"""Events of an answer that have no text, known by what they were like before.

Each answer has a few: one that says who speaks, one that says why it ended, one that says what it came to. From one
answer to the next they differ in an id and in numbers, so that what the rest means need not be found out again. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_ID = b'"id":"'
_QUOTE = b'"'
_DIGITS = b"0123456789"
# The value of a key; without a backslash there is no text that only looks like one.
_NUMBER = re.compile(rb'(": ?)(?:0|[1-9][0-9]*)(?=[,}])')
_ANY_NUMBER = b"(0|[1-9][0-9]{0,9})"
_MAX_DIGITS = 9
_BACKSLASH = ord("\\")
MAX_KNOWN = 64
MAX_LEARNT = 256  # in all: to learn one takes a millisecond, and an engine may never say the same twice


class Said(NamedTuple):
    """What such an event says. `usage`: tokens of the prompt, of those found in the cache (None: not said), and of the
    answer."""

    has_choice: bool
    reason: str | None
    usage: tuple[int, int | None, int] | None


class _Shape(NamedTuple):
    """`pattern` is all of it, its numbers in groups: which of them are which, from 1 on; 0: there is no such number."""

    pattern: re.Pattern[bytes]
    has_choice: bool
    reason: str | None
    choice: int
    prompt: int
    cached: int
    completion: int


class OddEvents:
    """Those of one engine."""

    def __init__(self) -> None:
        self._shapes: dict[bytes, _Shape] = {}  # by what they are without digits
        self._num_left = MAX_LEARNT

    def read(self, event: bytes) -> Said | None:
        """What it says, where one that was like it has been learnt."""
        event = _without_id(event)
        shape = self._shapes.get(event.translate(None, _DIGITS))
        found = None if shape is None else shape.pattern.fullmatch(event)
        if shape is None or found is None or (shape.choice and found[shape.choice] != b"0"):
            return None
        if not shape.prompt:
            return Said(shape.has_choice, shape.reason, None)
        prompt, completion, cached = found[shape.prompt], found[shape.completion], found[shape.cached]
        if max(len(prompt), len(completion)) > _MAX_DIGITS or (shape.cached and len(cached) > _MAX_DIGITS):
            return None
        usage = int(prompt), int(cached) if shape.cached else None, int(completion)
        return Said(shape.has_choice, shape.reason, usage)

    def learn(self, event: bytes, chunk: Mapping[str, Any]) -> None:
        """`chunk` is what is in it, which was read and had no text."""
        if self._num_left and _BACKSLASH not in event:
            self._num_left -= 1
            event = _without_id(event)
            shape = _shape(event, chunk)
            if shape is not None and len(self._shapes) < MAX_KNOWN:
                self._shapes[event.translate(None, _DIGITS)] = shape


def _without_id(event: bytes) -> bytes:
    before, found, after = event.partition(_ID)
    return before + found + after.partition(_QUOTE)[2]


def _shape(event: bytes, chunk: Mapping[str, Any]) -> _Shape | None:
    """None where a number cannot be told by its name."""
    choices, usage = chunk.get("choices") or (), chunk.get("usage") or {}
    reason = choices[0].get("finish_reason") or None if choices else None
    if len(choices) > 1 or "timings" in chunk or not isinstance(reason, str | None):
        return None
    parts = _NUMBER.split(event)  # what is between numbers, each with the end of its key behind it
    names = [part[part.rfind(_QUOTE) + 1 :].decode("latin-1") for part in parts[:-1:2]]

    def place(name: str, among: Mapping[str, Any]) -> int | None:
        """0 where it is not said, None where it is not to be found."""
        if among.get(name) is None:
            return 0
        return names.index(name) + 1 if names.count(name) == 1 else None

    choice = place("index", choices[0] if choices else {})
    prompt, completion = place("prompt_tokens", usage), place("completion_tokens", usage)
    cached = place("cached_tokens", usage.get("prompt_tokens_details") or {})
    if choice is None or prompt is None or completion is None or cached is None:
        return None
    if bool(usage) != bool(prompt) or bool(usage) != bool(completion):
        return None
    pattern = b"".join(re.escape(part) + (_ANY_NUMBER if number % 2 else b"") for number, part in enumerate(parts))
    return _Shape(re.compile(pattern), bool(choices), reason, choice, prompt, cached, completion)
