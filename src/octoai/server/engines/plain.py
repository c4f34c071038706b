"""Plain events of an answer, read without taking their JSON apart.

Nearly all events of an answer are alike but for a text and what has been counted so far. Once one has been read in
full, those that are byte for byte of its shape are known by that; any other is read in full. Pure.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TEXT = re.compile(rb'"(?:content|text)": ?"([^"\\]+)"')
# The two counts that change, in whichever order.
_COUNTS = re.compile(rb'"(?:total|completion)_tokens": ?([0-9]{1,9})(, ?"(total|completion)_tokens": ?)([0-9]{1,9})')


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

    def read(self, event: bytes) -> tuple[str, int | None] | None:
        """The text of an event, and how many tokens the answer has by then where that is said; None where the event
        is of another shape, or has a character that JSON escapes."""
        begins, middle, between, ends, is_last = self
        if not event.startswith(begins):
            return None
        raw, _, rest = event[len(begins) :].partition(b'"')
        if not raw or b"\\" in raw:
            return None
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return None
        if not between:
            return (text, None) if rest == middle else None
        first, found, last = rest[len(middle) : -len(ends)].partition(between)
        count = last if is_last else first
        if not (found and first.isdigit() and last.isdigit() and len(count) < 10):
            return None
        return (text, int(count)) if rest.startswith(middle) and rest.endswith(ends) else None


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
