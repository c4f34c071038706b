"""Regular expressions of texts, as ECMA-262 means them. Knows nothing of schemas, nor of engines.

Look-ahead and boundaries of words are left out: what remains takes all that they would. What else cannot be said by
classes, sequences, choices and repetitions is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_DEPTH = 90  # of groups; llama.cpp follows none with more than a hundred
_LARGEST = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)
_REPEATED = re.compile(r"(?:([*+?])|\{([0-9]{1,9})(?:(,)([0-9]{1,9})?)?\})\??")
TIMES: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_GROUP = re.compile(r"\?(?::|P?<[A-Za-z_]\w*>|(<?[=!]))")
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})")
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
Ranges = tuple[tuple[int, int], ...]
_HYPHEN = (45, 45)
_DIGITS: Ranges = ((48, 57),)
_WORDS: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACES: Ranges = (
    *((9, 13), (32, 32), (160, 160), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
)
_ENDS_OF_LINES: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))


class Unreadable(ValueError):
    """The pattern cannot be offered to an engine; the text says why."""


class Unknown(Exception):
    """There is something else in it, or it is none."""


@dataclass(frozen=True, slots=True)
class Characters:
    """One character of these."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Choice:
    branches: list[Part]


@dataclass(frozen=True, slots=True)
class Repeated:
    """`most` is None where there is no bound."""

    part: Part
    least: int
    most: int | None


Part = Characters | Sequence | Choice | Repeated
_NOTHING = Sequence([])


class Expression:
    """One as it is read, from the left."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = self._depth = self._num_ahead = 0

    def branches(self) -> list[tuple[bool, bool, Part]]:
        """Those of the whole: whether it begins at the text's beginning, and ends at its end. Raises Unreadable and
        Unknown."""
        found = []
        while True:
            begins = self._takes("^")
            part = self._sequence()
            ends = self._takes("$")
            found.append((begins, ends, part))
            if not self._takes("|"):
                break
        if self._at < len(self._pattern):
            raise Unknown
        return found

    def _takes(self, character: str) -> bool:
        is_there = self._pattern.startswith(character, self._at)
        self._at += is_there
        return is_there

    def _sequence(self) -> Part:
        """Up to what cannot be of it."""
        parts: list[Part] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)^$":
            times = _REPEATED.match(self._pattern, self._at)
            if times is None:
                parts.append(self._part(self._next()))
                continue
            if not parts or isinstance(parts[-1], Repeated):
                raise Unknown
            self._at = times.end()
            parts.append(Repeated(parts.pop(), *_times(times)))
        return parts[0] if len(parts) == 1 else Sequence(parts)

    def _next(self) -> str:
        self._at += 1
        return self._pattern[self._at - 1 : self._at]

    def _part(self, character: str) -> Part:
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == ".":
            return Characters(others(_ENDS_OF_LINES))
        if character == "{":
            raise Unknown
        if character == "\\" and self._pattern.startswith(("b", "B"), self._at):
            self._at += 1
            return _NOTHING
        return Characters(self._ranges(character))

    def _group(self) -> Part:
        kind = _GROUP.match(self._pattern, self._at)
        if kind is None and self._pattern.startswith("?", self._at):
            raise Unknown
        self._at = kind.end() if kind else self._at
        is_ahead = kind is not None and kind[1] is not None
        self._depth += 1
        self._num_ahead += is_ahead
        if self._depth > _MAX_DEPTH:
            raise Unknown
        branches = [self._branch()]
        while self._takes("|"):
            branches.append(self._branch())
        if not self._takes(")"):
            raise Unknown if ")" in self._pattern[self._at :] else Unreadable("a group in it has no end")
        self._depth -= 1
        self._num_ahead -= is_ahead
        return _NOTHING if is_ahead else Choice(branches)

    def _branch(self) -> Part:
        """Of a group; anchors do not matter in one that is left out."""
        if self._num_ahead:
            self._takes("^")
        part = self._sequence()
        if self._num_ahead:
            self._takes("$")
        return part

    def _class(self) -> Characters:
        start = self._at - 1
        is_negated = self._takes("^")
        ranges: list[tuple[int, int]] = []
        while (character := self._next()) != "]" or self._at == start + 2 + is_negated:
            found = self._ranges(character, in_class=True)
            if self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at):
                self._at += 1
                last = self._ranges(self._next(), in_class=True)
                if _is_one(found) and _is_one(last):
                    found = ((found[0][0], last[0][1]),)
                else:  # beside a class it stands for itself
                    found += (_HYPHEN, *last)
            ranges += found
        taken = tuple(each for each in ranges if each[0] <= each[1])
        if not (taken := others(taken) if is_negated else taken):
            raise Unreadable(f"no character can stand for {self._pattern[start : self._at]}")
        return Characters(taken)

    def _ranges(self, character: str, *, in_class: bool = False) -> Ranges:
        """What a character stands for, with what follows it where that is needed."""
        if character == "" or (in_class and character == "]"):
            raise Unknown
        if character != "\\":
            return ((ord(character), ord(character)),)
        if number := _HEX.match(self._pattern, self._at):
            self._at = number.end()
            code = int(number[number.lastindex or 0], 16)
        else:
            character = self._next()
            kind = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}.get(character.lower())
            if kind is not None:
                return kind if character.islower() else others(kind)
            code = 8 if in_class and character == "b" else _CONTROLS.get(character, -1)
            if code < 0 and character and not character.isalnum():
                code = ord(character)
        if code not in range(_LARGEST + 1) or code in _SURROGATES:
            raise Unknown
        return ((code, code),)


def _is_one(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def _times(times: re.Match[str]) -> tuple[int, int | None]:
    """Raises Unreadable."""
    if times[1]:
        return TIMES[times[1]]
    least = int(times[2])
    most = least if not times[3] else int(times[4]) if times[4] else None
    if most is not None and most < least:
        raise Unreadable(f"{times[0]} has its larger bound first")
    return least, most


def others(ranges: Ranges) -> Ranges:
    """All characters but these."""

    def gaps() -> Iterator[tuple[int, int]]:
        start = 0
        for first, last in sorted(ranges):
            if first > start:
                yield start, first - 1
            start = max(start, last + 1)
        if start <= _LARGEST:
            yield start, _LARGEST

    return tuple(gaps())
