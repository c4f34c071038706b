"""The database behind the ledger: read and written for others, and kept in order.

At the start the journals of processes that are no more are brought in, and what they left open is settled by its last
checkpoint; the same is done from time to time for those that die beside us.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import orjson

from octoai.server.errors import RateLimited, Unavailable
from octoai.server.idempotency import KEEP_SECONDS
from octoai.server.journal import Journal, JournalError, Orphan, Position, instances, orphans
from octoai.server.store import Place, clocks, connect, keys, requests, reservations
from octoai.server.store.applier import END_SECONDS, Applier
from octoai.server.store.database import Connection, StoreError
from octoai.server.store.journals import end, expect, forget, keep_position, position_of
from octoai.server.store.reader import Reader
from octoai.server.store.writer import Writer
from octoai.server.times import now_us

log = logging.getLogger("octoai.books")

KEEP_ORDER_SECONDS = 10.0
AHEAD_SECONDS = 3600.0
REST_SECONDS, MAX_PORTIONS = 0.1, 200
BATCH = 512
NUM_REPORTS, TURN_SECONDS = 2, 5.0
T = TypeVar("T")


def journal_dir(place: Place) -> Path:
    return place.data_dir / "journal"


def open_journal(place: Place) -> Journal:
    """This process's own. Raises StoreError."""
    try:
        return Journal.open(journal_dir(place))
    except OSError as error:
        raise StoreError(f"cannot write a journal in {journal_dir(place)}: {error.strerror or error}") from error


class Books:
    """`is_beside`: the journal is brought in by a process beside this one. `keep_seconds`: how long the answers that
    were given under Idempotency-Keys are kept."""

    def __init__(
        self,
        place: Place,
        journal: Journal | None,
        *,
        is_beside: bool = False,
        keep_seconds: float = KEEP_SECONDS,
    ) -> None:
        self.place = place
        self.reader = Reader(place)
        self._reports = Reader(place, NUM_REPORTS)
        self._reporting = asyncio.Semaphore(NUM_REPORTS)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.writer = Writer(place, journal, applier=Applier(place, journal) if journal and is_beside else None)
        self._journal = journal
        self._keep_seconds = keep_seconds
        self._keeping: asyncio.Task[None] | None = None
        self._told: set[str] = set()  # of journals that cannot be read
        self.chores: list[Callable[[], None]] = []  # of others, to be done as often as what is done here
        self._ahead_told_at = time.monotonic()  # at the start, by who makes the database ready

    def start(self) -> None:
        self.writer.start()
        self._keeping = asyncio.create_task(self._keep_order())

    async def close(self) -> None:
        """What is in the journal goes into the database first, if that is there."""
        is_given_up, applied = True, self.writer.applied
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.stop)
            is_given_up = await self._give_up(self._journal)
        # A database that is away has been waited for: the next start has to bring the rest in anyway. One that is
        # behind takes it meanwhile.
        is_behind = self.writer.away_seconds is None and self.writer.applied > applied
        await asyncio.to_thread(self.writer.close, END_SECONDS if is_given_up or is_behind else 0.0)
        self.reader.close()
        self._reports.close()

    async def read(self, action: Callable[[Connection], T]) -> T:
        """Ask the database, when it has all that is durable here. Raises StoreAway."""
        await self.writer.caught_up()
        return await self.reader.run(action)

    async def report(self, account: str, action: Callable[[Connection], T]) -> T:
        """As `read`, for what may take long: never in the way of other reads, and one at a time of those that an
        account asks for. Raises RateLimited where its others take too long, Unavailable where those of others do."""
        turn, has_turn = self._turns.setdefault(account, asyncio.Lock()), False
        async with AsyncExitStack() as turns:
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    await turns.enter_async_context(turn)
                    has_turn = True
                    await turns.enter_async_context(self._reporting)
            except TimeoutError:
                raise (_others_are_read() if has_turn else _own_are_read()) from None
            await self.writer.caught_up()
            return await self._reports.run(action)

    async def write(self, action: Callable[[Connection], T]) -> T:
        """In a transaction, on disk when this returns. Raises StoreAway, and what `action` raises."""
        return await self.writer.run(action)

    async def _give_up(self, journal: Journal) -> bool:
        """Its files go when the database has all of it, and stay for the next start when not. Whether they went."""
        try:
            await self.writer.caught_up()
            await self.writer.run(partial(_end, journal=journal.instance, applied=self.writer.applied))
        except StoreError:
            log.error("the database does not have everything yet: the journal is brought in at the next start")
            journal.close()
            return False
        journal.remove()
        with suppress(StoreError):  # a line that says nothing more
            await self.writer.run(lambda db: forget(db, journal.instance))
        return True

    async def _keep_order(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ORDER_SECONDS)
            for chore in self.chores:
                chore()
            try:
                await self.writer.caught_up()
                await self.writer.run(self._order)
                self.writer.look()
                await self._recover()
                await self._prune(self._prune_some_reservations)
                await self._prune(self._prune_some_keys)
            except StoreError:
                pass  # the writer has said it
            except OSError as error:  # no file descriptors, for one
                log.error("the books could not be kept in order: %s; it is tried again", error)
            except Exception:
                log.exception("the books could not be kept in order; it is tried again")

    async def _recover(self) -> None:
        """A journal that cannot be read stays until a person has seen to it, who is told once."""
        try:
            await asyncio.to_thread(recover, self.place)
        except JournalError as error:
            if str(error) not in self._told:
                log.error("%s", error)
            self._told.add(str(error))

    async def _prune(self, some: Callable[[Connection], bool]) -> None:
        """For a while: what else is to be kept in order must not wait until all are gone."""
        for _ in range(MAX_PORTIONS):
            if not await self.writer.run(some):
                return
            await asyncio.sleep(REST_SECONDS)  # for others to write

    def _prune_some_reservations(self, db: Connection) -> bool:
        return reservations.prune(db, now_us())

    def _prune_some_keys(self, db: Connection) -> bool:
        answered_us, us = (now_us() - int(seconds * 1_000_000) for seconds in (self._keep_seconds, KEEP_SECONDS))
        return keys.prune(db, answered_us, us)

    def _order(self, db: Connection) -> None:
        now = now_us()
        # However long the database was away: what a process on this machine used is in its journal, whether it lives
        # or is dead and that is still to be brought in.
        here = set(instances(journal_dir(self.place)))
        lost = [row for row in requests.expired(db, now) if row.journal not in here]
        if lost:
            log.warning("%d requests of a process that was not heard of are settled by their checkpoints", len(lost))
        if waived_nanos := requests.interrupt(db, lost, now):
            log.warning(requests.WAIVED, waived_nanos)
        if time.monotonic() > self._ahead_told_at + AHEAD_SECONDS and (line := clocks.ahead(db, now)):
            log.warning("%s", line)
            self._ahead_told_at = time.monotonic()


def _own_are_read() -> RateLimited:
    return RateLimited(
        "Limit of reports at once of an account: 1, and others of this one are before it. Try again when they have "
        "been answered, or ask for shorter ranges.",
        kind="requests",
        retry_after=TURN_SECONDS,
    )


def _others_are_read() -> Unavailable:
    return Unavailable(
        f"Reports of other accounts are being read, {NUM_REPORTS} at once, and take their time.",
        retry_after=TURN_SECONDS,
        code="overloaded",
    )


def _end(db: Connection, journal: str, applied: Position) -> None:
    expect(db, journal, applied)
    keys.release_of_journal(db, journal)
    end(db, journal)


def recover(place: Place) -> int:
    """Bring in the journals of processes that are no more. Returns how many requests they had left open.

    Raises StoreError, and JournalError of the first that is damaged, once the others are in.
    """
    found = orphans(journal_dir(place))
    if not found:
        return 0
    num_left, damage = 0, None
    try:
        with closing(connect(place)) as db:
            for orphan in found:
                try:
                    num_left += _recovered(db, orphan)
                except JournalError as error:
                    damage = damage or error
    finally:
        for orphan in found:
            orphan.close()
    if damage is not None:
        raise damage
    return num_left


def _recovered(db: Connection, orphan: Orphan) -> int:
    position = position_of(db, orphan.instance)
    tail, waived_nanos = orphan.tail(position), 0
    while batch := tail.records(BATCH):
        with db.transaction():
            expect(db, orphan.instance, position)
            records = [orjson.loads(payload) for payload, _ in batch]
            waived_nanos += requests.apply(db, records, now_us()) + requests.correct(db, records, now_us())
            keep_position(db, orphan.instance, batch[-1][1])
        position = batch[-1][1]
    with db.transaction():
        expect(db, orphan.instance, position)
        left = requests.open_of_journal(db, orphan.instance)
        waived_nanos += requests.interrupt(db, left, now_us())
        keys.release_of_journal(db, orphan.instance)
        end(db, orphan.instance)
    if waived_nanos > 0:
        log.warning(requests.WAIVED, waived_nanos)
    orphan.remove()
    with db.transaction():
        forget(db, orphan.instance)
    return len(left)
