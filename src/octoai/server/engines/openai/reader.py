"""An OpenAI-shaped server's events become ours, whichever server it is.

Pure: bytes or the data of server-sent events in, `Started`, `Delta`s and `Finished` out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from octoai.server.engines.base import Delta, Deltas, Event, Finished, Generation, Started, Usage
from octoai.server.engines.openai.choices import (
    Calls,
    decoded,
    number_of,
    reason_of,
    reasoning_of,
    text_of,
    thought_of,
    tokens_of,
)
from octoai.server.engines.openai.logprobs import entries
from octoai.server.engines.openai.odd import Said
from octoai.server.engines.openai.plain import MAX_TOKENS, Habits, Plain
from octoai.server.engines.openai.refusals import broken
from octoai.server.engines.openai.timed import Timed, learnt
from octoai.server.errors import EngineFailed
from octoai.sse import parsed

DONE = b"[DONE]"
_END = b"data: " + DONE
MAX_TRIES = 3  # at learning what an answer's plain events look like
SLACK_TOKENS, MAX_THOUGHT_TOKENS = 1024, 2**15  # over `max_tokens`, against which not all hold calls and thoughts
EVENTS_PER_TOKEN = 16  # at most, where only events are counted: one may be a single character


class Reader:
    """Reads one answer's events. `Finished` comes last, with the sum of what the server counted. `habits` are the
    engine's, where more answers of it are read."""

    is_done = False
    _started = False
    _prompt_tokens = _cached_tokens = 0
    _num_thought = _told_thought = 0  # tokens of reasoning, as counted here and as the server says in the end
    _completion_tokens: int | None = None
    _plain: Plain | Timed | None = None
    _is_guess = False
    _calls: Calls | None = None
    _said_when_plain = (0, 0, False)

    def __init__(self, generation: Generation | None = None, habits: Habits | None = None) -> None:
        self._generation = generation
        self._num_choices = MAX_TOKENS if generation is None else generation.n
        self._max_tokens = MAX_TOKENS if generation is None else generation.max_tokens * generation.n
        self._counted: dict[int, int] = {}
        self._counted_at_text: dict[int, int] = {}  # by the last text; tokens without one belong to what comes next
        self._choices: set[int] = set()  # of which something was said
        self._reasons: dict[int, str] = {}
        self._habits = habits or Habits()
        self._has_others = generation is None or generation.logprobs != 0  # beside the logprob of each token
        self._may_be_plain = generation is not None and generation.n == 1 and generation.logprobs is None
        self._num_tries = MAX_TRIES if self._may_be_plain else 0

    def read_events(self, texts: Sequence[bytes], events: list[Event]) -> None:
        """Add what server-sent events mean, which are given as they were received."""
        number, end = 0, len(texts)
        while number < end and not self.is_done:
            if self._plain is not None and not self._reasons:
                number += self._read_plain(self._plain, texts, number, events)
            if number < end:
                self._read_text(texts[number], events)
                number += 1
        self._check_length()

    def _check_length(self) -> None:
        """An engine that does not stop is left, since nobody has asked for more; what came until then is counted."""
        told, counted = self._completion_tokens or 0, sum(self._counted.values())
        slack = SLACK_TOKENS + min(self._num_thought, MAX_THOUGHT_TOKENS)
        is_long = told > self._max_tokens + slack or counted > self._max_tokens * EVENTS_PER_TOKEN + slack
        if is_long and self._counted.keys() - self._reasons.keys():
            raise EngineFailed("The engine did not stop at max_tokens.")

    def _read_plain(self, shape: Plain | Timed, texts: Sequence[bytes], start: int, events: list[Event]) -> int:
        """How many were read at once, from `start` on."""
        before = self._counted.get(0, 0)
        said, counts = shape.read(texts, start, before, self._prompt_tokens)
        if not said:
            return 0
        if counts:
            self._completion_tokens = counts[-1]
            if before > counts[0] or (len(counts) > 1 and sorted(counts) != counts):
                counts = list(accumulate([max(before, counts[0]), *counts[1:]], max))
        else:
            counts = list(range(before + 1, before + 1 + len(said)))
        self._counted[0] = counts[-1]
        if shape.is_reasoning:
            self._num_thought += counts[-1] - self._counted_at_text.get(0, 0)
        self._counted_at_text[0] = counts[-1]
        self._is_guess = False
        if not self._started:
            self._start(events)
        events.append(Deltas(said, counts, shape.is_reasoning))
        return len(said)

    def _read_text(self, text: bytes, events: list[Event]) -> None:
        """As one that is known, or in full."""
        if text == _END:
            self._end(events)
            return
        said = self._habits.odd.read(text) if self._may_be_plain else None
        if said is not None:
            self._take(said, events)
            if not self._reasons:
                self._expect_after(text, None, None)
            return
        event = parsed(text)
        if event is None:
            return
        if event.data == DONE:
            self._end(events)
            return
        num_before = len(events)
        chunk = self._read_data(text, event.data, events)
        if self._may_be_plain and not self._reasons:
            self._expect_after(text, chunk, events[-1] if len(events) > num_before else None)

    def _end(self, events: list[Event]) -> None:
        self.is_done = True
        events.append(self._finished())

    def _read_data(self, text: bytes, data: bytes, events: list[Event]) -> Mapping[str, Any]:
        """Returns what is in it."""
        chunk, had_text = decoded(data), False
        try:
            had_text = self._read(chunk, events)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise EngineFailed("The engine sent an event of a shape that is not the protocol's.") from None
        if self._may_be_plain and not had_text:
            self._habits.odd.learn(text, chunk)
        return chunk

    def _take(self, said: Said, events: list[Event]) -> None:
        """What an event without text says."""
        has_choice, reason, usage = said
        if usage is not None:
            prompt_tokens, cached_tokens, self._completion_tokens, reasoning_tokens = usage
            if prompt_tokens:
                self._prompt_tokens = prompt_tokens
            if cached_tokens:
                self._cached_tokens = cached_tokens
            if reasoning_tokens:
                self._told_thought = reasoning_tokens
            self._cached_tokens = min(self._cached_tokens, self._prompt_tokens)
            if has_choice:
                self._counted[0] = max(self._counted.get(0, 0), self._completion_tokens)
        if reason is not None:
            self._start(events)
            self._reasons[0] = reason

    def _expect_after(self, text: bytes, chunk: Mapping[str, Any] | None, event: Event | None) -> None:
        """What the events to come will look like, now that one was read of which `chunk` and `event` were made."""
        is_other = isinstance(event, Delta) and self._plain is not None and self._plain.is_reasoning != _thinks(event)
        if self._plain is not None and (self._is_guess or is_other or self._said() != self._said_when_plain):
            self._plain = None  # it was guessed wrong, or would not say again what was said now
        if self._plain is None and self._num_tries:
            self._expect(text, chunk, event)

    def _expect(self, text: bytes, chunk: Mapping[str, Any] | None, event: Event | None) -> None:
        """As in an earlier answer, or as one that was more of the only choice's text and nothing else."""
        shape: Plain | Timed | None = None
        if not self._is_guess:
            is_reasoning = isinstance(event, Delta) and _thinks(event)
            known = self._prompt_tokens, self._cached_tokens
            shape = self._habits.guess(text, *known, is_reasoning=is_reasoning)
        self._is_guess = shape is not None
        if shape is None and chunk is not None and isinstance(event, Delta):
            self._num_tries -= 1
            shape = learnt(text, chunk, event)
            if isinstance(shape, Plain):
                self._habits.remember(text, shape)
        if shape is not None and shape.has_counts == (self._completion_tokens is not None):
            self._plain, self._said_when_plain = shape, self._said()

    def _said(self) -> tuple[int, int, bool]:
        """Of what the engine counts, that which plain events do not say."""
        return self._prompt_tokens, self._cached_tokens, self._completion_tokens is not None

    def so_far(self, *, is_whole: bool) -> list[Event]:
        """The counts until now, also those of tokens that had no text of their own yet: `Started` and a `Delta` a
        choice, or `Finished` of an answer that is whole; nothing when nothing was counted."""
        if is_whole:
            return [self._finished()]
        counted = dict(self._counted)
        if self._completion_tokens is not None:  # a last event's sum is of all choices
            last = max(counted, default=0)
            counted[last] = counted.get(last, 0) + max(0, self._completion_tokens - sum(counted.values()))
        if not counted and not self._prompt_tokens:
            return []
        deltas = [Delta(index, "", count) for index, count in sorted(counted.items())]
        return [Started(self._prompt_tokens, self._cached_tokens), *deltas]

    def _read(self, chunk: Mapping[str, Any], events: list[Event]) -> bool:
        """Whether it had any text, or what counts as such."""
        if chunk.get("error") or chunk.get("object") == "error":
            raise broken(chunk, None if self._started else self._generation)
        choices = chunk.get("choices") or ()
        if usage := chunk.get("usage"):
            self._read_usage(usage)
        elif timings := chunk.get("timings"):
            self._read_timings(timings)
        is_told, had_text = self._completion_tokens is not None and bool(usage or chunk.get("timings")), False
        for choice in choices:
            number = number_of(choice, self._num_choices)
            self._choices.add(number)
            delta = self._delta(number, choice, is_told=is_told, is_only=len(choices) == 1)
            if delta is not None:
                had_text = True
                if _thinks(delta):
                    self._num_thought += delta.completion_tokens - self._counted_at_text.get(number, 0)
                self._counted_at_text[number] = delta.completion_tokens
                self._start(events)
                events.append(delta)
            if reason := reason_of(choice):
                self._start(events)
                self._reasons[number] = reason
        return had_text

    def _start(self, events: list[Event]) -> None:
        if not self._started:
            self._started = True
            events.append(Started(self._prompt_tokens, self._cached_tokens))

    # Tokens so far: llama.cpp says them in `timings`, vLLM in `usage`; otherwise one a delta is counted, also where a
    # sum was said before it. It is billed as it is said here: a part is never more than the whole. A sum of none is
    # not believed where there was text.

    def _read_usage(self, usage: Mapping[str, Any]) -> None:
        self._prompt_tokens = tokens_of(usage.get("prompt_tokens")) or self._prompt_tokens
        if details := usage.get("prompt_tokens_details"):
            self._cached_tokens = tokens_of(details.get("cached_tokens")) or self._cached_tokens
        self._completion_tokens = tokens_of(usage.get("completion_tokens"))
        self._told_thought = thought_of(usage) or self._told_thought
        self._cached_tokens = min(self._cached_tokens, self._prompt_tokens)

    def _read_timings(self, timings: Mapping[str, Any]) -> None:
        self._cached_tokens = tokens_of(timings.get("cache_n")) or 0  # older ones do not say
        self._prompt_tokens = self._cached_tokens + (tokens_of(timings["prompt_n"]) or 0)
        self._completion_tokens = tokens_of(timings["predicted_n"])

    def _delta(self, number: int, choice: Mapping[str, Any], *, is_told: bool, is_only: bool) -> Delta | None:
        """Counts what it says. `is_told`, `is_only`: as below."""
        text, reasoning, calls = text_of(choice), reasoning_of(choice), None
        if choice.get("delta") and (said := choice["delta"].get("tool_calls")):
            self._calls = self._calls or Calls()
            calls = self._calls.numbered(number, said)
        has_text = bool(text or reasoning or calls)
        self._count(number, has_text, is_told=is_told, is_only=is_only)
        logprobs = entries(choice["logprobs"], has_others=self._has_others) if choice.get("logprobs") else None
        # A token that only begins a character has a logprob, but no text.
        if not has_text and not logprobs:
            return None
        return Delta(number, text, self._counted.get(number, 0), logprobs, calls, reasoning)

    def _count(self, number: int, has_text: bool, *, is_told: bool, is_only: bool) -> None:
        """`is_told`: the sum, by the event of the choice, which has no other if it `is_only`. What an earlier event
        said holds until there is text after it."""
        counted, all_tokens = self._counted, self._completion_tokens
        if is_only and is_told and all_tokens is not None:
            before = counted.get(number, 0)
            others = 0 if len(counted) <= 1 and number in counted else sum(counted.values()) - before
            counted[number] = max(before, all_tokens - others)
        elif has_text:
            if all_tokens is not None and not is_told:
                counted[number] = counted.get(number, 0) + max(0, all_tokens - sum(counted.values()))
                self._completion_tokens = None
            counted[number] = counted.get(number, 0) + 1

    def _finished(self) -> Finished:
        # Not of every choice that was asked for: some servers give one, whatever is asked.
        if not self._reasons or self._choices - self._reasons.keys():
            raise EngineFailed("The engine ended its answer without saying why.")
        completion_tokens = self._completion_tokens or sum(self._counted.values())
        reasoning_tokens = min(self._told_thought or self._num_thought, completion_tokens)
        usage = Usage(self._prompt_tokens, self._cached_tokens, completion_tokens, reasoning_tokens)
        return Finished(self._reasons, usage)


def _thinks(event: Delta) -> bool:
    return bool(event.reasoning) and not event.text
