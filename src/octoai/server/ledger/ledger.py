"""The ledger on a request's path: reserve, open, checkpoint, settle.

What a request is and came to is written to the local journal, fsynced, before the bytes that depend on it leave; the
writer brings it into the database behind our back. So a request never waits for the database, and the database may be
away. Only limits are asked of it beforehand: they must hold for every process that shares it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from octoai.server.accounts import Caller
from octoai.server.billing.money import Price
from octoai.server.engines.base import NOTHING, Usage
from octoai.server.errors import Unavailable
from octoai.server.journal import START, Journal, JournalError, JournalFailed, JournalFull, Position
from octoai.server.ledger.holding import LIMIT_SECONDS, Holding
from octoai.server.ledger.intents import Intents
from octoai.server.limits import Standings
from octoai.server.store import keys, reservations
from octoai.server.store.database import Connection, StoreError
from octoai.server.store.reservations import Reservation
from octoai.server.store.writer import Writer
from octoai.server.times import now_us

log = logging.getLogger("octoai.ledger")

CHECKPOINT_SECONDS = 0.5
RENEW_SECONDS = 15.0
LEASE_SECONDS = 60.0
LEASE_US = int(LEASE_SECONDS * 1_000_000)
RETRY_SECONDS = 0.2
CROWD = 4  # requests at once, from which on what is to be on disk waits for others that will be in a moment
GATHER_SECONDS = 0.002
SETTLE_SECONDS = 0.005  # until a settlement is brought to the disk, where the request is there already


@dataclass(eq=False)
class Tab:
    """One request in the ledger. `usage` says what it has come to so far."""

    ledger: Ledger
    id: str
    request_id: str
    caller: Caller
    model: str
    served_model: str
    price: Price
    usage: Callable[[], Usage]
    is_stream: bool = False
    reservation: Reservation | None = None
    is_unheard: bool = False  # the database has not said that it holds the reservation
    key: tuple[str, str] | None = None  # an Idempotency-Key and the hash, in hexadecimal, of what came with it
    is_claimed: bool = False  # the database was asked to have that for it
    refunds: str | None = None  # whose charge is given back when this runs: of the request before under that key
    opened_us: int = field(default=0, init=False)
    _is_over: bool = field(default=False, init=False)
    _opened: asyncio.Future[Position] | None = field(default=None, init=False)
    _settled: asyncio.Future[Any] | None = field(default=None, init=False)
    _checkpoint = NOTHING
    _renewed: float = field(default=0.0, init=False)

    def open(self) -> None:
        """Its intent is to be written, soon. Once; it becomes durable while the engine reads the prompt."""
        if not self.opened_us:
            self.opened_us, self._renewed = now_us(), time.monotonic()
            self.ledger.opened(self)

    def write_intent(self) -> None:
        self._opened = self.ledger.append(self._record("intent", now_us()), soon=None)

    @property
    def is_durable(self) -> bool:
        """Whether the intent is on disk, as far as is known without waiting."""
        opened = self._opened
        return opened is not None and opened.done() and not opened.cancelled() and opened.exception() is None

    async def durable(self) -> None:
        """Return when the intent is on disk. Raises Unavailable where it cannot be: then nothing may be sent."""
        if self._opened is None:  # the engine was quicker
            self.ledger.intents.write()
        assert self._opened is not None
        await self.ledger.on_disk(self._opened)

    @property
    def _is_written(self) -> bool:
        """Whether its intent is in the journal, and on its way to the disk at least."""
        return self._opened is not None and not (self._opened.done() and self._opened.exception() is not None)

    def checkpoint(self) -> None:
        """What it has come to so far, for the case that we die; and a sign of life."""
        usage = self.usage() if self.is_stream else NOTHING
        now = time.monotonic()
        if self._opened is None or (usage == self._checkpoint and now - self._renewed < RENEW_SECONDS):
            return
        self._checkpoint, self._renewed = usage, now
        record = {"kind": "checkpoint", "id": self.id, **_counts(usage), "lease_us": now_us() + LEASE_US}
        self.ledger.append(record)

    async def settle(self, outcome: str, answer: str | None = None) -> None:
        """What it came to in the end. Only the first call counts; safe to cancel.

        When this returns the request is on disk, as it was opened at least; no kill of this process loses how it was
        settled, and a few milliseconds later no power cut does. Of a limited request the database knows, if it can.
        """
        is_written, settled = self._is_written, self._settled
        if settled is None:
            self.ledger.closed(self)
            record, usage = self._record("settlement", settled_us := now_us()), self.usage()
            record |= {**_counts(usage), "outcome": outcome, "settled_us": settled_us, "answer": answer}
            held = self.reservation
            is_waited_for = held is not None and self.ledger.is_waited_for(held)
            self._settled = settled = self.ledger.settle(record, is_reserved=is_waited_for, is_first=not is_written)
            if held is not None:
                charged = self.price.charge(usage)
                self.ledger.release(held, charged, is_heard=not self.is_unheard, is_waited_for=is_waited_for)
        if isinstance(settled, asyncio.Task):
            await asyncio.shield(settled)
        elif is_written and self._opened is not None:
            await self.ledger.on_disk(self._opened)
        elif not settled.cancelled():  # by somebody who did not want to wait: the record is on its way all the same
            await settled
        self._is_over = True

    async def close(self, outcome: str) -> None:
        """However it ended: settled when it was opened, given back when it was not."""
        if not self.opened_us:
            await self.ledger.give_back(self)
        elif not self._is_over:
            await self.settle(outcome)

    def _record(self, kind: str, at_us: int) -> dict[str, Any]:
        key, key_body = self.key or (None, None)
        caller, price, held = self.caller, self.price, self.reservation
        return {
            "kind": kind,
            "id": self.id,
            "request_id": self.request_id,
            "account": caller.account.id,
            "token_id": caller.token.id,
            "model": self.model,
            "served_model": self.served_model,
            "input_nanos": price.input_nanos,
            "cached_input_nanos": price.cached_input_nanos,
            "output_nanos": price.output_nanos,
            "opened_us": self.opened_us,
            "journal": self.ledger.instance,
            "is_reserved": held is not None,
            "held_nanos": held and held.nanos,  # for a database that was away, or went back to before that
            "lease_us": at_us + LEASE_US,
            "key": key,
            "key_body": key_body,
        }


class Ledger:
    """`journal` None records, bills and limits nothing. `away_seconds`: how long known callers go on while the
    database is away, where 0 is not at all; each of `num_processes` then has its part of what is left."""

    def __init__(
        self,
        journal: Journal | None,
        writer: Writer,
        *,
        away_seconds: float = 300.0,
        num_processes: int = 1,
    ) -> None:
        self.journal = journal
        self.writer = writer
        self.tabs: set[Tab] = set()
        self.holding = Holding(writer, num_processes, partial(self.check, has_answered=False))
        self._waiting: set[Tab] = set()  # for their turns, with a key or a reservation
        self._renew_at = 0.0
        self._away_seconds = away_seconds
        self._checkpoints: asyncio.Task[None] | None = None
        self._again: set[asyncio.Future[Position]] = set()
        self.intents = Intents(self.sync)
        self._sync_at: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._checkpoints = asyncio.create_task(self._keep_checkpoints())

    async def close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.cancel()
            await asyncio.gather(self._checkpoints, return_exceptions=True)

    def check(self, *, has_answered: bool = True) -> None:
        """Raises Unavailable where a new request could not be recorded. `has_answered`: whether the database has, when
        it was asked for this one."""
        if self.journal is None:
            return
        if not self.journal.has_room or self.writer.is_full:
            raise _no_room()
        away = self.writer.away_seconds
        if not has_answered:
            away = away or 0.0
        elif away is not None and self.holding.can_ask:  # only the applier is not there: what it lacks is a little
            return
        if away is not None and away >= self._away_seconds:
            raise Unavailable("The ledger's database does not answer.", retry_after=5, code="database_away")

    @property
    def instance(self) -> str:
        return "" if self.journal is None else self.journal.instance

    @property
    def behind_bytes(self) -> int:
        """What is in the journal and not yet in the database."""
        if self.journal is None:
            return 0
        durable, applied = self.journal.durable, self.writer.applied
        return (durable.segment - applied.segment) * self.journal.segment_bytes + durable.offset - applied.offset

    def append(
        self,
        record: dict[str, Any],
        *,
        soon: bool | None = False,
        on_refused: Callable[[JournalError], None] | None = None,
    ) -> asyncio.Future[Position]:
        if self.journal is not None:
            return self.journal.append(record, soon=soon, on_refused=on_refused)
        written: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        written.set_result(START)
        return written

    def admitted(self, tab: Tab) -> None:
        """It may run when its turn comes; until then it keeps its key and what it reserved, however long that takes."""
        if self.journal is not None and (tab.key is not None or tab.reservation is not None):
            self._waiting.add(tab)

    def opened(self, tab: Tab) -> None:
        self._waiting.discard(tab)
        self.tabs.add(tab)
        self.intents.add(tab, is_alone=len(self.tabs) == 1)

    def closed(self, tab: Tab) -> None:
        """It is about to be settled."""
        self.tabs.discard(tab)
        self.intents.discard(tab)

    def sync(self) -> None:
        """Somebody waits for what was written."""
        if self.journal is not None:
            self.journal.sync_soon(GATHER_SECONDS if len(self.tabs) >= CROWD else 0.0)

    async def on_disk(self, written: asyncio.Future[Position]) -> None:
        """Return when it is. Raises Unavailable where it cannot be."""
        if self.journal is not None and not written.done():
            self.journal.collect()
        try:
            if written.done():
                written.result()
            else:
                await asyncio.shield(written)
        except (JournalFull, JournalFailed):
            raise _no_room() from None

    async def reserve(self, tab: Tab, wanted: Reservation) -> Standings | None:
        """As `Holding.reserve`, for this request."""
        if self.journal is None:
            return None
        held = await self.holding.reserve(tab.caller, wanted, tab.refunds)
        tab.reservation, tab.is_unheard = wanted, held is None
        return held

    def settle(
        self, record: dict[str, Any], *, is_reserved: bool, is_first: bool
    ) -> asyncio.Future[Position] | asyncio.Task[None]:
        """Write a settlement now. A task where there is something to wait for. `is_first`: nothing of the request is on
        disk yet."""
        on_refused = None if is_reserved else partial(self._record_again, record)
        written = self.append(record, soon=None, on_refused=on_refused)
        if is_first or is_reserved:
            self.sync()
        elif self._sync_at is None:  # when the answer has left: to wake the journal's thread takes its time
            self._sync_at = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._sync_settled)
        if is_reserved:
            return asyncio.ensure_future(self._settled(record, written))
        if written.done() and written.exception() is not None:
            return asyncio.ensure_future(self._recorded(record, written))
        return written

    def is_waited_for(self, held: Reservation) -> bool:
        """Whether the settlement is, of a request that held this: in vain while it cannot come in, and for nobody where
        the database knows nothing of it."""
        return self.writer.away_seconds is None and not self.holding.remaining.is_unheard(held)

    def release(self, held: Reservation, charged_nanos: int, *, is_heard: bool, is_waited_for: bool) -> None:
        """Of a request whose settlement was written last."""
        settled = START if self.journal is None else self.journal.written
        if not is_waited_for:
            self.holding.ended(held.account, settled)
        self.holding.remaining.release(held, charged_nanos, START if is_heard else settled)

    def _sync_settled(self) -> None:
        self._sync_at = None
        if self.journal is not None:
            self.journal.sync_soon()

    async def _settled(self, record: dict[str, Any], written: asyncio.Future[Position]) -> None:
        position = await self._recorded(record, written)
        try:
            # The next request of the same caller must find what this one no longer holds.
            await self.writer.reached(position, seconds=LIMIT_SECONDS)
        except StoreError:  # the journal has it
            self.holding.ended(record["account"], position)

    def _record_again(self, record: dict[str, Any], refused: JournalError) -> None:
        """What was written could not be made durable: it is written again until it is."""
        failed: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        failed.set_exception(refused)
        again = asyncio.ensure_future(self._recorded(record, failed))
        self._again.add(again)
        again.add_done_callback(self._again.discard)

    async def give_back(self, tab: Tab) -> None:
        """Of a request that never ran: its key, and what it reserved."""
        self._waiting.discard(tab)
        self.release_key(tab)
        if tab.reservation is not None:
            await self.holding.give_back(tab.reservation, is_heard=not tab.is_unheard)

    def release_key(self, tab: Tab) -> None:
        """Of a request that never ran: its Idempotency-Key is as it was before."""
        if tab.key is not None and tab.is_claimed:
            account, key, id_ = tab.caller.account.id, tab.key[0], tab.id  # the tab itself is not to be kept so long
            self.writer.later(lambda db: keys.release(db, account, key, id_), is_kept=True, is_cheap=True)

    async def _recorded(self, record: dict[str, Any], written: asyncio.Future[Position]) -> Position:
        """Nothing that was used goes unrecorded: what cannot be written now is tried until it can."""
        has_complained = False
        while True:
            try:
                return await written
            except (JournalFull, JournalFailed) as error:
                if not has_complained:
                    log.critical("request %s cannot be settled yet: %s", record["request_id"], error)
                has_complained = True
                await asyncio.sleep(RETRY_SECONDS)
                written = self.append(record)

    async def _keep_checkpoints(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            for tab in tuple(self.tabs):
                tab.checkpoint()
            if self.holding.can_ask:
                self.holding.tell()
            if time.monotonic() >= self._renew_at:
                self._renew_at = time.monotonic() + RENEW_SECONDS
                self._renew(now_us())

    def _renew(self, at_us: int) -> None:
        """What waits, and what runs for long: its checkpoints say so too, but may come in late. Also where the database
        is away now: when that is back, before others are given what these hold."""
        running = [tab for tab in self.tabs if tab.opened_us < at_us - RENEW_SECONDS * 1_000_000]
        leases = [(at_us + LEASE_US, tab.id) for tab in (*self._waiting, *running) if tab.reservation is not None]
        claims = [(at_us, tab.caller.account.id, tab.key[0], tab.id) for tab in self._waiting if tab.key is not None]

        def renew(db: Connection) -> None:
            reservations.renew(db, leases)
            keys.renew(db, claims)

        if leases or claims:
            self.writer.later(renew, is_kept=True)


def _counts(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def _no_room() -> Unavailable:
    return Unavailable("There is no room to record requests; running ones end as usual.", retry_after=5, code="no_room")
