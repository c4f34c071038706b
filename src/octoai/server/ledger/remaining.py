"""What callers with budgets or prepaid credit may still spend while the database is away: what was last heard from it,
less what has begun since. Rates are not counted then. Knows nothing of requests but what they reserve."""

from __future__ import annotations

from octoai.server.accounts import Caller
from octoai.server.errors import OutOfCredit, Unavailable
from octoai.server.journal import START, Position
from octoai.server.limits import Standings
from octoai.server.store.reservations import Reservation


class Remaining:
    """Each of `num_processes` has its part of what is left."""

    def __init__(self, num_processes: int = 1) -> None:
        self._num_processes = num_processes
        self._left: dict[str, int] = {}  # nano-dollars, by payer
        self._unheard: set[Reservation] = set()  # the database does not know of them
        # By payer: what was taken from what is left here, and not from everybody's part, since that was last heard.
        self._whole: dict[str, set[Reservation]] = {}
        # By account: where in the journal the last of what was used here without the database is.
        self._used: dict[str, Position] = {}

    def heard(self, caller: Caller, standings: Standings) -> None:
        """From the database: how things stand, all reservations that it knows of being held."""
        for payer, standing in ((caller.account.id, standings.account), (caller.token.id, standings.token)):
            self._whole.pop(payer, None)
            if standing.left_nanos is None:
                self._left.pop(payer, None)
                continue
            self._left[payer] = standing.left_nanos // self._num_processes
            for each in self._unheard:
                if payer in (each.account, each.token_id):
                    self._take(payer, each)

    def at_most(self, caller: Caller, standings: Standings) -> None:
        """From the database, which takes for running what has ended here: there is no more than what is left without
        anything being held, since what has ended can but lessen that."""
        for payer, standing in ((caller.account.id, standings.account), (caller.token.id, standings.token)):
            if standing.left_nanos is not None and payer in self._left:
                most = (standing.left_nanos + standing.held_nanos) // self._num_processes
                self._left[payer] = min(self._left[payer], most)

    def told(self) -> list[Reservation]:
        """What the database does not know of, which it is told now: what is heard next is less for it."""
        unheard, self._unheard = list(self._unheard), set()
        return unheard

    def is_unheard(self, reservation: Reservation) -> bool:
        """Whether the database was not even told of it."""
        return reservation in self._unheard

    def hold(self, caller: Caller, wanted: Reservation) -> None:
        """Without the database. Raises OutOfCredit, and Unavailable where nothing was heard of the caller."""
        account, token = caller.account, caller.token
        bounded = [account.id] if account.is_prepaid or account.limits.hard_budget_nanos is not None else []
        bounded += [token.id] if token.limits.hard_budget_nanos is not None else []
        for payer in bounded:
            if payer not in self._left:
                raise Unavailable("The database of accounts does not answer.", retry_after=5, code="database_away")
            if max(0, self._left[payer]) < wanted.nanos:  # what costs nothing is not refused to who owes something
                raise OutOfCredit("The database is away, and what was last known to be left does not cover this.")
        for payer in bounded:
            self._take(payer, wanted)
        self._unheard.add(wanted)

    def uncharged(self, account: str, applied: Position) -> Position | None:
        """Up to where the database, which has the journal to `applied`, has to have it to know all that this account
        has used; None where it does."""
        used = self._used.get(account)
        if used is not None and used <= applied:
            del self._used[account]
            return None
        return used

    def release(self, reservation: Reservation, charged_nanos: int = 0, settled: Position = START) -> None:
        """What a request that has ended, or never ran, did not come to; its settlement is in the journal at `settled`.
        What the database held of it was held from everybody's part."""
        payers = (reservation.account, reservation.token_id)
        if charged_nanos and reservation in self._unheard and any(payer in self._left for payer in payers):
            self._used[reservation.account] = settled
        self._unheard.discard(reservation)
        for payer in payers:
            whole = self._whole.get(payer, set())
            held = reservation.nanos if reservation in whole else reservation.nanos // self._num_processes
            whole.discard(reservation)
            if payer in self._left:
                self._left[payer] += held - charged_nanos

    def _take(self, payer: str, wanted: Reservation) -> None:
        self._left[payer] -= wanted.nanos
        self._whole.setdefault(payer, set()).add(wanted)
