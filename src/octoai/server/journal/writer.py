"""This process's journal: appended to from the event loop, written by one thread, everything that waits at once.

A record that is waited for while nothing else goes on may be written by the caller itself: two changes of thread cost
more than a quick disk does. On a disk that is not quick it is left to the thread, so that the loop is never held up.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import threading
import time
from collections import deque
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
QUICK_SECONDS = 0.0005  # what a write may take, on average, for a caller to do it
_WEIGHT = 0.2  # of the newest write in that average
_RETRY_SECONDS = 1.0  # between attempts to allocate a segment on a full disk
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_Waiter = asyncio.Future[Position]
_Outcomes = list[tuple[_Waiter, Position | JournalError]]
_Tell = Callable[[_Outcomes], None]


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
        self._queue: deque[_Entry | None] = deque()
        self._wake = threading.Event()
        self._writing = threading.Lock()  # held while the queue is emptied and its records are written
        self._write_seconds = 0.0
        self._is_refusing = False
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
    def append(
        self, record: dict[str, Any] | bytes, *, wait: Literal[True] = True, now: bool = False
    ) -> asyncio.Future[Position]: ...
    @overload
    def append(self, record: dict[str, Any] | bytes, *, wait: Literal[False]) -> None: ...
    def append(
        self, record: dict[str, Any] | bytes, *, wait: bool = True, now: bool = False
    ) -> asyncio.Future[Position] | None:
        """Add a record, or the encoded bytes of one, after all that were added before.

        The future has a result once the record is durable; then all before it are, or their futures have failed. It
        fails with JournalFull or JournalFailed; without `wait` that is only logged. Cancelling it takes nothing back.
        Never blocks, unless `now` says that it may, for as long as a quick disk takes: the future is done then.
        Raises ValueError for a record larger than a segment or with a newline, TypeError for one that is no JSON, and
        JournalFailed once the journal is closed.
        """
        payload = record if isinstance(record, bytes) else orjson.dumps(record)
        if HEADER_BYTES + FRAME_BYTES + len(payload) > self.segment_bytes:
            raise ValueError(f"A record of {len(payload)} bytes does not fit in a segment of {self.segment_bytes}.")
        if b"\n" in payload:
            raise ValueError("A record is JSON on one line, without a newline.")
        waiter: _Waiter | None = asyncio.get_running_loop().create_future() if wait else None
        self._queue.append(_Entry(payload, waiter))
        if not (now and self._write_here()):
            self._wake.set()
        if not self._is_open:  # asked afterwards: the thread empties the queue once more after it has said so
            raise JournalFailed("The journal is closed.")
        return waiter

    def _write_here(self) -> bool:
        """Do the thread's work, where it does none and the disk is quick. False where that is not so."""
        if self._write_seconds > QUICK_SECONDS or not self._is_open or not self._writing.acquire(blocking=False):
            return False
        try:
            self._empty(_tell)
        finally:
            self._writing.release()
        return self._spare is not None  # it is the thread that makes room

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
        self._queue.append(None)
        self._wake.set()
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
                self._wake.wait(timeout=None if self._spare else _RETRY_SECONDS)
                self._wake.clear()
                with self._writing:
                    is_wanted = self._empty(_tell_from_thread)
                    self._keep_spare()
        finally:
            self._is_open = False
            with self._writing:
                self._batch += [entry for entry in self._taken() if entry is not None]
                self._refuse(JournalFailed("The journal is closed."), _tell_from_thread)
                for segment in filter(None, (self._current, self._spare)):
                    segment.close()

    # What follows runs in whichever thread holds `_writing`.

    def _empty(self, tell: _Tell) -> bool:
        """Write everything that waits. False when it is time to stop."""
        taken = self._taken()
        self._batch += [entry for entry in taken if entry is not None]
        while self._batch:
            self._commit(tell)
        return None not in taken

    def _taken(self) -> list[_Entry | None]:
        return [self._queue.popleft() for _ in range(len(self._queue))]

    def _commit(self, tell: _Tell) -> None:
        began = time.perf_counter()
        try:
            ends = self._write()
        except JournalError as error:
            self._refuse(error, tell)
            return
        self._write_seconds += _WEIGHT * (time.perf_counter() - began - self._write_seconds)
        written, self._batch = self._batch[: len(ends)], self._batch[len(ends) :]
        self.durable, self._is_refusing = ends[-1], False
        tell([(entry.waiter, end) for entry, end in zip(written, ends, strict=True) if entry.waiter])
        if self.on_durable:
            self.on_durable()

    def _refuse(self, error: JournalError, tell: _Tell) -> None:
        refused, self._batch = self._batch, []
        if refused and not self._is_refusing:
            log.error("%d records were not written to the journal: %s", len(refused), error)
        self._is_refusing = True
        tell([(entry.waiter, error) for entry in refused if entry.waiter])

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


def _tell_from_thread(outcomes: _Outcomes) -> None:
    """Tell those who wait, all in one call of their loop."""
    if outcomes:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            outcomes[0][0].get_loop().call_soon_threadsafe(_tell, outcomes)


def _tell(outcomes: _Outcomes) -> None:
    for waiter, outcome in outcomes:
        if waiter.done():  # it was cancelled
            continue
        if isinstance(outcome, JournalError):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
