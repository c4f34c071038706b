"""Plain events of llama.cpp, which says with each token how long everything took, and among that what it has counted.

As in `plain`, they are known by what they have in common with one that was read in full. Taking the JSON of each apart
was a fifth of what a token cost beside a model that empties the processor's caches between two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from octoai.server.engines.base import Delta
from octoai.server.engines.openai.plain import BACKSLASH, MAX_RUN, REASONING, TEXT, Plain, plain

_CREATED = re.compile(rb'"created": ?([0-9]+)')
_COUNT = re.compile(rb'"timings": ?\{[^{}]*"predicted_n": ?([0-9]{1,9})(?=[,}])')
_MAX_DIGITS = 9
_OF_NUMBERS = b"0123456789.+-eE"


class Timed:
    """A text stands between `begins` and `middle`, then the number of the answer's tokens.

    When the event was made is in `middle`, at `created`, and another every second: it is kept as last seen. `ends` is
    what follows the number of tokens, without all that numbers are made of. `is_reasoning`: the text is what the model
    thinks.
    """

    has_counts = True

    def __init__(
        self, begins: bytes, middle: bytes, ends: bytes, created: slice = slice(0, 0), *, is_reasoning: bool = False
    ) -> None:
        self.is_reasoning = is_reasoning
        self._begins = begins
        self._middle = middle
        self._ends = ends
        self._created = created

    def read(
        self, events: Sequence[bytes], start: int, num_counted: int = 0, prompt_tokens: int = 0
    ) -> tuple[list[str], list[int]]:
        """As of a `Plain`; what was counted before tells nothing here."""
        first, size, texts, counts = len(self._begins), len(self._middle), [], []
        for event in events[start : start + MAX_RUN]:
            end = event.find(b'"', first)
            count = end + size
            after = event.find(b",", count)
            text, number = event[first:end], event[count:after]
            if not (
                event.startswith(self._begins)
                and text
                and BACKSLASH not in text
                and (event.startswith(self._middle, end) or self._goes_on(event[end:count]))
                and number.isdigit()
                and len(number) <= _MAX_DIGITS
                and event[after:].translate(None, _OF_NUMBERS) == self._ends
            ):
                break
            try:
                texts.append(text.decode())
            except UnicodeDecodeError:
                break
            counts.append(int(number))
        return texts, counts

    def _goes_on(self, middle: bytes) -> bool:
        """Whether it differs by when it was made, and by nothing else; then it is what is looked for from now on."""
        created, before = self._created, self._middle
        is_later = (
            middle[: created.start] == before[: created.start]
            and middle[created].isdigit()
            and middle[created.stop :] == before[created.stop :]
        )
        if is_later:
            self._middle = middle
        return is_later


def timed(event: bytes) -> Timed | None:
    """The shape of an event that was found to be plain, and has times."""
    text, counted, created = TEXT.search(event), _COUNT.search(event), _CREATED.search(event)
    if text is None or counted is None or TEXT.search(event, text.end()) or _COUNT.search(event, counted.end()):
        return None
    begins, ends = event[: text.start(2)], event[counted.end() :].translate(None, _OF_NUMBERS)
    if not ends.startswith(b",") or counted.start() < text.end():
        return None
    quote, is_reasoning = text.end() - 1, text[1].startswith(REASONING)  # the quote that ends the text
    middle = event[quote : counted.start(1)]
    if created is None or not text.end() < created.start() < created.end() < counted.start(1):
        return Timed(begins, middle, ends, is_reasoning=is_reasoning)
    when = slice(created.start(1) - quote, created.end(1) - quote)
    return Timed(begins, middle, ends, when, is_reasoning=is_reasoning)


def learnt(event: bytes, chunk: Mapping[str, Any], delta: Delta) -> Plain | Timed | None:
    """The shape of an event, with times or without, of which `chunk` and `delta` were made; None where it has none."""
    said = delta.text or delta.reasoning
    if delta.index or bool(delta.text) == bool(delta.reasoning) or delta.tool_calls or delta.logprobs:
        return None
    shape = timed(event) if chunk.get("timings") else plain(event)
    if shape is None or shape.is_reasoning != bool(delta.reasoning):
        return None
    text = TEXT.search(event)
    if text is None or text[2] != said.encode():
        return None  # what looked like its text is something else of that name
    if isinstance(shape, Timed):
        return None if chunk.get("usage") else shape
    return shape if shape.has_counts == bool(chunk.get("usage")) else None
