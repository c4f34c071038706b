"""Plain events of an answer, read without taking their JSON apart.

Nearly all events of an answer are alike but for a text and what has been counted so far. Once one has been read in
full, those that are byte for byte of its shape are known by that; any other is read in full. Pure.

Events that follow each other are read together: what differs between them is found by what is the same, with a handful
of operations for hundreds of them. What an engine's events look like is remembered for its next answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import repeat
from operator import ne
from typing import NamedTuple

from octoai.server.engines.openai.odd import OddEvents

# With the name that it has: a text, or what the model thinks. vLLM says `reasoning`, others `reasoning_content`.
TEXT = re.compile(rb'"(content|text|reasoning|reasoning_content)": ?"([^"\\]+)"')
# The two counts that change, in whichever order.
_COUNTS = re.compile(rb'"(?:total|completion)_tokens": ?([0-9]{1,9})(, ?"(total|completion)_tokens": ?)([0-9]{1,9})')
REASONING = b"reasoning"
_PROMPT_TOKENS = re.compile(rb'("prompt_tokens": ?)[0-9]+')
_CACHED_TOKENS = re.compile(rb'("cached_tokens": ?)[0-9]+')
_CHOICES = b'"choices":'
MAX_TOKENS = 2**31
MAX_RUN = 256
_DIGITS = b"0123456789"
_GAP = b"\n\n"  # in no event
_BEGIN_WITH = bytes.startswith
BACKSLASH = ord("\\")  # as a number: `in` takes several times as long to find bytes in bytes


class Plain(NamedTuple):
    """A text stands between `begins` and a quote with `middle` behind it. Where the engine says what it has counted,
    two numbers with `between` between them stand before `ends`, the tokens of the answer first or last. `is_reasoning`:
    the text is what the model thinks."""

    begins: bytes
    middle: bytes
    between: bytes = b""
    ends: bytes = b""
    is_last: bool = False
    is_reasoning: bool = False

    @property
    def has_counts(self) -> bool:
        return bool(self.between)

    def read(
        self, events: Sequence[bytes], start: int, num_counted: int = 0, prompt_tokens: int = 0
    ) -> tuple[list[str], list[int]]:
        """The texts of the events from `start` on, and how many tokens the answer has by each, where that is said: of
        those before the first that is of another shape, or has a character that JSON escapes; of `MAX_RUN` at most, so
        that it is no work for many when odd ones are among them.

        What has been counted before tells what the engine will count, and so what each event ends with.
        """
        event, first = events[start], len(self.begins)
        if event[first : first + 1] == b'"' or not event.startswith(self.begins):
            return [], []
        if start + 1 == len(events):
            found = self._one_as_foreseen(event, num_counted + 1, prompt_tokens)
        else:
            found = self._as_foreseen(events[start : start + MAX_RUN], num_counted, prompt_tokens)
        return found if found[0] or not self.between else self._as_told(events, start)

    def _one_as_foreseen(self, event: bytes, count: int, prompt_tokens: int) -> tuple[list[str], list[int]]:
        """An event that came by itself, of one token."""
        begins, middle, between, ends, is_last, _ = self
        first = len(begins)
        end = event.find(b'"', first)
        text = event[first:end]
        if not between:
            wanted = middle + ends
        elif is_last:
            wanted = b"%b%d%b%d%b" % (middle, prompt_tokens + count, between, count, ends)
        else:
            wanted = b"%b%d%b%d%b" % (middle, count, between, prompt_tokens + count, ends)
        if end < 0 or event[end + 1 :] != wanted or BACKSLASH in text:
            return [], []
        try:
            return [text.decode()], [count] if between else []
        except UnicodeDecodeError:
            return [], []

    def _behind(self, counts: range, prompt_tokens: int) -> bytes:
        """What stands behind the texts of events that count so many tokens, each with a gap."""
        _, middle, between, ends, _, _ = self
        if not between:
            return (middle + ends + _GAP) * len(counts)
        numbers = [0] * (2 * len(counts))
        numbers[self.is_last :: 2] = counts
        numbers[not self.is_last :: 2] = range(counts.start + prompt_tokens, counts.stop + prompt_tokens)
        each = b"%d".join([part.replace(b"%", b"%%") for part in (middle, between, ends + _GAP)])
        return each * len(counts) % tuple(numbers)

    def _as_foreseen(self, run: Sequence[bytes], num_counted: int, prompt_tokens: int) -> tuple[list[str], list[int]]:
        """Of one token each."""
        begins, first = self.begins, len(self.begins)
        are_alike = [*map(_BEGIN_WITH, run, repeat(begins))]
        if False in are_alike:
            run = run[: are_alike.index(False)]
        texts, _, rests = zip(*[event[first:].partition(b'"') for event in run], strict=True)
        if b"" in texts:
            texts = texts[: texts.index(b"")]
        counts = range(num_counted + 1, num_counted + 1 + len(texts))
        if _GAP.join([*rests[: len(texts)], b""]) != self._behind(counts, prompt_tokens):
            wanted = self._behind(counts, prompt_tokens).split(_GAP)
            texts = texts[: [*map(ne, rests, wanted)].index(True)]
        raw = b'"'.join(texts)
        if BACKSLASH in raw:
            texts = texts[: next(number for number, text in enumerate(texts) if BACKSLASH in text)]
            raw = b'"'.join(texts)
        try:
            return raw.decode().split('"') if texts else [], [*counts[: len(texts)]] if self.between else []
        except UnicodeDecodeError:
            return [], []

    def _as_told(self, events: Sequence[bytes], start: int) -> tuple[list[str], list[int]]:
        """With whatever counts."""
        begins, middle, ends = self.begins, self.middle, self.ends
        first, last, size = len(begins), -len(ends) or None, len(middle)
        run = events[start : start + MAX_RUN]
        run = run[: next((number for number, event in enumerate(run) if BACKSLASH in event), len(run))]
        run = run[: _num_same([event[:first] for event in run], begins)]
        if last is not None:
            run = run[: _num_same([event[last:] for event in run], ends)]
        parted = [event[first:last].partition(b'"') for event in run]
        rests = [rest for _, _, rest in parted]
        rests = rests[: _num_same([rest[:size] for rest in rests], middle)]
        texts = [text for text, _, _ in parted[: len(rests)]]
        raw = b'"'.join(texts)
        if b"" in texts:
            return self._as_told(events[: start + texts.index(b"")], start)
        numbers = [rest[size:] for rest in rests]
        counts = self._counts(numbers)
        if counts is None:  # one is odd: those before it
            return self._as_told(events[: start + len(texts) // 2], start) if len(texts) > 1 else ([], [])
        try:
            return raw.decode().split('"') if texts else [], counts
        except UnicodeDecodeError:
            return [], []

    def _counts(self, pairs: Sequence[bytes]) -> list[int] | None:
        """Of each two numbers with `between` between them the one that counts the answer's tokens."""
        said = b",".join(pairs)
        if said.translate(None, delete=_DIGITS) != b",".join([self.between] * len(pairs)):
            return None
        try:
            counts = list(map(int, said.replace(self.between, b",").split(b",")[self.is_last :: 2])) if pairs else []
        except ValueError:
            return None
        return counts if len(counts) == len(pairs) and max(counts, default=0) < MAX_TOKENS else None


def _num_same(parts: list[bytes], wanted: bytes) -> int:
    """How many there are before the first that differs."""
    if parts.count(wanted) == len(parts):
        return len(parts)
    return next(number for number, part in enumerate(parts) if part != wanted)


class Habits:
    """How an engine writes its events, as last learnt: what to try in an answer of which only the beginning is known.
    Answers differ in what comes before the choices, in the tokens of their prompts, and in how many of these were found
    in the cache."""

    def __init__(self) -> None:
        self.odd = OddEvents()
        # Without what comes before the choices, each with where it says the prompt's tokens, and whether it says those
        # found in the cache; also that of reasoning.
        self._shapes: dict[bool, tuple[Plain, re.Match[bytes] | None, bool]] = {}

    def remember(self, event: bytes, shape: Plain) -> None:
        frame = _frame(event)
        if frame and shape.begins.startswith(frame):
            rest = shape.middle + b"\0" + shape.ends
            told, says_cached = _PROMPT_TOKENS.search(rest), _CACHED_TOKENS.search(rest) is not None
            self._shapes[shape.is_reasoning] = shape._replace(begins=shape.begins[len(frame) :]), told, says_cached

    def guess(
        self, event: bytes, prompt_tokens: int, cached_tokens: int, *, is_reasoning: bool = False
    ) -> Plain | None:
        """The shape of plain events in the answer that an event is of, of which so much is known. An event that says
        another number is not of that shape: it has to be read, or nobody would learn of it."""
        known, frame = self._shapes.get(is_reasoning), _frame(event)
        if known is None or not frame:
            return None
        (begins, middle, between, ends, is_last, _), told, says_cached = known
        if told is not None:
            before, now = told[0], b"%b%d" % (told[1], prompt_tokens)
            middle, ends = middle.replace(before, now), ends.replace(before, now)
        if says_cached:
            now = b"\\g<1>%d" % cached_tokens
            middle, ends = _CACHED_TOKENS.sub(now, middle), _CACHED_TOKENS.sub(now, ends)
        return Plain(frame + begins, middle, between, ends, is_last, is_reasoning)


def _frame(event: bytes) -> bytes:
    """What comes before the choices; nothing where that is not all that an answer's events have in common."""
    frame, found, _ = event.partition(_CHOICES)
    return frame if found and b"usage" not in frame else b""


def plain(event: bytes) -> Plain | None:
    """The shape of an event that was found to be plain: more of one choice's text, no end, nothing else."""
    text = TEXT.search(event)
    if text is None or TEXT.search(event, text.end()) is not None:
        return None
    begins, rest, is_reasoning = event[: text.start(2)], event[text.end() :], text[1].startswith(REASONING)
    counted = _COUNTS.search(rest)
    if counted is None:
        return Plain(begins, rest, is_reasoning=is_reasoning)
    is_last = counted[3] == b"completion"
    return Plain(begins, rest[: counted.start(1)], counted[2], rest[counted.end() :], is_last, is_reasoning)
