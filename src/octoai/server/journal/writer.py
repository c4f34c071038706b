"""This process's journal: written by whoever appends, made durable by the kernel behind it, all that waits at once.

A record is with the kernel when `append` returns, so that no kill of this process loses it, and on the disk when its
future is done, so that no power cut does. It is synced as soon as a record is waited for, otherwise a few milliseconds
later, with others; by a thread where the kernel does not do it by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from octoai.server.journal import files
from octoai.server.journal.lines import (
    FRAME_BYTES,
    HEADER_BYTES,
    START,
    JournalError,
    JournalFailed,
    Position,
    refusal_of,
)
from octoai.server.journal.pending import END, Pending, resolve
from octoai.server.journal.segment import Segment
from octoai.server.journal.syncs import Syncs
from octoai.server.journal.tail import Tail
from octoai.server.machine import places

log = logging.getLogger("octoai.journal")

SEGMENT_BYTES = 4 * 1024 * 1024
LINGER_SECONDS = 0.005  # for a record that nobody waits for yet to be on the disk
_PAUSE_SECONDS = 0.0005  # between syncs: what comes meanwhile shares the next one
_NEVER = float("inf")
_RETRY_SECONDS = 1.0  # between attempts to allocate a segment on a full disk


class Journal:
    """What `open` returns. Its methods are for one thread, but for `release`, which is for whoever applies records."""

    def __init__(self, directory: Path, instance: str, lock: int, segment_bytes: int) -> None:
        self.directory, self.instance, self.segment_bytes = directory, instance, segment_bytes
        self.durable = START  # how far a tail may read; set after a sync
        self.on_durable: Callable[[], None] | None = None  # called in the thread, then; must not raise
        self._lock: int | None = lock
        self._num_segments = 0
        self._current: Segment | None = self._new_segment()
        self._spare: Segment | None = self._new_segment()
        self._no_spare: OSError | None = None  # why there was none, the last time
        self._allocate_at = 0.0
        self._has_room = self._is_open = True
        self._is_stopping = self._is_refusing = False
        self._writing = threading.Lock()  # over segments and records; never held during a sync but where one is full
        self._pending: list[Pending] = []  # written, and neither durable nor refused yet
        self._sync_at, self._synced_at = _NEVER, 0.0
        self._syncs: Syncs | None = None  # the kernel's
        self._is_syncing, self._uses_thread = False, False
        self._timer: asyncio.TimerHandle | None = None
        self._wake = threading.Event()
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

    def append(
        self,
        record: dict[str, Any] | bytes,
        *,
        soon: bool | None = False,
        on_refused: Callable[[JournalError], None] | None = None,
    ) -> asyncio.Future[Position]:
        """Add a record, or the encoded bytes of one, after all that were added before. Does not wait for the disk.

        The record is written when this returns. The future has a result once it is durable, at once where it is to be
        `soon` (None: the caller sees to it, with `sync_soon`); then all before it are, or their futures have failed.
        It fails with JournalFull or JournalFailed, here already where the record could not be written; where later,
        `on_refused` is called in the loop. Cancelling it takes nothing back. Raises ValueError for a record larger than
        a segment or with a newline, TypeError for one that is no JSON, and JournalFailed once the journal is closed.
        """
        payload = record if isinstance(record, bytes) else orjson.dumps(record)
        if HEADER_BYTES + FRAME_BYTES + len(payload) > self.segment_bytes:
            raise ValueError(f"A record of {len(payload)} bytes does not fit in a segment of {self.segment_bytes}.")
        if payload is record and b"\n" in payload:
            raise ValueError("A record is JSON on one line, without a newline.")
        pending = Pending(payload, asyncio.get_running_loop().create_future())
        with self._writing:
            if not self._is_open or self._is_stopping:
                raise JournalFailed("The journal is closed.")
            self._add(pending)
            pending.on_refused = on_refused
        if soon is not None:
            self._ask_for_sync(0.0 if soon else LINGER_SECONDS)
        return pending.waiter

    def _ask_for_sync(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        if at < self._sync_at:
            self._sync_at = at
            if self._kernel() is None:
                self._wake.set()
            elif not self._is_syncing:  # what waits then is seen to when that one is done
                self._sync_after(seconds)

    def _kernel(self) -> Syncs | None:
        """What syncs for the running loop without a thread; None where there is nothing that does."""
        loop = asyncio.get_running_loop()
        if self._syncs is None and not self._uses_thread:
            try:
                self._syncs = Syncs(loop)
            except (ImportError, OSError) as error:
                self._leave_to_thread(str(error))
        elif self._syncs is not None and self._syncs.loop is not loop:
            self._leave_to_thread("it is used in another event loop")
        return self._syncs

    def _leave_to_thread(self, why: str) -> None:
        log.info("the journal is synced by a thread: %s", why)
        self._uses_thread, self._is_syncing, self._syncs = True, False, None
        self._wake.set()

    def _sync_after(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds > 0:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._sync_after, 0.0)
            return
        with self._writing:
            segment, written = self._unsynced()
        if segment is None or self._syncs is None:
            return
        self._is_syncing = True
        try:
            self._syncs.submit(segment.kernel_fd, partial(self._was_synced, segment, written))
        except OSError as error:
            self._sync_at = 0.0
            self._leave_to_thread(str(error))

    def _was_synced(self, segment: Segment, written: Position, failure: OSError | None) -> None:
        self._is_syncing = False
        self._after_sync(segment, written, failure)
        if self._sync_at < _NEVER:
            self._sync_after(max(0.0, self._sync_at - time.monotonic()))

    @property
    def written(self) -> Position:
        """Where the newest record ends; `sync_soon` makes it durable."""
        with self._writing:
            return self._pending[-1].end if self._pending else self.durable

    def sync_soon(self, seconds: float = 0.0) -> None:
        """Somebody waits for what was appended, and can for that long."""
        if self._pending:
            self._ask_for_sync(seconds)

    def collect(self) -> None:
        """Somebody is about to wait: tell of what is on the disk by now, of which the loop would hear a turn later."""
        if self._is_syncing and self._syncs is not None:
            self._syncs.collect()

    def tail(self, position: Position = START) -> Tail:
        """What is durable after `position`, to be read in another thread."""
        return Tail(self.directory, self.instance, position, durable=lambda: self.durable)

    def release(self, position: Position) -> None:
        """Everything up to `position` has been applied: delete the segments that lie wholly before it."""
        files.release(self.directory, self.instance, min(position, self.durable).segment)

    def stop(self) -> None:
        """Write what was appended, blocking for as long, and end the thread. It can still be read and released."""
        self._is_stopping = True
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
            while not self._is_stopping:
                self._pause()
                if self._syncs is None:
                    self._sync()
                with self._writing:
                    self._keep_spare()
            self._sync()
        finally:
            with self._writing:
                self._is_open = False
                self._refuse(JournalFailed("The journal is closed."), self._pending)
                for segment in filter(None, (self._current, self._spare)):
                    segment.close()

    def _pause(self) -> None:
        """Until something is to be synced, or room to be looked for again, or it is time to stop."""
        while not self._is_stopping:
            self._wake.clear()
            next_at = max(self._sync_at, self._synced_at + _PAUSE_SECONDS) if self._syncs is None else _NEVER
            if self._spare is None:
                next_at = min(next_at, self._allocate_at)
            seconds = next_at - time.monotonic()
            if seconds <= 0:
                return
            self._wake.wait(None if seconds == _NEVER else seconds)

    def _sync(self) -> None:
        """Make durable all that is written by now, and tell those who wait."""
        with self._writing:
            segment, written = self._unsynced()
        if segment is None:
            return
        failure: OSError | None = None
        try:
            segment.sync()
        except OSError as error:
            failure = error
        self._synced_at = time.monotonic()
        self._after_sync(segment, written, failure)

    # What follows runs in whichever thread syncs.

    def _unsynced(self) -> tuple[Segment | None, Position]:
        """What is to be synced, and how far that reaches. Under `_writing`."""
        self._sync_at = _NEVER
        written = self._pending[-1].end if self._pending else self.durable
        return (self._current if written > self.durable else None), written

    def _after_sync(self, segment: Segment, written: Position, failure: OSError | None) -> None:
        with self._writing:
            if self._current is not segment:
                return  # it was full or failed meanwhile, and what it had was seen to then
            if failure is not None:
                self._give_up(failure)
                return
            num_durable = bisect_right(self._pending, written, key=END)
            durable, self._pending = self._pending[:num_durable], self._pending[num_durable:]
            self._became_durable(durable)

    # What follows runs in whichever thread holds `_writing`.

    def _add(self, record: Pending) -> None:
        """Write it: to the spare segment where the current one is full, or fails."""
        failure: OSError | None = None
        for _ in range(2):
            try:
                segment = self._segment_for(record, failure)
                record.end = segment.write(record.payload, after=self.durable, is_first=not self._pending)
            except OSError as error:
                failure = error
                self._give_up(error)
            except JournalError as error:
                self._refuse(error, [record])
                return
            else:
                self._pending.append(record)
                self._is_refusing = False
                return
        self._refuse(refusal_of(failure), [record])

    def _segment_for(self, record: Pending, failure: OSError | None) -> Segment:
        if self._current is not None and self._current.has_room(len(record.payload)):
            return self._current
        self._keep_spare()
        if self._spare is None:
            raise refusal_of(failure or self._no_spare)
        if self._current is not None:
            self._current.sync()  # what it has must be durable before another goes on after it
            self._current.close()
            written, self._pending = self._pending, []
            self._became_durable(written)
        self._current, self._spare = self._spare, None
        self._wake.set()  # it is the thread that makes room
        return self._current

    def _give_up(self, failure: OSError) -> None:
        """The kernel may have dropped the pages whose sync failed, and call the next sync a success: the file is given
        up, which the next one says in its first line, and what was not durable is written there once more."""
        log.error("a segment of the journal was given up: %s", failure)
        self._close_current()
        records, self._pending = self._pending, []
        if not records:
            return
        self._keep_spare()
        if self._spare is None:
            self._refuse(refusal_of(failure), records)
            return
        segment, self._spare = self._spare, None
        self._current = segment
        try:
            for number, record in enumerate(records):
                record.end = segment.write(record.payload, after=self.durable, is_first=number == 0)
            segment.sync()
        except OSError as error:
            self._close_current()
            self._refuse(refusal_of(error), records)
        else:
            self._became_durable(records)

    def _close_current(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    def _became_durable(self, records: Sequence[Pending]) -> None:
        if not records:
            return
        self.durable = records[-1].end
        self._tell(records)
        if self.on_durable:
            self.on_durable()

    def _refuse(self, error: JournalError, records: Sequence[Pending]) -> None:
        if records and not self._is_refusing:
            log.error("%d records were not written to the journal: %s", len(records), error)
            self._is_refusing = True
        self._tell(records, error)

    def _tell(self, records: Sequence[Pending], error: JournalError | None = None) -> None:
        """Tell those who wait, all in one call of their loop."""
        if not records:
            return
        if threading.get_ident() != self._thread.ident:
            resolve(records, error)
            return
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            records[0].waiter.get_loop().call_soon_threadsafe(resolve, records, error)

    def _keep_spare(self) -> None:
        """Allocate a spare segment when there is none; where the disk refuses, not again for a while."""
        if self._spare is not None or time.monotonic() < self._allocate_at:
            return
        try:
            self._spare = self._new_segment()
        except OSError as error:
            if self._has_room:
                log.error("no room for another segment of the journal: %s", error)
            self._no_spare = error
            self._allocate_at = time.monotonic() + _RETRY_SECONDS
        self._has_room = self._spare is not None

    def _new_segment(self) -> Segment:
        self._num_segments += 1  # also when it fails: a file that could not be deleted keeps its name
        return Segment(self.directory, self.instance, self._num_segments, self.segment_bytes)
