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
_ANY_NUMBER, _COUNT = b"(?:0|[1-9][0-9]*)", b"(0|[1-9][0-9]{0,8})"
_BACKSLASH = ord("\\")
MAX_KNOWN = 64
MAX_LEARNT = 256  # in all: to learn one takes a millisecond, and an engine may never say the same twice

# Whether it has a choice, why that ended, and the tokens that it says: of the prompt, of those found in the cache
# (None: not said), of the answer, and of those that are reasoning (None: not said).
Said = tuple[bool, str | None, tuple[int, int | None, int, int | None] | None]


class _Shape(NamedTuple):
    """`pattern` is all of it, the numbers of tokens in groups: which of them are which; 0: there is no such number."""

    pattern: re.Pattern[bytes]
    has_choice: bool
    reason: str | None
    prompt: int
    cached: int
    completion: int
    reasoning: int


class OddEvents:
    """Those of one engine."""

    def __init__(self) -> None:
        self._shapes: dict[bytes, _Shape] = {}  # by what they are without digits
        self._num_left = MAX_LEARNT

    def read(self, event: bytes) -> Said | None:
        """What it says, where one that was like it has been learnt."""
        event = _without_id(event)
        shape = self._shapes.get(event.translate(None, _DIGITS))
        if shape is None:
            return None
        pattern, has_choice, reason, prompt, cached, completion, reasoning = shape
        found = pattern.fullmatch(event)
        if found is None:
            return None
        if not prompt:
            return has_choice, reason, None
        num_cached = int(found[cached]) if cached else None
        num_thought = int(found[reasoning]) if reasoning else None
        return has_choice, reason, (int(found[prompt]), num_cached, int(found[completion]), num_thought)

    def learn(self, event: bytes, chunk: Mapping[str, Any]) -> None:
        """`chunk` is what is in it, which was read and had no text."""
        if self._num_left and _BACKSLASH not in event:
            self._num_left -= 1
            event = _without_id(event)
            shape = _shape(event, chunk)
            if shape is not None and len(self._shapes) < MAX_KNOWN:
                self._shapes[event.translate(None, _DIGITS)] = shape


def _without_id(event: bytes) -> bytes:
    start = event.find(_ID) + len(_ID)
    end = event.find(_QUOTE, start)
    return event if start < len(_ID) or end < 0 else event[:start] + event[end + 1 :]


def _shape(event: bytes, chunk: Mapping[str, Any]) -> _Shape | None:
    """None where a number cannot be told by its name."""
    choices, usage = chunk.get("choices") or (), chunk.get("usage") or {}
    choice = choices[0] if choices else {}
    reason = choice.get("finish_reason") or None
    if len(choices) > 1 or "timings" in chunk or not isinstance(reason, str | None):
        return None
    parts = _NUMBER.split(event)  # what is between numbers, each with the end of its key behind it
    names = [part[part.rfind(_QUOTE) + 1 :].decode("latin-1") for part in parts[:-1:2]]
    of_prompt, of_answer = (usage.get(f"{which}_tokens_details") or {} for which in ("prompt", "completion"))
    if not isinstance(of_answer, Mapping):
        return None
    said = {
        "index": choice,
        "prompt_tokens": usage,
        "cached_tokens": of_prompt,
        "completion_tokens": usage,
        "reasoning_tokens": of_answer,
    }
    wanted = [name for name, among in said.items() if among.get(name) is not None]
    if any(names.count(name) != 1 for name in wanted):
        return None
    if usage and not {"prompt_tokens", "completion_tokens"}.issubset(wanted):
        return None
    counts = [name for name in names if name in wanted and name != "index"]
    pattern = re.escape(parts[0])
    for name, colon, part in zip(names, parts[1::2], parts[2::2], strict=True):
        number = b"0" if name == "index" in wanted else _COUNT if name in counts else _ANY_NUMBER
        pattern += colon + number + re.escape(part)
    places = [counts.index(name) + 1 if name in counts else 0 for name in said][1:]
    return _Shape(re.compile(pattern), bool(choices), reason, *places)
