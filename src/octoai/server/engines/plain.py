"""Plain events of an answer, read without taking their JSON apart.

Nearly all events of an answer are alike but for a text and what has been counted so far. Once one has been read in
full, those that are byte for byte of its shape are known by that; any other is read in full. Pure.

Events that follow each other are read together: what differs between them is found by what is the same, with a handful
of operations for hundreds of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_TEXT = re.compile(rb'"(?:content|text)": ?"([^"\\]+)"')
# The two counts that change, in whichever order.
_COUNTS = re.compile(rb'"(?:total|completion)_tokens": ?([0-9]{1,9})(, ?"(total|completion)_tokens": ?)([0-9]{1,9})')
_MAX_DIGITS = 9
_DIGITS = b"0123456789"
_BACKSLASH = ord("\\")  # as a number: `in` takes several times as long to find bytes in bytes


class Plain(NamedTuple):
    """A text stands between `begins` and a quote with `middle` behind it. Where the engine says what it has counted,
    two numbers with `between` between them stand before `ends`, the tokens of the answer first or last."""

    begins: bytes
    middle: bytes
    between: bytes = b""
    ends: bytes = b""
    is_last: bool = False

    @property
    def has_counts(self) -> bool:
        return bool(self.between)

    def num_alike(self, events: Sequence[bytes], start: int) -> int:
        """How many of the events from `start` on begin and end as this one does, and have nothing that JSON escapes:
        only they may be of its shape."""
        begins, ends = self.begins, self.ends or self.middle
        for number in range(start, len(events)):
            event = events[number]
            if not (event.startswith(begins) and event.endswith(ends)) or _BACKSLASH in event:
                return number - start
        return len(events) - start

    def read(self, alike: Sequence[bytes]) -> tuple[list[str], list[int]] | None:
        """The texts of events that are alike, and how many tokens the answer has by each, where that is said: of those
        before the first that is of another shape after all. None where that is the first, or cannot be told."""
        begins, middle, between, ends, _ = self
        first, last, size = len(begins), -len(ends) or None, len(middle)
        parted = [event[first:last].partition(b'"') for event in alike]
        heads = [rest[:size] for _, _, rest in parted]
        if heads.count(middle) != len(parted):
            parted = parted[: next(number for number, head in enumerate(heads) if head != middle)]
        texts = [text for text, _, _ in parted]
        rests = [rest[size:] for _, _, rest in parted]
        if not texts or b"" in texts:
            return None
        counts = self._counts(rests) if between else [] if not any(rests) else None
        if counts is None:
            return None
        try:
            return b'"'.join(texts).decode().split('"'), counts
        except UnicodeDecodeError:
            return None

    def _counts(self, pairs: Sequence[bytes]) -> list[int] | None:
        """Of each two numbers with `between` between them the one that counts the answer's tokens."""
        said = b",".join(pairs)
        if said.translate(None, delete=_DIGITS) != b",".join([self.between] * len(pairs)):
            return None
        numbers = said.replace(self.between, b",").split(b",")[self.is_last :: 2]
        if len(numbers) != len(pairs) or b"" in numbers or max(map(len, numbers)) > _MAX_DIGITS:
            return None
        return list(map(int, numbers)) if all(map(bytes.isdigit, numbers)) else None


def plain(event: bytes) -> Plain | None:
    """The shape of an event that was found to be plain: more of one choice's text, no end, nothing else."""
    text = _TEXT.search(event)
    if text is None or _TEXT.search(event, text.end()) is not None:
        return None
    begins, rest = event[: text.start(1)], event[text.end() :]
    counted = _COUNTS.search(rest)
    if counted is None:
        return Plain(begins, rest)
    is_last = counted[3] == b"completion"
    return Plain(begins, rest[: counted.start(1)], counted[2], rest[counted.end() :], is_last)
