"""Journals of processes that died: found by their locks, which nobody holds any more."""

from __future__ import annotations

import os
from pathlib import Path

from octoai.server.journal import files
from octoai.server.journal.lines import START, JournalGap, Position
from octoai.server.journal.tail import Tail, gap


class Orphan:
    """A dead process's journal. While it is held nobody else replays it."""

    def __init__(self, directory: Path, instance: str, lock: int) -> None:
        self.directory, self.instance = directory, instance
        self._lock: int | None = lock

    def tail(self, position: Position = START) -> Tail:
        """What it has after `position`, which is where its application got to. Raises JournalGap where segments between
        the two are gone and nobody has said to go on without them."""
        begin = gap(self.directory, self.instance, position)
        if begin is None:
            return Tail(self.directory, self.instance, position)
        accepted = files.incomplete_path(self.directory, self.instance)
        if not accepted.exists():
            raise JournalGap(
                f"{files.segment_path(self.directory, self.instance, begin.segment)} begins behind what the database "
                f"has: that is older than this journal, and what was in the segments before {begin.segment} is in "
                f"neither. Put a newer database in its place; or, to go on without that, make an empty file {accepted}"
                ": then the rest of the journal is brought in."
            )
        return Tail(self.directory, self.instance, begin)

    def remove(self) -> None:
        """Everything has been applied: delete it. Its position may be forgotten after that, not before."""
        if self._lock is not None:
            files.remove(self.directory, self.instance)
            self.close()

    def close(self) -> None:
        """Leave it, to be replayed another time."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def orphans(directory: Path) -> list[Orphan]:
    """Every journal there whose process is dead, held for the caller, who removes or closes each."""
    locks = [(instance, files.take_lock(directory, instance)) for instance in files.instances(directory)]
    return [Orphan(directory, instance, lock) for instance, lock in locks if lock is not None]
