"""What limited requests hold until they end: in the database, which says whether there is room for it, and from what
remains here while that is away. Knows nothing of requests but what they reserve."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial

from octoai.server.accounts import Caller
from octoai.server.errors import OutOfCredit, RateLimited, Unavailable
from octoai.server.journal import START, Position
from octoai.server.ledger.remaining import Remaining
from octoai.server.limits import NotCovered, Standings, reserve
from octoai.server.store import reservations
from octoai.server.store.database import StoreAway
from octoai.server.store.reservations import Reservation
from octoai.server.store.writer import Writer
from octoai.server.times import now_us

LIMIT_SECONDS = 2.0  # for the database to answer whether there is room under a limit
# While the journal is not brought in, what has ended keeps its place and its money in the database, which refuses
# others for it. An applier that merely died is back within one.
BEHIND_SECONDS = 3.0


class Holding:
    """`check` raises Unavailable where a request must not go on without the database, which has not answered."""

    def __init__(self, writer: Writer, num_processes: int, check: Callable[[], None]) -> None:
        self.remaining = Remaining(num_processes)
        self._writer = writer
        self._check = check
        # By account: where in the journal the last settlement is that was not in the database when its request ended.
        self._ended: dict[str, Position] = {}

    async def reserve(self, caller: Caller, wanted: Reservation, refunds: str | None) -> Standings | None:
        """Hold what a request may need; what the one that it `refunds` was charged is there for it. Raises OutOfCredit,
        RateLimited; None while the database is away, or does not know yet what was used meanwhile: then money is
        counted from what remains and rates are not."""
        if not self.can_ask:
            self._check()
            self.remaining.hold(caller, wanted)
            return None
        used = self.remaining.uncharged(caller.account.id, self._writer.applied)
        if used is not None and await self._is_held_here(caller, wanted, used):
            return None
        self.tell()  # first: what was let through while it was away is held there before it answers this one
        try:
            held = await self._asked(caller, wanted, refunds)
        except NotCovered as refusal:
            self.remaining.heard(caller, refusal.standings)
            raise
        except StoreAway:  # it may come to be held there after all, as it should be where the request goes on
            self._hold_without(caller, wanted)
            return None
        except asyncio.CancelledError:
            self._release_later(wanted)
            raise
        self.remaining.heard(caller, held)
        return held

    async def _asked(self, caller: Caller, wanted: Reservation, refunds: str | None) -> Standings:
        """By the database. A refusal stands once it has what has ended here: until then it counts that as running."""
        ask = partial(
            self._writer.run,
            # On disk or not: a reservation does not outlive what it is for.
            lambda db: reserve(db, caller, wanted, refunds),
            seconds=LIMIT_SECONDS,
            is_durable=False,
        )
        try:
            return await ask()
        except (NotCovered, RateLimited) as refusal:
            ended = self._ended.get(caller.account.id, START)
            if ended <= self._writer.applied:
                raise
            try:
                await self._writer.reached(ended, seconds=LIMIT_SECONDS)
            except StoreAway:
                limited = refusal if isinstance(refusal, RateLimited) else refusal.limited
                if isinstance(refusal, NotCovered):
                    self.remaining.at_most(caller, refusal.standings)
                if limited is not None:  # rates cannot be counted here, as money can
                    raise limited from None
                raise
        return await ask()

    async def _is_held_here(self, caller: Caller, wanted: Reservation, used: Position) -> bool:
        """From what remains: the database would promise again what was used without it, until it has that. Where the
        rest does not cover this one, that is waited for, and then it is the database's to say."""
        try:
            self.remaining.hold(caller, wanted)
        except (OutOfCredit, Unavailable) as refusal:
            try:
                await self._writer.reached(used, seconds=LIMIT_SECONDS)
            except StoreAway:
                raise refusal from None
            return False
        self.tell()
        return True

    def tell(self) -> None:
        """The database, of what was let through without it: until then it promises that to others."""
        if unheard := self.remaining.told():
            self._writer.later(lambda db: reservations.hold_unknown(db, unheard, now_us()), is_kept=True)

    def ended(self, account: str, settled: Position) -> None:
        """One of its requests, whose settlement is in the journal up to there and not waited for any longer."""
        self._ended[account] = max(settled, self._ended.get(account, START))

    async def give_back(self, held: Reservation, *, is_heard: bool) -> None:
        """Of a request that never ran. `is_heard`: the database has said that it holds it; until it does not is waited
        for, and where that is given up it is released all the same."""
        self.remaining.release(held)
        self._release_later(held)
        if is_heard:
            with contextlib.suppress(StoreAway):
                await self._writer.run(lambda _: None, seconds=LIMIT_SECONDS, is_durable=False)

    @property
    def can_ask(self) -> bool:
        """A database that is there is asked also while it lacks a little of the journal: what is in there holds
        its room until it comes in."""
        writer = self._writer
        return writer.away_since is None and (writer.away_seconds or 0.0) <= BEHIND_SECONDS

    def _hold_without(self, caller: Caller, wanted: Reservation) -> None:
        try:
            self._check()
            self.remaining.hold(caller, wanted)
        except (OutOfCredit, Unavailable):
            self._release_later(wanted)
            raise

    def _release_later(self, held: Reservation) -> None:
        """The database may hold it, or come to."""
        self._writer.later(lambda db: reservations.release(db, held.id), is_kept=True)
