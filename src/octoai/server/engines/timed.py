"""Plain events of llama.cpp, which says with each token how long everything took, and among that what it has counted.

As in `plain`, they are known by what they have in common with one that was read in full. Taking the JSON of each apart
was a fifth of what a token cost beside a model that empties the processor's caches between two. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from octoai.server.engines.plain import BACKSLASH, MAX_RUN, TEXT

_CREATED = re.compile(rb'"created": ?([0-9]+)')
_COUNT = re.compile(rb'"timings": ?\{[^{}]*"predicted_n": ?([0-9]{1,9})(?=[,}])')
_MAX_DIGITS = 9
_OF_NUMBERS = b"0123456789.+-eE"


class Timed(NamedTuple):
    """A text stands between `begins` and a quote with `middle` behind it, when the event was made (a number of
    `num_created` digits, another one every second) between that and `rest`, then the number of the answer's tokens.
    `ends` is what follows, without all that numbers are made of."""

    begins: bytes
    middle: bytes
    num_created: int
    rest: bytes
    ends: bytes

    @property
    def has_counts(self) -> bool:
        return True

    def read(
        self, events: Sequence[bytes], start: int, num_counted: int = 0, prompt_tokens: int = 0
    ) -> tuple[list[str], list[int]]:
        """As of a `Plain`; what was counted before tells nothing here."""
        begins, middle, num_created, rest, ends = self
        first, texts, counts = len(begins), [], []
        for event in events[start : start + MAX_RUN]:
            end = event.find(b'"', first)
            created = end + 1 + len(middle)
            count = created + num_created + len(rest)
            after = event.find(b",", count)
            number = event[count:after]
            if not (
                first < end < count < after
                and event.startswith(begins)
                and event.startswith(middle, end + 1)
                and event.startswith(rest, created + num_created)
                and event[after:].translate(None, _OF_NUMBERS) == ends
                and number.isdigit()
                and len(number) <= _MAX_DIGITS
                and BACKSLASH not in event[first:end]
                and (not num_created or event[created : created + num_created].isdigit())
            ):
                break
            try:
                texts.append(event[first:end].decode())
            except UnicodeDecodeError:
                break
            counts.append(int(number))
        return texts, counts


def timed(event: bytes) -> Timed | None:
    """The shape of an event that was found to be plain, and has times."""
    text, counted, created = TEXT.search(event), _COUNT.search(event), _CREATED.search(event)
    if text is None or counted is None or TEXT.search(event, text.end()) or _COUNT.search(event, counted.end()):
        return None
    begins, ends = event[: text.start(1)], event[counted.end() :].translate(None, _OF_NUMBERS)
    if not ends.startswith(b",") or counted.start() < text.end():
        return None
    if created is None or not text.end() < created.start() < created.end() < counted.start(1):
        return Timed(begins, event[text.end() : counted.start(1)], 0, b"", ends)
    middle, rest = event[text.end() : created.start(1)], event[created.end(1) : counted.start(1)]
    return Timed(begins, middle, len(created[1]), rest, ends)
