"""A journal, read behind its writer: whole records in order, and no further than is durable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from octoai.server.journal import files
from octoai.server.journal.lines import (
    HEADER_BYTES,
    START,
    JournalDamaged,
    Position,
    has_batch,
    payload_of,
    position_after,
)


class Tail:
    """What a journal has after a position. For one thread; keeps no file open."""

    def __init__(
        self,
        directory: Path,
        instance: str,
        position: Position = START,
        *,
        durable: Callable[[], Position] | None = None,
    ) -> None:
        """`durable` answers how far a journal that is being written may be read; without it, as far as it goes."""
        self.directory, self.instance = directory, instance
        self.position = position
        self._durable = durable

    def records(self, limit: int) -> list[tuple[bytes, Position]]:
        """The next ones, at most `limit`, and where each ends; none only when there are none yet.

        Raises JournalDamaged, naming file and offset, once all before the damage has been returned; and OSError.
        """
        while True:
            end, successor = self._extent()
            found = self._read(limit, end)
            if found or successor is None:
                return found
            self.position = Position(successor, 0)

    def _extent(self) -> tuple[int | None, int | None]:
        """Where the segment ends, None when only its lines can tell, and the number of the segment that goes on."""
        bound = self._durable() if self._durable else None
        number, offset = self.position
        if bound is not None and bound.segment <= number:
            return max(bound.offset, offset), None
        is_last = bound is None
        for later, path in reversed(files.segments(self.directory, self.instance)):
            if later <= number:
                break
            # The highest that goes on from here counts: one between may have failed before anything in it was durable.
            after = None if bound is not None and later > bound.segment else _begins_after(path)
            if after is not None and after.segment == number:
                return after.offset, later
            is_last = is_last and after is None
        if not is_last:
            raise JournalDamaged(
                f"{self._path} at byte {offset}: what follows is missing, though later segments exist."
            )
        return None, None

    def _read(self, limit: int, end: int | None) -> list[tuple[bytes, Position]]:
        number, start = self.position
        data = files.read(self._path, start, end)
        found: list[tuple[bytes, Position]] = []
        at = 0
        while len(found) < limit and at < len(data):
            newline = data.find(b"\n", at)
            payload = payload_of(data[at:newline]) if newline >= 0 else None
            if payload is None:
                break
            self.position = Position(number, start + newline + 1)
            if start + at > 0:  # not the segment's own first line
                found.append((payload, self.position))
            at = newline + 1
        if not found:
            self._check(data[at:], end)
        return found

    def _check(self, rest: bytes, end: int | None) -> None:
        """Whether the records may end here, before `rest`."""
        is_bad = has_batch(rest) if end is None else self.position.offset != end
        if is_bad:
            raise JournalDamaged(f"{self._path} at byte {self.position.offset}: not what was written there.")

    @property
    def _path(self) -> Path:
        return files.segment_path(self.directory, self.instance, self.position.segment)


def gap(directory: Path, instance: str, position: Position) -> Position | None:
    """Where the oldest segment begins, where those between `position` and that are gone; None where none is missing.
    Of several that go on from the same one, the highest counts, as in `Tail`. Raises JournalDamaged."""
    begin, before = 0, START
    for number, path in files.segments(directory, instance):
        if number == position.segment:
            return None
        after = _begins_after(path) if number > position.segment else None
        if after is None:
            continue
        if begin and after.segment != before.segment:
            break
        begin, before = number, after
    return Position(begin, 0) if before > position else None


def _begins_after(path: Path) -> Position | None:
    """What a segment goes on after; None for one that holds nothing durable. Raises JournalDamaged."""
    data = files.read(path, 0, HEADER_BYTES)
    after = position_after(data.partition(b"\n")[0])
    if after is None and has_batch(files.read(path, 0)):
        raise JournalDamaged(f"{path} at byte 0: not what was written there.")
    return after
