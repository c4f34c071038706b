"""In how many ways the patterns of a schema can be read: an engine follows all of them, for every token there is.

`^(a?){100}$` reads "aaaaa" in 75 million ways, `^([+]?[0-9]?[ -]?){20}$` a number with some dashes in thousands: each
held llama.cpp up for 20 s. A pattern is read as llama.cpp is told it; with something in it that cannot be told it takes
any text, in one way. Knows nothing of schemas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from operator import or_

from octoai.server.json_schema.expressions import (
    Characters,
    Choice,
    Expression,
    Part,
    Repeated,
    Sequence,
    Unknown,
    Unreadable,
)

LONGEST_TOKEN = 12  # characters; those that are longer are rare, and the longest are of one kind of them
MAX_READINGS = 2**LONGEST_TOKEN
MAX_LINKS = 40_000  # to follow them takes a quarter of a second, in which nobody else is served
_LINKS_TO_BEGIN = 30  # a pattern takes as long as so many, whatever is in it
_ENOUGH = 2 * LONGEST_TOKEN  # copies of what is repeated: more of them offer nothing else to a token
_UNBOUNDED = 2000  # llama.cpp takes a larger bound for none

# Characters as bits: those of ASCII, and one for all others. No text holds the first, which ends it.
_OTHER = 128
_ANY: int = 2 ** (_OTHER + 1) - 2
_QUOTE = Characters(((ord('"'), ord('"')),))


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

    def add(self, part: Part) -> _Span:
        """Raises Unreadable."""
        self._take(1)
        if isinstance(part, Characters):
            place = [len(self.characters)]
            self.characters.append(_bits(part))
            self.following.append(set())
            return _Span(place, place, may_be_empty=False)
        if isinstance(part, Choice):
            spans = [self.add(branch) for branch in part.branches]
            return _Span(
                [place for span in spans for place in span.begins],
                [place for span in spans for place in span.ends],
                any(span.may_be_empty for span in spans),
            )
        if isinstance(part, Sequence):
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

    def _repeated(self, part: Repeated) -> _Span:
        """S{2,4} is S S (S (S)?)?, and S{2,} is S S S*."""
        needed = self._joined([self.add(part.part) for _ in range(min(part.least, _ENOUGH))])
        more = _Span()
        if part.most is None or part.most > _UNBOUNDED:
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


def _bits(part: Characters) -> int:
    bits = 0
    for first, last in part.ranges:
        bits |= (2 << min(last, _OTHER)) - (1 << min(first, _OTHER))
    return bits & _ANY


def _kinds(characters: list[int]) -> list[int]:
    """The characters of each kind: those of a kind can stand in the same places."""
    kinds = [reduce(or_, characters)]
    for bits in set(characters):
        kinds = [part for kind in kinds for part in (kind & bits, kind & ~bits) if part]
    return kinds


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
            whole = Choice([part for _, _, part in Expression(pattern).branches()])
            places.add(Sequence([_QUOTE, whole, _QUOTE]))
        except RecursionError:
            raise Unreadable("its parts are nested too deeply") from None
        except Unknown:
            return 1
        num = places.num_readings()
        self._room = places.room
        if num > MAX_READINGS:
            raise Unreadable(
                f"a text can be read in more than {MAX_READINGS} ways: say what begins a part that is repeated, so "
                "that it cannot also be more of what is before it, as in [a-z]+( [a-z]+)* for ([a-z]+ ?)+"
            )
        return num
