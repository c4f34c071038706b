"""A segment of a journal while it is being written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from octoai.server.journal import files
from octoai.server.journal.lines import BEGINS_BATCH, CONTINUES, FRAME_BYTES, HEADER_BYTES, Position, header, line


class Segment:
    """One file, written from its beginning to its end. Raises OSError.

    `kernel_fd` is for a sync that runs behind our back. It is the same file opened once more: a failure to write it is
    told once to each that has it open, so that neither sync takes for good what the other was told had failed.
    """

    def __init__(self, directory: Path, instance: str, number: int, num_bytes: int) -> None:
        self.number, self.num_bytes = number, num_bytes
        self._offset = 0
        path = files.segment_path(directory, instance, number)
        self._fd = files.new_segment(path, num_bytes)
        try:
            self.kernel_fd = os.open(path, os.O_WRONLY)
        except OSError:
            os.close(self._fd)
            path.unlink()
            raise
        self._is_open = True

    def has_room(self, payload_bytes: int) -> bool:
        return self._offset + HEADER_BYTES + FRAME_BYTES + payload_bytes <= self.num_bytes

    def write(self, payload: bytes, *, after: Position, is_first: bool) -> Position:
        """Where it ends. `is_first`: all that was written before is durable. Raises OSError."""
        begins = is_first and self._offset > 0  # else the segment's own first line does
        block = (b"" if self._offset else header(after)) + line(payload, BEGINS_BATCH if begins else CONTINUES)
        files.write(self._fd, block, self._offset)
        self._offset += len(block)
        return Position(self.number, self._offset)

    def sync(self) -> None:
        """Return when it is on the disk. Raises OSError."""
        files.sync(self._fd)

    def close(self) -> None:
        """Once: a sync that fails late asks for it again, when these numbers may be others' files."""
        if self._is_open:
            self._is_open = False
            for fd in (self._fd, self.kernel_fd):
                with suppress(OSError):  # what was synced stays, and the rest has been given up
                    os.close(fd)
