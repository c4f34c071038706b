"""A request as several requests to its engine, where that takes fewer prompts or choices at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octoai.server.engines.base import Delta, Deltas, Event, Finished, Generation


def parts_of(generations: Sequence[Generation], max_choices: int) -> list[tuple[int, int, Generation]]:
    """(number of the prompt, number of its first choice, generation) for each request to an engine."""
    if len(generations) == 1 and generations[0].n == 1:
        return [(0, 0, generations[0])]
    parts, first = [], 0
    for prompt, generation in enumerate(generations):
        parts += [(prompt, *part) for part in _split(generation, first, max_choices)]
        first += generation.n
    return parts


def _split(generation: Generation, first: int, max_choices: int) -> list[tuple[int, Generation]]:
    """Requests of at most `max_choices` choices each. A given seed is counted up, or all choices would be the same; it
    stays within 64 bits, with a sign."""
    if generation.n <= max_choices:
        return [(first, generation)]
    parts = []
    for done in range(0, generation.n, max_choices):
        seed = None if generation.seed is None else (generation.seed + done + 2**63) % 2**64 - 2**63
        n, prompt_bytes = min(max_choices, generation.n - done), generation.num_prompt_bytes  # looked at once for all
        parts.append((first + done, replace(generation, n=n, seed=seed, prompt_bytes=prompt_bytes)))
    return parts


def renumbered(batch: Sequence[Event], first: int) -> Sequence[Event]:
    """A part's events, with its choices numbered as the whole request has them."""
    singly = [each for event in batch for each in (event if isinstance(event, Deltas) else (event,))]
    return [_renumber(event, first) for event in singly]


def _renumber(event: Event, first: int) -> Event:
    if isinstance(event, Delta):
        return replace(event, index=event.index + first)
    if isinstance(event, Finished):
        return replace(event, reasons={index + first: reason for index, reason in event.reasons.items()})
    return event
