"""Whose turn it is at an engine: its slots, and a bounded queue that is fair between accounts.

Among accounts the turn goes to the one that has had the fewest tokens since it began to wait; one that comes anew is
level with whoever has had the fewest. So an account with a hundred requests waiting delays another account's single
request by at most one of its own, and one with large requests has fewer turns than one with small ones, while both
wait: what was had while nobody else waited is held against nobody. Within an account it is first come, first served.
Leaving the queue (a client that went away) costs nobody a slot.

A queue that is full is shared equally, too: the newest request of the account that has most of it gives way to one of
an account that has less than its part.

Tokens are what a request may come to, as far as can be told beforehand. The same measure counts what waits and what
was done, so that an expected wait is honest also where every estimate is too high.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import TracebackType

from octoai.server.errors import Unavailable

FIRST_GUESS = 100.0  # tokens a second, until something is known
_KEPT = 0.9  # of what was measured before, at the end of each turn


@dataclass(eq=False, slots=True)
class _Place:
    tokens: int
    turn: asyncio.Future[None]
    is_admitted: Callable[[], bool]


@dataclass(eq=False, slots=True)
class _Account:
    """One that has requests here. `had` is its tokens in turns so far, counted on from where it came in; `since`
    orders those that have had the same."""

    had: float
    since: int
    waiting: deque[_Place] = field(default_factory=deque)
    waiting_tokens: int = 0
    num_running: int = 0


class Turn:
    """To be entered with `async with`. What that gives is called at the end of an answer that is whole: one that was
    left says nothing of how fast the engine is."""

    def __init__(self, queue: FairQueue, account: str, tokens: int, is_admitted: Callable[[], bool]) -> None:
        self._queue, self._account, self._tokens, self._is_admitted = queue, account, tokens, is_admitted

    async def __aenter__(self) -> Callable[[], None]:
        if not self._queue._take(self._account, self._tokens):
            await self._queue._wait(self._account, self._tokens, self._is_admitted)
        return self._ended

    def _ended(self) -> None:
        self._queue._measure(self._tokens)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue._give_back(self._account, self._tokens)


@dataclass(slots=True)
class _Other:
    """An account as it is once some of its requests have given way."""

    account: _Account
    num_waiting: int
    tokens: int
    _may_go: list[_Place] | None = None

    def give_up(self) -> _Place | None:
        """The newest request that may go, which is gone then. The only request of an account stays."""
        if self._may_go is None:
            self._may_go = [place for place in self.account.waiting if not place.is_admitted()]
        if not self._may_go or self.num_waiting + self.account.num_running <= 1:
            return None
        place = self._may_go.pop()
        self.num_waiting -= 1
        self.tokens -= place.tokens
        return place


class FairQueue:
    """`num_slots` turns at once; at most `max_waiting` requests and `max_waiting_tokens` tokens waiting. More are
    refused with an honest `retry-after`."""

    def __init__(
        self,
        num_slots: int,
        max_waiting: int,
        max_waiting_tokens: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.num_running = 0
        self.num_waiting = 0
        self.waiting_tokens = 0
        self.running_tokens = 0
        self._accounts: dict[str, _Account] = {}
        self._level = 0.0  # tokens that an account would have had if all had had the same
        self._order = itertools.count()
        self._clock = clock
        self._busy_since = self._unmeasured = 0.0
        self._done_tokens, self._busy_seconds = FIRST_GUESS, 1.0

    @property
    def tokens_per_second(self) -> float:
        """What the engine got done lately, while it had anything to do."""
        return self._done_tokens / self._busy_seconds

    @property
    def expected_wait(self) -> float:
        """Seconds until a request that came now would have its turn: what waits, and half of what runs."""
        if self.num_running < self.num_slots:
            return 0.0
        return (self.waiting_tokens + self.running_tokens / 2) / self.tokens_per_second

    def turn(self, account: str, tokens: int = 1, *, is_admitted: Callable[[], bool] = bool) -> Turn:
        """`tokens` is what it may come to, at least 1. `is_admitted` answers whether it is more of a request that had a
        turn already, which must not be refused half-way. To enter it raises Unavailable."""
        return Turn(self, account, tokens, is_admitted)

    def _take(self, account: str, tokens: int) -> bool:
        """Whether there is nothing to wait for: then it has its turn."""
        is_free = self.num_running < self.num_slots and not self.num_waiting
        if is_free:
            self._start(account, tokens)
        return is_free

    async def _wait(self, account: str, tokens: int, is_admitted: Callable[[], bool]) -> None:
        if not is_admitted():
            self._make_room(account, tokens)
        place = _Place(tokens, asyncio.get_running_loop().create_future(), is_admitted)
        entered = self._entered(account)
        entered.waiting.append(place)
        entered.waiting_tokens += tokens
        self.num_waiting += 1
        self.waiting_tokens += tokens
        try:
            await place.turn
        except asyncio.CancelledError:
            if not place.turn.done() or place.turn.cancelled():
                self._leave(account, place)
            elif place.turn.exception() is None:  # the turn came in the same moment as the client left
                self._give_back(account, tokens)
            raise

    def _make_room(self, name: str, tokens: int) -> None:
        """Raises Unavailable where none can be made: nobody has more of what is full than who asks would have, or who
        asks would have more than its part. Nobody gives way before it is known that there will be room."""
        limit = self.max_waiting_tokens
        is_full = self.num_waiting >= self.max_waiting
        # One that comes to more than the bound by itself may wait where nobody else does.
        if not is_full and (limit is None or not self.num_waiting or self.waiting_tokens + tokens <= limit):
            return
        own = self._accounts.get(name) or _Account(0.0, 0)
        waiting = [account for account in self._accounts.values() if account.waiting and account is not own]
        others = [_Other(each, len(each.waiting), each.waiting_tokens) for each in waiting]
        said = f"requests are waiting ({self.num_waiting})"
        going = self._going(others, attrgetter("num_waiting"), len(own.waiting) + 1, self.max_waiting, said)
        if limit is not None:
            said = f"tokens are waiting (about {self.waiting_tokens})"
            going += self._going(others, attrgetter("tokens"), own.waiting_tokens + tokens, limit, said)
        gone = {place for _, place in going}
        for account in {account for account, _ in going}:
            account.waiting = deque(place for place in account.waiting if place not in gone)
        for account, place in going:
            self._forget(account, place)
            if not place.turn.done():
                place.turn.set_exception(self._refusal("Others who have less of the queue come before this."))

    def _going(
        self, others: Sequence[_Other], size: Callable[[_Other], int], own_size: int, bound: int, said: str
    ) -> list[tuple[_Account, _Place]]:
        """Who has to go for the bound to hold: each time the newest of the account that has most, and more than who
        asks, which would have `own_size`."""
        going: list[tuple[_Account, _Place]] = []
        excess = sum(map(size, others)) + own_size - bound
        is_in_its_part = own_size * (len(others) + 1) <= bound
        greediest = [(-size(other), number, other) for number, other in enumerate(others)]
        heapq.heapify(greediest)
        while excess > 0:
            if not is_in_its_part or not greediest or -greediest[0][0] <= own_size:
                raise self._refusal(f"Too many {said}.")
            before, number, other = heapq.heappop(greediest)
            place = other.give_up()
            if place is not None:  # if none of it may go, the next has most
                excess += before + size(other)
                heapq.heappush(greediest, (-size(other), number, other))
                going.append((other.account, place))
        return going

    def _refusal(self, message: str) -> Unavailable:
        return Unavailable(message, retry_after=self.expected_wait, code="overloaded")

    def _entered(self, name: str) -> _Account:
        """An account that begins to wait, or is here anew: neither behind anybody who waits, so that nobody is made to
        wait for what others are owed, nor owed what others had meanwhile."""
        account = self._accounts.get(name)
        if account is None or not account.waiting:
            fewest = min((each.had for each in self._accounts.values() if each.waiting), default=self._level)
            level = min(self._level, fewest)
            if account is None:
                account = self._accounts[name] = _Account(level, next(self._order))
            account.had = max(account.had, level)
        return account

    def _start(self, name: str, tokens: int) -> None:
        account = self._accounts.get(name) or self._entered(name)
        if self.num_waiting > len(account.waiting):
            self._level += tokens / len(self._accounts)
            account.had += tokens
        account.since = next(self._order)
        account.num_running += 1
        if self.num_running == 0:
            self._busy_since = self._clock() - self._unmeasured
        self.num_running += 1
        self.running_tokens += tokens

    def _leave(self, name: str, place: _Place) -> None:
        account = self._accounts.get(name)
        if account is not None and place in account.waiting:  # one that was passed over is not there any more
            account.waiting.remove(place)
            self._forget(account, place)
            self._drop_if_gone(name)

    def _forget(self, account: _Account, place: _Place) -> None:
        account.waiting_tokens -= place.tokens
        self.num_waiting -= 1
        self.waiting_tokens -= place.tokens

    def _drop_if_gone(self, name: str) -> None:
        account = self._accounts[name]
        if not account.waiting and not account.num_running:
            del self._accounts[name]

    def _measure(self, tokens: int) -> None:
        """All the busy time since the last answer, whoever left meanwhile."""
        now = self._clock()
        self._done_tokens = self._done_tokens * _KEPT + tokens
        self._busy_seconds = self._busy_seconds * _KEPT + max(now - self._busy_since, 1e-3)
        self._busy_since = now

    def _give_back(self, name: str, tokens: int) -> None:
        self.num_running -= 1
        self._unmeasured = self._clock() - self._busy_since
        self.running_tokens -= tokens
        self._accounts[name].num_running -= 1
        self._drop_if_gone(name)
        self._fill()

    def resize(self, num_slots: int) -> None:
        """The engine has another number of slots from now on. Turns that were given stay given."""
        self.num_slots = num_slots
        self._fill()

    def _fill(self) -> None:
        """Hand free slots to the accounts whose turn it is."""
        while self.num_running < self.num_slots and self.num_waiting:
            waiting = [each for each in self._accounts.items() if each[1].waiting]
            next_name, account = min(waiting, key=lambda each: (each[1].had, each[1].since))
            place = account.waiting.popleft()
            self._forget(account, place)
            if place.turn.cancelled():  # its task may not have noticed yet
                self._drop_if_gone(next_name)
            else:
                self._start(next_name, place.tokens)
                place.turn.set_result(None)
