"""Events as tests look at them: each delta by itself, however many came in one read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from octoai.server.engines.base import Deltas, Event


def singly(events: Iterable[Event]) -> Iterator[Event]:
    for each in events:
        yield from each if isinstance(each, Deltas) else [each]
