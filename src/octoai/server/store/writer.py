"""The thread that writes to the database: what the journal has, in order and in batches, and what others ask for.

Everything that is there is one transaction (group commit). When the database is away the journal keeps what comes;
here it is tried again until it works. In a service the journal is left to an `Applier`, a process in which this very
thread has nothing else to do. Knows what records are applied with, not what they mean.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import orjson

from octoai.server.journal import START, Followed, Journal, JournalError, Position, gap
from octoai.server.store import Place, clocks, connect
from octoai.server.store.applier import Applier, News
from octoai.server.store.database import Connection, NotAsked, StoreAway, StoreError, StoreFull
from octoai.server.store.journals import keep_position, position_of
from octoai.server.store.requests import WAIVED, Record, apply_in_portions
from octoai.server.store.work import Action, T, Work, done, resolve
from octoai.server.times import now_us

log = logging.getLogger("octoai.store")

BATCH = 512
LINGER_SECONDS = 0.05  # for more of the journal to come: a batch costs little more than a single record
# From one batch to the next, where nobody waits for it. Each takes a core from the service for some milliseconds: 20 a
# second were what one client's 99th percentile had.
INTERVAL_SECONDS = 0.125
RETRY_SECONDS = 0.25
HANG_SECONDS = 3.0  # for one transaction: from then on the database counts as away, though nothing has failed
AWAY_SECONDS = 1.0  # for one of a database that is away: whether it is back shows by then
MAX_KEPT, MAX_CHEAP = 10_000, 5_000  # things to do when the database is back; cheap ones while there are fewer


class Writer:
    """`journal` is this process's own; None writes only what it is asked to. With an `applier` that reads the journal,
    from its beginning; otherwise it is read here, from `start` on.

    `failure` is what keeps the database from taking what it is given, while something does; `on_change` is called in
    the thread, whenever it has done what there was to do, or failed to, and before a segment is given up.
    """

    def __init__(
        self,
        place: Place,
        journal: Journal | Followed | None = None,
        *,
        applier: Applier | None = None,
        start: Position = START,
    ) -> None:
        self.place = place
        self.is_full = False
        self.failure: str | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.applied = start
        self._in_database = start  # of the journal, as we last found or wrote it there
        self.away_since: float | None = None  # the database, for this thread
        self._behind_since: float | None = None  # the applier
        self._began: float | None = None  # the transaction that is under way
        self._journal = journal
        self._applier = applier
        self._tail = None if journal is None or applier is not None else journal.tail(start)
        self._db: Connection | None = None
        self._work: deque[Work] = deque()
        self._num_kept = self._num_kept_done = 0  # each is changed by one thread alone
        self._waiting: deque[tuple[Position, Future[None]]] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()  # somebody waits for the next transaction
        self._is_durable = True
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="octoai-writer", daemon=True)

    @property
    def away_seconds(self) -> float | None:
        """How long the database has not taken what it was given; None while it does, in time."""
        away, behind, began = self.away_since, self._behind_since, self._began if self._hangs else None
        if away is None and behind is None and began is None:
            return None
        return time.monotonic() - min(each for each in (away, behind, began) if each is not None)

    def start(self) -> None:
        if self._applier is not None:
            self._applier.start(self._hear)
        if self._journal is not None:
            self._journal.on_durable = self._wake.set if self._applier is None else self._applier.durable
        self._thread.start()

    async def run(self, action: Callable[[Connection], T], *, seconds: float = 5.0, is_durable: bool = True) -> T:
        """Do something in a transaction; when this returns it is on disk, unless that is not asked for. What `action`
        raises is raised here.

        Raises StoreAway where the database did not do it in time: then it may still come to be done, if it has begun.
        NotAsked where it will not.
        """
        if self._hangs:  # who came before has waited for it
            raise NotAsked("the database does not answer")
        work = Work(action, is_durable)
        self._work.append(work)
        self._now()
        return await self._in_time(work.done, seconds if self.away_since is None else min(seconds, AWAY_SECONDS))

    def later(self, action: Action, *, is_kept: bool = False, is_cheap: bool = False) -> None:
        """Do something after all that was asked for before, without waiting; where it fails, it is let be. `is_kept`:
        not where the database is away; it is done when that is back, if this process lives to see it. What it raises
        then is in the log. Of what is kept there is not room for any number: what comes last is let be, first what
        `is_cheap` to lose. For one thread."""
        if is_kept:
            if self._num_kept - self._num_kept_done >= (MAX_CHEAP if is_cheap else MAX_KEPT):
                return
            self._num_kept += 1
        self._work.append(Work(action, is_durable=False, is_kept=is_kept))
        self._now()

    async def caught_up(self, *, seconds: float = 5.0) -> None:
        """Return when all that is in the journal now is in the database too. Raises StoreAway."""
        if isinstance(self._journal, Journal):
            written = self._journal.written
            self._journal.sync_soon()
            await self.reached(written, seconds=seconds)

    async def reached(self, position: Position, *, seconds: float = 5.0) -> None:
        if self.applied >= position:
            return
        reached: Future[None] = Future()
        self._waiting.append((position, reached))
        if self._applier is None:
            self._now()
        elif isinstance(self._journal, Journal) and self._journal.durable >= position:
            self._applier.hurry()
        await self._in_time(reached, seconds)

    def look(self) -> None:
        """Have it noticed where PostgreSQL has gone back in time and nothing came since."""
        if self._applier is not None and self.place.url is not None:
            self._applier.look()

    def close(self, seconds: float = 10.0) -> None:
        """Apply what is left, if the database lets us, and end the thread. Each of the two has so long."""
        if self._applier is not None:
            self._applier.close(seconds)
        self._is_closing = True
        self._now()
        self._thread.join(seconds)

    def wake(self) -> None:
        """There is more in the journal; a moment later it is read."""
        self._wake.set()

    def hurry(self) -> None:
        """Somebody waits for what is in the journal."""
        self._now()

    def _hear(self, news: News) -> None:
        """From the applier, in the loop."""
        self.applied, self.is_full = news.applied, news.is_full
        if news.failure is None:  # which says nothing of the connection that this process has
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = time.monotonic()
            self.later(lambda _: None)  # is it the database, or the applier alone?
        self._tell_waiting(None if news.failure is None else StoreAway(news.failure))
        if self._waiting and isinstance(self._journal, Journal) and self._journal.durable >= self._waiting[0][0]:
            assert self._applier is not None
            self._applier.hurry()

    @property
    def _hangs(self) -> bool:
        """Whether what was asked now would wait behind a transaction that takes too long."""
        began = self._began
        if began is None:
            return False
        return time.monotonic() - began > (HANG_SECONDS if self.away_since is None else AWAY_SECONDS)

    def _now(self) -> None:
        self._hurry.set()
        self._wake.set()

    async def _in_time(self, done: Future[T], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(done)
        except TimeoutError:
            raise StoreAway(f"the database did not answer within {seconds:.0f} s") from None

    def _run(self) -> None:
        rested = 0.0
        while True:
            self._wake.wait()
            self._wake.clear()
            if not self._waiting:
                self._hurry.wait(max(LINGER_SECONDS, rested + INTERVAL_SECONDS - time.monotonic()))
            self._hurry.clear()
            is_last = self._is_closing
            while self._round():
                pass
            rested = time.monotonic()
            self.on_change()
            if is_last:
                break
        if self._db is not None:
            self._db.close()

    def _round(self) -> bool:
        """One transaction. True where there may be more to do."""
        work = self._wanted()
        try:
            payloads = [] if self._tail is None else self._tail.records(BATCH)
            if not work and not payloads and not self._looks:
                self._tell_who_waits_here()
                return False
            num_read, self._began = len(payloads), time.monotonic()
            results = self._written(work, payloads)
        except Exception as error:  # noqa: BLE001  # whatever it is: nothing is lost, and it is tried again
            self._failed(work, error)
            return False
        self._succeeded(payloads[-1][1] if payloads else None)
        for each, (result, raised) in zip(work, results, strict=True):
            self._num_kept_done += each.is_kept
            if each.is_kept and raised is not None:  # nobody waits for it
                log.error("what was kept until the database is there cannot be done: %s", raised, exc_info=raised)
            resolve(each.done, result, raised)
        return bool(self._work or num_read)  # what was read may have ended with its segment

    @property
    def _looks(self) -> bool:
        """Whether the database is asked though there is nothing to do: nobody may be let through to ask whether it is
        back. Not one that is full, where a transaction without anything in it is no proof."""
        return self.away_since is not None and not self.is_full and not self._is_closing

    def _wanted(self) -> list[Work]:
        """What is to be done next, without what nobody waits for any more. Not more than a batch: all others that write
        to this database wait for its end."""
        work = list[Work]()
        while self._work and len(work) < BATCH:
            each = self._work.popleft()
            if not each.done.cancelled():
                work.append(each)
        return work

    def _written(
        self, work: list[Work], payloads: list[tuple[bytes, Position]]
    ) -> list[tuple[Any, BaseException | None]]:
        db = self._connected()
        records: list[Record] = [orjson.loads(payload) for payload, _ in payloads]
        # What came from the journal is safe there until its segment is given up; what was asked for is not.
        gives_up_segment = bool(payloads) and payloads[-1][1].segment > self.applied.segment
        self._set_durable(db, any(each.is_durable for each in work) or gives_up_segment)
        waived_nanos = 0
        with db.transaction():
            if self._tail is not None and self._has_gone_back(db):
                payloads.clear()  # they come after what is missing, and are read again
            elif records and self._journal is not None:
                waived_nanos = apply_in_portions(db, records, now_us())
                keep_position(db, self._journal.instance, payloads[-1][1])
            results = [done(db, each) for each in work]
        if waived_nanos > 0:
            log.warning(WAIVED, waived_nanos)
        return results

    def _has_gone_back(self, db: Connection) -> bool:
        """Whether it lacks what we brought in: a standby that was behind has taken its place, or a copy was restored.
        Then the journal is read again from where it has it. Asked in the transaction that goes on from there: the
        connection may have been made again, unnoticed, for this very one."""
        assert self._journal is not None
        found = position_of(db, self._journal.instance)
        if found >= self._in_database:
            return False
        begin = gap(self._journal.directory, self._journal.instance, found)
        lost = f", but for what was in the segments before {begin.segment}: they were given up" if begin else ""
        log.error(
            "the database has gone back in time: it has our journal to segment %d, byte %d; the rest is read again%s",
            *(*found, lost),
        )
        self._in_database, self.applied = found, begin or found
        self._tail = self._journal.tail(self.applied)
        self._now()
        return True

    def _set_durable(self, db: Connection, is_durable: bool) -> None:
        if is_durable != self._is_durable:
            db.set_durable(is_durable)
            self._is_durable = is_durable

    def _connected(self) -> Connection:
        if self._db is None:
            self._db = connect(self.place)
            if self.place.url is not None and self._tail is None:  # the applier is on this machine, too
                clocks.compare(self._db)
        return self._db

    def _succeeded(self, position: Position | None) -> None:
        self._began = None
        if self.away_since is not None:
            log.warning("the database takes what it is given again")
            self.away_since = self.failure = None
            self.is_full = False
        if position is not None and self._journal is not None:
            moved_on = position.segment > self.applied.segment
            self.applied = self._in_database = position
            if moved_on:
                self.on_change()  # first: who goes on from what was told last must not look for what is gone
                self._journal.release(position)
        self._tell_who_waits_here()

    def _failed(self, work: list[Work], error: Exception) -> None:
        began, self._began = self._began, None
        self.is_full, self.failure = isinstance(error, StoreFull), str(error)
        if self.away_since is None:
            is_expected = isinstance(error, StoreError | JournalError | OSError)
            log.error("%s; the journal keeps what comes", error, exc_info=None if is_expected else error)
            self.away_since = began or time.monotonic()
        if self._journal is not None and self._applier is None:
            self._tail = self._journal.tail(self.applied)
        self._work.extendleft([each for each in reversed(work) if each.is_kept])
        for each in work:
            if not each.is_kept:
                resolve(each.done, None, StoreAway(str(error)))
        self._tell_who_waits_here(StoreAway(str(error)))
        if not self._is_closing:
            self._hurry.wait(RETRY_SECONDS)
            self._wake.set()

    def _tell_who_waits_here(self, error: StoreAway | None = None) -> None:
        """In the thread; where there is an applier, who waits waits for that."""
        if self._applier is None:
            self._tell_waiting(error)

    def _tell_waiting(self, error: StoreAway | None) -> None:
        for _ in range(len(self._waiting)):
            position, reached = self._waiting.popleft()
            if position <= self.applied:
                resolve(reached, None, None)
            elif error is not None:
                resolve(reached, None, error)
            else:
                self._waiting.append((position, reached))
