"""Accounts, tokens and prices in memory, kept fresh: whether a token is good is known without asking the database.

The database counts every change (`versions`); here what is newer than the last look is read a few times a second, so
a revocation works in every process within a second. A well-formed token that is not known waits for a look that begins
after it came, so a new token works at once; looks for such tokens are `MIN_SECONDS` apart, and one serves all who
wait. What was found to be no token is refused at once when it comes again. So a flood of made-up tokens costs the
database nothing. While the database is away, what is known stays good for `away_seconds`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from octoai.server.accounts import Caller
from octoai.server.billing.money import Price, PriceBook
from octoai.server.errors import Unauthenticated, Unavailable
from octoai.server.store.accounts import AccountRow
from octoai.server.store.database import StoreAway, StoreError
from octoai.server.store.directory import Changes, changes_since, version_of
from octoai.server.store.reader import Reader
from octoai.server.store.tokens import TokenRow
from octoai.server.tokens import digest, is_well_formed

log = logging.getLogger("octoai.directory")

REFRESH_SECONDS = 0.25
MIN_SECONDS = 0.03
WAIT_SECONDS = 2.0
READ_SECONDS = 60.0  # for all there is, at the start and when the database was away: every token that was ever made
PATIENCE_SECONDS = 5.0  # of who waits for a look, and for the one before it
MAX_UNKNOWN = 10_000

_HOW = "Send `Authorization: Bearer <token>`; `octoai token create --name NAME` makes one."


class Directory:
    def __init__(
        self, reader: Reader, *, away_seconds: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.prices = PriceBook()
        self.away_seconds = away_seconds
        self.num_looks = 0
        self._reader = reader
        self._clock = clock
        self._version = 0
        self._reads_all = True
        self._accounts: dict[str, AccountRow] = {}
        self._tokens: dict[bytes, TokenRow] = {}
        self._callers: dict[bytes, Caller] = {}  # by the same hash, as they are asked for
        self._unknown: OrderedDict[bytes, None] = OrderedDict()
        self._fresh_at = float("-inf")
        self._asked_at = float("-inf")
        # A look that has begun may miss what came since: who comes now waits for the one that has not.
        self._looking: asyncio.Task[StoreError | None] | None = None
        self._coming: asyncio.Task[StoreError | None] | None = None
        self._searching: asyncio.Task[bool] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._is_away = False

    async def start(self) -> None:
        """Read everything, then keep it fresh. Raises StoreError."""
        await self.refresh(is_patient=True)
        self._keeping = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        for task in (self._keeping, self._searching, self._coming, self._looking):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._reader.close()

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller of an `Authorization` header. Raises Unauthenticated; Unavailable where nobody can tell."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if not token:
            raise Unauthenticated(f"No API token was sent. {_HOW}")
        if scheme.lower() != "bearer":
            raise Unauthenticated(f"The Authorization header is not a bearer token. {_HOW}")
        row = await self._find(token)
        if row is None:
            raise Unauthenticated(f"This API token is not known here. {_HOW}")
        return self._caller(row)

    def known(self, token_hash: bytes) -> Caller | None:
        """The caller whose token has that hash, where it is known without asking anybody; raises as `authenticate`."""
        row = None if self._is_away else self._tokens.get(token_hash)
        return None if row is None else self._caller(row)

    def price(self, model: str, at_us: int) -> Price | None:
        """What a model costs at that moment; None where no price is known."""
        row = self.prices.of(model, at_us)
        return None if row is None else Price(row.input_nanos, row.cached_input_nanos, row.output_nanos)

    def check(self) -> None:
        """Raises Unavailable where what is known is too old to tell who is asking."""
        if self._is_away and self._clock() - self._fresh_at > self.away_seconds:
            raise Unavailable("The database of accounts does not answer.", retry_after=5, code="database_away")

    async def refresh(self, *, is_patient: bool = False) -> None:
        """Read what has changed until now; calls at the same time share one look. Raises StoreError, also where that
        takes longer."""
        if self._coming is None:
            self._coming = asyncio.create_task(self._look(self._looking))
        try:
            async with asyncio.timeout(None if is_patient else PATIENCE_SECONDS):
                error = await asyncio.shield(self._coming)
        except TimeoutError:
            raise StoreAway(f"the database did not answer within {PATIENCE_SECONDS:g} s") from None
        if error is not None:
            raise error

    async def _find(self, token: str) -> TokenRow | None:
        # Looked up by a hash, whose timing tells nothing of the token.
        key = digest(token)
        if key not in self._tokens and not is_well_formed(token):
            return None
        self.check()
        row, is_away = self._tokens.get(key), self._is_away
        if row is None and key in self._unknown:
            return None
        if row is None and not is_away:
            is_away = not await self._searched()
            row = self._tokens.get(key)
        if row is None and is_away:
            raise Unavailable(
                "The database of accounts does not answer, and this token has not been seen before.",
                retry_after=5,
                code="database_away",
            )
        if row is None:
            self._remember_unknown(key)
        return row

    def _remember_unknown(self, key: bytes) -> None:
        """Nobody can mint that very token later: each is random."""
        self._unknown[key] = None
        if len(self._unknown) > MAX_UNKNOWN:
            self._unknown.popitem(last=False)

    async def _searched(self) -> bool:
        """Whether a look that began after this call has found all there is."""
        if self._searching is None:
            self._searching = asyncio.create_task(self._look_in_turn())
        return await asyncio.shield(self._searching)

    async def _look_in_turn(self) -> bool:
        await asyncio.sleep(max(0.0, self._asked_at + MIN_SECONDS - self._clock()))
        self._searching = None
        try:
            await self.refresh()
        except StoreError:
            return False
        return True

    def _caller(self, row: TokenRow) -> Caller:
        caller = self._callers.get(row.hash)
        if caller is None:
            caller = self._callers[row.hash] = Caller(self._accounts[row.account], row)
        if row.revoked_at is not None:
            raise Unauthenticated(f"This API token has been revoked. {_HOW}")
        if row.expires_at is not None and row.expires_at <= time.time():
            raise Unauthenticated(f"This API token has expired. {_HOW}")
        if caller.account.closed_at is not None:
            raise Unauthenticated("The account of this API token is closed.")
        return caller

    async def _look(self, before: asyncio.Task[StoreError | None] | None) -> StoreError | None:
        """One look, after the one `before`. Whoever comes once it has begun is for the next."""
        if before is not None:
            await asyncio.wait([before])
        self._looking, self._coming = self._coming, None
        self._asked_at = began = self._clock()
        self.num_looks += 1
        try:
            changes = await self._changes()
        except Exception as error:  # noqa: BLE001  # whatever it is: what is known grows old
            return self._went_away(error)
        self._take(changes)
        self._fresh_at = began
        if self._is_away:
            log.warning("the database answers again")
        self._is_away = False
        return None

    async def _changes(self) -> Changes:
        version, known = await self._reader.run(version_of, seconds=WAIT_SECONDS), self._version
        if version == known and not self._reads_all:
            return Changes(version)
        since = 0 if self._reads_all or version < known else known
        known_rows, seconds = (self._accounts, self._tokens), WAIT_SECONDS if since else READ_SECONDS
        return await self._reader.run(lambda db: changes_since(db, since, *known_rows), seconds=seconds)

    def _went_away(self, error: Exception) -> StoreError:
        if not self._is_away:
            unexpected = None if isinstance(error, StoreError) else error
            log.error("%s; known tokens stay good for %.0f s", error, self.away_seconds, exc_info=unexpected)
        # What comes back may be another's copy, with as many changes, of which some are others.
        self._is_away = self._reads_all = True
        return error if isinstance(error, StoreError) else StoreError(str(error))

    def _take(self, changes: Changes) -> None:
        if changes.version < self._version:
            log.warning("the database has gone back in time: accounts, tokens and prices are what it has now")
        if changes.is_all:
            self._accounts, self._tokens, self._unknown = changes.accounts, changes.tokens, OrderedDict()
            self.prices = PriceBook()
        else:
            self._accounts.update(changes.accounts)
            self._tokens.update(changes.tokens)
            for token_hash in changes.tokens:
                self._unknown.pop(token_hash, None)
        if changes.is_all or changes.accounts or changes.tokens:
            self._callers.clear()
        self.prices.add(changes.prices)
        self._version, self._reads_all = changes.version, False

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            with contextlib.suppress(StoreError):  # said when it began
                await self.refresh()
