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
_BACKSLASH = ord("\\")  # as a number: `in` takes several times as long to find bytes in bytes


class Plain(NamedTuple):
    """A text stands between `begins` and `middle`. Where the engine says what it has counted, two numbers with
    `between` between them stand before `ends`, the tokens of the answer first or last."""

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
        """The texts of events that are alike, and how many tokens the answer has by each, where that is said. None
        where one of them is of another shape after all."""
        begins, middle, between, ends, is_last = self
        end = ends or middle
        # What is around a text has quotes, and a text has none, so that nothing is found inside of one.
        texts = b"\n\n".join(alike).split(b"%b\n\n%b" % (end, begins))
        texts[0] = texts[0][len(begins) :]
        texts[-1] = texts[-1][: -len(end)]
        counts: list[int] = []
        if between:
            parted = [text.partition(middle) for text in texts]
            texts = [text for text, _, _ in parted]
            pairs = [counted.partition(between) for _, _, counted in parted]
            numbers = [first for first, _, _ in pairs] + [last for _, _, last in pairs]
            if not all(map(bytes.isdigit, numbers)) or max(map(len, numbers)) > _MAX_DIGITS:
                return None
            counts = [int(number) for number in (numbers[len(pairs) :] if is_last else numbers[: len(pairs)])]
        raw = b'"'.join(texts)
        if len(texts) != len(alike) or b"" in texts or raw.count(b'"') != len(texts) - 1:
            return None
        try:
            return raw.decode().split('"'), counts
        except UnicodeDecodeError:
            return None


def plain(event: bytes) -> Plain | None:
    """The shape of an event that was found to be plain: more of one choice's text, no end, nothing else."""
    text = _TEXT.search(event)
    if text is None or _TEXT.search(event, text.end()) is not None:
        return None
    begins, rest = event[: text.start(1)], event[text.end(1) :]
    counted = _COUNTS.search(rest)
    if counted is None:
        return Plain(begins, rest)
    is_last = counted[3] == b"completion"
    return Plain(begins, rest[: counted.start(1)], counted[2], rest[counted.end() :], is_last)
