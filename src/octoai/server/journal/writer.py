"""This process's journal: appended to from the event loop, written by one thread, everything that waits at once."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import orjson

from octoai.server import places
from octoai.server.journal import files
from octoai.server.journal.lines import (
    BEGINS_BATCH,
    CONTINUES,
    FRAME_BYTES,
    HEADER_BYTES,
    START,
    JournalError,
    JournalFailed,
    JournalFull,
    Position,
    header,
    line,
)
from octoai.server.journal.tail import Tail

log = logging.getLogger("octoai.journal")

SEGMENT_BYTES = 4 * 1024 * 1024
_RETRY_SECONDS = 1.0  # between attempts to allocate a segment on a full disk
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_Waiter = asyncio.Future[Position]


class _Entry(NamedTuple):
    payload: bytes
    waiter: _Waiter | None


class Journal:
    """What `open` returns. Its methods are for one thread, but for `release`, which is for whoever applies records."""

    def __init__(self, directory: Path, instance: str, lock: int, segment_bytes: int) -> None:
        self.directory, self.instance, self.segment_bytes = directory, instance, segment_bytes
        self.durable = START  # how far a tail may read; set by the thread, after a sync
        self.on_durable: Callable[[], None] | None = None  # called in the thread, then; must not raise
        self._lock: int | None = lock
        self._num_segments = 0
        self._current: _Segment | None = self._new_segment()
        self._spare: _Segment | None = self._new_segment()
        self._allocate_at = 0.0
        self._has_room = self._is_open = True
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._batch: list[_Entry] = []  # taken from the queue, and neither durable nor refused yet
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, directory: Path, *, segment_bytes: int = SEGMENT_BYTES) -> Journal:
        """A new journal, beside those of other processes. Raises OSError when there is no room for two segments."""
        places.create(directory)
        files.sync_directory(directory.parent)
        instance = secrets.token_hex(8)
        lock = files.new_lock(directory, instance)
        try:
            return cls(directory, instance, lock, segment_bytes)
        except OSError:
            files.remove(directory, instance)
            os.close(lock)
            raise

    @property
    def has_room(self) -> bool:
        """False while the disk has no room for a spare segment: what runs may go on, nothing new should begin."""
        return self._has_room and self._is_open

    @overload
    def append(self, record: dict[str, Any] | bytes, *, wait: Literal[True] = True) -> asyncio.Future[Position]: ...
    @overload
    def append(self, record: dict[str, Any] | bytes, *, wait: Literal[False]) -> None: ...
    def append(self, record: dict[str, Any] | bytes, *, wait: bool = True) -> asyncio.Future[Position] | None:
        """Add a record, or the encoded bytes of one, after all that were added before. Never blocks.

        The future has a result once the record is durable; then all before it are, or their futures have failed. It
        fails with JournalFull or JournalFailed; without `wait` that is only logged. Cancelling it takes nothing back.
        Raises ValueError for a record larger than a segment or with a newline, TypeError for one that is no JSON, and
        JournalFailed once the journal is closed.
        """
        payload = record if isinstance(record, bytes) else orjson.dumps(record)
        if HEADER_BYTES + FRAME_BYTES + len(payload) > self.segment_bytes:
            raise ValueError(f"A record of {len(payload)} bytes does not fit in a segment of {self.segment_bytes}.")
        if b"\n" in payload:
            raise ValueError("A record is JSON on one line, without a newline.")
        waiter: _Waiter | None = asyncio.get_running_loop().create_future() if wait else None
        self._queue.put(_Entry(payload, waiter))
        if not self._is_open:  # asked after the put: the thread empties the queue once more after it has said so
            raise JournalFailed("The journal is closed.")
        return waiter

    def tail(self, position: Position = START) -> Tail:
        """What is durable after `position`, to be read in another thread."""
        return Tail(self.directory, self.instance, position, durable=lambda: self.durable)

    def release(self, position: Position) -> None:
        """Everything up to `position` has been applied: delete the segments that lie wholly before it."""
        oldest = min(position, self.durable).segment
        for number, path in files.segments(self.directory, self.instance):
            if number < oldest:
                path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Write what was appended, blocking for as long, and end the thread. It can still be read and released."""
        self._queue.put(None)
        self._thread.join()

    def close(self) -> None:
        """Stop, and leave the files as an orphan: not everything has been applied."""
        self.stop()
        self._unlock()

    def remove(self) -> None:
        """Stop, and delete the files: everything has been applied. The position may be forgotten after that."""
        self.stop()
        if self._lock is not None:
            files.remove(self.directory, self.instance)
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            is_wanted = True
            while is_wanted:
                taken = self._take()
                is_wanted = None not in taken
                self._batch = [entry for entry in taken if entry is not None]
                while self._batch:
                    self._commit()
                self._keep_spare()
        finally:
            self._is_open = False
            self._batch += [entry for entry in self._waiting() if entry is not None]
            self._refuse(JournalFailed("The journal is closed."))
            for segment in filter(None, (self._current, self._spare)):
                segment.close()

    def _take(self) -> list[_Entry | None]:
        """Everything that waits, or nothing when it is time to look for room again. None asks to stop."""
        try:
            first = self._queue.get(timeout=None if self._spare else _RETRY_SECONDS)
        except queue.Empty:
            return []
        return [first, *self._waiting()]

    def _waiting(self) -> list[_Entry | None]:
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    def _commit(self) -> None:
        try:
            ends = self._write()
        except JournalError as error:
            self._refuse(error)
            return
        written, self._batch = self._batch[: len(ends)], self._batch[len(ends) :]
        self.durable = ends[-1]
        _settle([(entry.waiter, end) for entry, end in zip(written, ends, strict=True) if entry.waiter])
        if self.on_durable:
            self.on_durable()

    def _refuse(self, error: JournalError) -> None:
        refused, self._batch = self._batch, []
        if refused:
            log.error("%d records were not written to the journal: %s", len(refused), error)
        _settle([(entry.waiter, error) for entry in refused if entry.waiter])

    def _write(self) -> list[Position]:
        """Write the first of the batch at least: to the spare segment where the current one is full, or fails."""
        failure: OSError | None = None
        for _ in range(2):
            segment = self._segment_for(self._batch[0], failure)
            try:
                return segment.write(self._batch, self.durable)
            except OSError as error:
                # The kernel may have dropped the pages whose sync failed, and call the next sync a success: this file
                # is given up, which the next one says in its first line.
                log.error("a segment of the journal was given up: %s", error)
                failure, self._current = error, None
                segment.close()
        raise _refusal(failure)

    def _segment_for(self, entry: _Entry, failure: OSError | None) -> _Segment:
        if self._current is not None and self._current.has_room(entry):
            return self._current
        self._keep_spare()
        if self._spare is None:
            raise _refusal(failure)
        if self._current is not None:
            self._current.close()
        self._current, self._spare = self._spare, None
        return self._current

    def _keep_spare(self) -> None:
        """Allocate a spare segment when there is none; where the disk refuses, not again for a while."""
        if self._spare is not None or time.monotonic() < self._allocate_at:
            return
        try:
            self._spare = self._new_segment()
        except OSError as error:
            if self._has_room:
                log.error("no room for another segment of the journal: %s", error)
            self._allocate_at = time.monotonic() + _RETRY_SECONDS
        self._has_room = self._spare is not None

    def _new_segment(self) -> _Segment:
        self._num_segments += 1  # also when it fails: a file that could not be deleted keeps its name
        return _Segment(self.directory, self.instance, self._num_segments, self.segment_bytes)


class _Segment:
    """A file that is being written. Syncs come back from the disk before anything is said."""

    def __init__(self, directory: Path, instance: str, number: int, num_bytes: int) -> None:
        self.number, self.num_bytes = number, num_bytes
        self._offset = 0
        self._fd = files.new_segment(files.segment_path(directory, instance, number), num_bytes)

    def has_room(self, entry: _Entry) -> bool:
        return self._offset + HEADER_BYTES + FRAME_BYTES + len(entry.payload) <= self.num_bytes

    def write(self, entries: Sequence[_Entry], after: Position) -> list[Position]:
        """Make as many as there is room for durable; where each ends. Raises OSError."""
        block = bytearray(b"" if self._offset else header(after))
        ends: list[Position] = []
        for entry in entries:
            text = line(entry.payload, CONTINUES if block else BEGINS_BATCH)
            if self._offset + len(block) + len(text) > self.num_bytes:
                break
            block += text
            ends.append(Position(self.number, self._offset + len(block)))
        files.write(self._fd, block, self._offset)
        files.sync(self._fd)
        self._offset += len(block)
        return ends

    def close(self) -> None:
        with suppress(OSError):  # what was synced stays, and the rest has been given up
            os.close(self._fd)


def _refusal(failure: OSError | None) -> JournalError:
    if failure is None or failure.errno in _NO_SPACE:
        return JournalFull("There is no room left for the journal.")
    return JournalFailed(f"The journal could not be written: {failure}")


def _settle(outcomes: list[tuple[_Waiter, Position | JournalError]]) -> None:
    """Tell those who wait, all in one call of their loop."""
    if outcomes:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            outcomes[0][0].get_loop().call_soon_threadsafe(_tell, outcomes)


def _tell(outcomes: list[tuple[_Waiter, Position | JournalError]]) -> None:
    for waiter, outcome in outcomes:
        if waiter.done():  # it was cancelled
            continue
        if isinstance(outcome, JournalError):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
