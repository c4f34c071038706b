"""A journal that another process writes, as far as that has said that it is durable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from octoai.server.journal import files
from octoai.server.journal.lines import START, Position
from octoai.server.journal.tail import Tail


class Followed:
    def __init__(self, directory: Path, instance: str) -> None:
        self.directory, self.instance = directory, instance
        self.durable = START  # set by whoever hears from the other process
        self.on_durable: Callable[[], None] | None = None

    def tail(self, position: Position = START) -> Tail:
        """What is durable after `position`."""
        return Tail(self.directory, self.instance, position, durable=lambda: self.durable)

    def release(self, position: Position) -> None:
        """Everything up to `position` has been applied: delete the segments that lie wholly before it."""
        files.release(self.directory, self.instance, min(position, self.durable).segment)
