"""In how many ways the patterns of a schema can be read: an engine follows all of them, for every token there is.

`^(a?){100}$` reads "aaaaa" in 75 million ways, `^([+]?[0-9]?[ -]?){20}$` a number with some dashes in thousands: each
held llama.cpp up for 20 s. A pattern is read as llama.cpp reads it; where there is something in it that llama.cpp does
not know (look-ahead, `\\w`) it takes any text, in one way. Knows nothing of schemas.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import compress

LONGEST_TOKEN = 12  # characters; those that are longer are rare, and the longest are of one kind of them
MAX_READINGS = 2**LONGEST_TOKEN
MAX_LINKS = 40_000  # to follow them takes a quarter of a second, in which nobody else is served
_LINKS_TO_BEGIN = 30  # a pattern takes as long as so many, whatever is in it
_ENOUGH = 2 * LONGEST_TOKEN  # copies of what is repeated: more of them offer nothing else to a token
_UNBOUNDED = 2000  # llama.cpp takes a larger bound for none

# Characters as bits: those of ASCII, and one for all others. No text holds the first, which ends it.
_OTHER = 128
_ANY = 2 ** (_OTHER + 1) - 2
_DOT = _ANY & ~(1 << ord("\n") | 1 << ord("\r"))
_QUOTE = 1 << ord('"')
_LARGEST = 0x10FFFF

# As C reads numbers: spaces before them do not matter, nor what is behind.
_BOUNDS = re.compile(r"\{\s*+\+?+([0-9]*+)[^,}]*+(?:(,)\s*+\+?+([0-9]*+)[^}]*+)?+\}")
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})")
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r"}
_ESCAPED_ANYWHERE = '\\"[]-' + "".join(_CONTROLS)  # of others llama.cpp knows none
_ESCAPED = _ESCAPED_ANYWHERE + "^$.()|{}*+?"


class Unreadable(ValueError):
    """The pattern cannot be offered to an engine; the text says why."""


class _Unknown(Exception):
    """With this in it, llama.cpp takes any text for the pattern."""


@dataclass(frozen=True, slots=True)
class _Characters:
    """One character of these."""

    bits: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: list[_Part]


@dataclass(frozen=True, slots=True)
class _Choice:
    branches: list[_Part]


@dataclass(frozen=True, slots=True)
class _Repeated:
    """`most` is None where there is no bound."""

    part: _Part
    least: int
    most: int | None


_Part = _Characters | _Sequence | _Choice | _Repeated


class _Text:
    """A pattern as it is read, from the left. Raises Unreadable and _Unknown."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def choice(self) -> _Choice:
        """Up to the end, or to the parenthesis that closes it."""
        parts: list[_Part] = []
        branches: list[_Part] = [_Sequence(parts)]
        while self._at < len(self._pattern) and (character := self._next()) != ")":
            if character == "|":
                parts = []
                branches.append(_Sequence(parts))
            elif character in "*+?" and parts:
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
                parts.append(_Repeated(parts.pop(), least, most))
            elif character == "{" and parts and (bounds := _BOUNDS.match(self._pattern, self._at - 1)):
                self._at = bounds.end()
                parts.append(_Repeated(parts.pop(), *_times(bounds)))
            elif character not in "^$":
                parts.append(self._part(character))
        return _Choice(branches)

    def _next(self) -> str:
        self._at += 1
        return self._pattern[self._at - 1 : self._at]

    def _part(self, character: str) -> _Part:
        if character == "(":
            if self._pattern.startswith("?", self._at):
                if not self._pattern.startswith("?:", self._at):
                    raise _Unknown
                self._at += 2
            return self.choice()
        if character == "[":
            return self._class()
        if character == ".":
            return _Characters(_DOT)
        return _Characters(1 << min(self._code(character, _ESCAPED), _OTHER))

    def _class(self) -> _Characters:
        start = self._at - 1
        is_negated = self._pattern.startswith("^", self._at)
        self._at += is_negated
        bits = 0
        while (character := self._next()) not in ("]", ""):
            first = last = self._code(character, _ESCAPED_ANYWHERE)
            if self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at):
                self._at += 1
                last = self._code(self._next(), _ESCAPED_ANYWHERE)
            if first <= _LARGEST:
                bits |= (2 << min(last, _OTHER)) - (1 << min(first, _OTHER)) if first <= last else 0
        bits = _ANY & (~bits if is_negated else bits)
        if not bits:
            raise Unreadable(f"no character can stand for {self._pattern[start : self._at]}")
        return _Characters(bits)

    def _code(self, character: str, escaped: str) -> int:
        if character != "\\":
            return ord(character or "\0")
        if number := _HEX.match(self._pattern, self._at):
            self._at = number.end()
            return int(number[number.lastindex or 0], 16)
        character = self._next()
        if character not in escaped:
            raise _Unknown
        return ord(_CONTROLS.get(character, character) or "\\")


def _times(bounds: re.Match[str]) -> tuple[int, int | None]:
    """Raises Unreadable."""
    least = int(bounds[1] or 0)
    most = least if not bounds[2] else int(bounds[3]) if bounds[3] else None
    if most is not None and most < least:
        raise Unreadable(f"{bounds[0]} has its larger bound first")
    return least, None if most is not None and most > _UNBOUNDED else most


@dataclass(slots=True)
class _Span:
    """Where a text can begin in a part of the pattern, and where it can end."""

    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    may_be_empty: bool = True


class _Places:
    """The places of a pattern: a character that it has, in each of the copies that repeating it makes of it, and the
    places that can come after it. `room` is for how many more links there is."""

    def __init__(self, room: int) -> None:
        self.characters: list[int] = []
        self.following: list[set[int]] = []
        self.room = room

    def add(self, part: _Part) -> _Span:
        """Raises Unreadable."""
        self._take(1)
        if isinstance(part, _Characters):
            place = [len(self.characters)]
            self.characters.append(part.bits)
            self.following.append(set())
            return _Span(place, place, may_be_empty=False)
        if isinstance(part, _Choice):
            spans = [self.add(branch) for branch in part.branches]
            return _Span(
                [place for span in spans for place in span.begins],
                [place for span in spans for place in span.ends],
                any(span.may_be_empty for span in spans),
            )
        if isinstance(part, _Sequence):
            return self._joined([self.add(each) for each in part.parts])
        return self._repeated(part)

    def _joined(self, spans: list[_Span]) -> _Span:
        whole = _Span()
        for span in spans:
            self.link(whole.ends, span.begins)
            whole.begins = whole.begins + span.begins if whole.may_be_empty else whole.begins
            whole.ends = whole.ends + span.ends if span.may_be_empty else span.ends
            whole.may_be_empty &= span.may_be_empty
        return whole

    def _repeated(self, part: _Repeated) -> _Span:
        """S{2,4} is S S (S (S)?)?, and S{2,} is S S S*."""
        needed = self._joined([self.add(part.part) for _ in range(min(part.least, _ENOUGH))])
        more = _Span()
        if part.most is None:
            more = self.add(part.part)
            self.link(more.ends, more.begins)
        else:
            for _ in range(min(part.most - part.least, _ENOUGH)):
                first = self.add(part.part)
                self.link(first.ends, more.begins)
                more.begins = first.begins + more.begins if first.may_be_empty else first.begins
                more.ends = first.ends + more.ends
        more.may_be_empty = True
        return self._joined([needed, more])

    def link(self, ends: list[int], begins: list[int]) -> None:
        self._take(len(ends) * len(begins))
        for place in ends:
            self.following[place].update(begins)

    def _take(self, num_links: int) -> None:
        self.room -= num_links
        if self.room < 0:
            raise Unreadable("too much is repeated, in it and in the other patterns")

    def num_readings(self) -> int:
        """Of a token, wherever it begins, and whatever is worst at each place. Raises Unreadable."""
        kinds = _kinds(self.characters)
        groups = [self._alike(following, kinds) for following in self.following]
        readings = [1] * len(self.characters)
        for _ in range(LONGEST_TOKEN):
            readings = [max(1, *[sum([readings[place] for place in group]) for group in each]) for each in groups]
        return max(readings)

    def _alike(self, places: set[int], kinds: list[int]) -> list[list[int]]:
        """Those of the places where the same character can stand, for each kind of it."""
        if len(places) < 2:
            return [list(places)]
        self._take(len(places) * len(kinds))
        return [[place for place in places if self.characters[place] & kind] for kind in kinds]


def _kinds(characters: list[int]) -> list[int]:
    """A character of each kind: those of a kind can stand in the same places."""
    distinct = list(dict.fromkeys(characters))
    kinds = {tuple(bits >> number & 1 for bits in distinct): 1 << number for number in range(1, _OTHER + 1)}
    return list(compress(kinds.values(), map(any, kinds)))


class Readings:
    """Those of the patterns of a schema, each by itself: a text is read by one of them."""

    def __init__(self) -> None:
        self._room = MAX_LINKS
        self._known: dict[str, int] = {}

    def add(self, pattern: str) -> int:
        """How many there are of a token. Raises Unreadable."""
        if pattern not in self._known:
            self._known[pattern] = self._num(pattern)
        return self._known[pattern]

    def _num(self, pattern: str) -> int:
        places = _Places(self._room - _LINKS_TO_BEGIN)
        try:
            places.add(_Sequence([_Characters(_QUOTE), _Text(pattern).choice(), _Characters(_QUOTE)]))
        except RecursionError:
            raise Unreadable("its parts are nested too deeply") from None
        except _Unknown:
            return 1
        num = places.num_readings()
        self._room = places.room
        if num > MAX_READINGS:
            raise Unreadable(
                f"a text can be read in more than {MAX_READINGS} ways: say what begins a part that is repeated, so "
                "that it cannot also be more of what is before it, as in [a-z]+( [a-z]+)* for ([a-z]+ ?)+"
            )
        return num
