"""Plain events of an answer, read without taking their JSON apart.

Nearly all events of an answer are alike but for a text and what has been counted so far. Once one has been read in
full, those that are byte for byte of its shape are known by that; any other is read in full. Pure.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TEXT = re.compile(rb'"(?:content|text)": ?"([^"\\]+)"')
# The two counts that change, in whichever order.
_COUNTS = re.compile(
    rb'"total_tokens": ?[0-9]{1,9}, ?"completion_tokens": ?([0-9]{1,9})'
    rb'|"completion_tokens": ?([0-9]{1,9}), ?"total_tokens": ?[0-9]{1,9}'
)


class Plain(NamedTuple):
    """A text stands between `begins` and `counts`; what the engine has counted, where it says so, before `ends`."""

    begins: bytes
    counts: bytes
    ends: bytes
    has_counts: bool

    def read(self, event: bytes) -> tuple[str, int | None] | None:
        """The text of an event, and how many tokens the answer has by then where that is said; None where the event
        is of another shape, or has a character that JSON escapes."""
        if not event.startswith(self.begins):
            return None
        start = len(self.begins)
        end = event.find(b'"', start)
        raw = event[start:end]
        if not raw or b"\\" in raw or not event.startswith(self.counts, end) or not event.endswith(self.ends):
            return None
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return None
        first, last = end + len(self.counts), len(event) - len(self.ends)
        if not self.has_counts:
            return (text, None) if first == len(event) else None
        counted = _COUNTS.fullmatch(event, first, last)
        return None if counted is None else (text, int(counted[1] or counted[2]))


def plain(event: bytes) -> Plain | None:
    """The shape of an event that was found to be plain: more of one choice's text, no end, nothing else."""
    text = _TEXT.search(event)
    if text is None or _TEXT.search(event, text.end()) is not None:
        return None
    counted = _COUNTS.search(event, text.end())
    begins, rest = event[: text.start(1)], text.end(1)
    if counted is None:
        return Plain(begins, event[rest:], b"", has_counts=False)
    return Plain(begins, event[rest : counted.start()], event[counted.end() :], has_counts=True)
