"""May this request run now, on whose account, and has it been answered before? What a `Job` needs beyond its engine.

Limits are asked of the database, in one transaction with what is reserved, for callers that have some, and before that
Idempotency-Keys for requests that have one; for all others nothing is asked at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from octoai.server.accounts import Caller
from octoai.server.billing.money import Price
from octoai.server.catalogue import Model
from octoai.server.engines.base import LONGEST_CONTEXT, Generation, Usage
from octoai.server.engines.openai.dialects import dumped, without_images
from octoai.server.errors import KeyConflict, Unavailable
from octoai.server.idempotency import KEEP_SECONDS, Key, Recording, Recordings, unpacked
from octoai.server.ids import new_record_id
from octoai.server.ledger.books import Books
from octoai.server.ledger.ledger import LEASE_US, Ledger, Tab
from octoai.server.limits import Standings
from octoai.server.params.generations import TextRequest
from octoai.server.router import Deployment
from octoai.server.store import keys, requests
from octoai.server.store.database import Connection, NotAsked, StoreAway, StoreError
from octoai.server.store.keys import KeyRow
from octoai.server.store.reservations import Reservation
from octoai.server.times import now_us

POLL_SECONDS = 0.2
ASK_SECONDS = 0.2
MAX_GIVEN = 10_000
ELSEWHERE_SECONDS = 600.0  # for an answer under the same key that another process is giving


@dataclass(slots=True)
class Admitted:
    """What was decided for a request that may run. `request` may have got a lower `max_tokens` than the default."""

    request_id: str
    request: TextRequest
    tab: Tab
    standings: Standings | None
    recording: Recording | None


class Admission:
    """`keep_seconds`: how long the answers that were given under Idempotency-Keys are kept."""

    def __init__(
        self,
        ledger: Ledger,
        books: Books,
        prices: Callable[[str, int], Price | None],
        *,
        keep_seconds: float = KEEP_SECONDS,
    ) -> None:
        self.ledger = ledger
        self.books = books
        self._prices = prices
        self._keep_seconds = keep_seconds
        self._recordings = Recordings()
        books.chores.append(self._recordings.forget_old)
        self._given: OrderedDict[str, None] = OrderedDict()  # by clients, lately: the database hears of them later

    async def admit(
        self,
        caller: Caller,
        request: TextRequest,
        deployment: Deployment,
        model: Model,
        request_id: str,
        key: Key | None,
        usage: Callable[[], Usage],
        wait_on: Callable[[Recording], None],
    ) -> Admitted | Recording:
        """Raises OutOfCredit, RateLimited, KeyConflict, BadRequest, Unavailable, or what `wait_on` does, with nothing
        held."""
        self.ledger.check()
        tab = Tab(
            ledger=self.ledger,
            id=new_record_id(),
            request_id=request_id,
            caller=caller,
            model=model.id,
            served_model=deployment.model.id,
            price=self._price(model, deployment.model),
            usage=usage,
            is_stream=request.stream,
        )
        recording = None
        try:
            if key is not None:
                recording, is_ours = await self._claimed(caller, key, tab, wait_on)
                if not is_ours:
                    return recording
            request, standings = await self._reserved(caller, request, deployment, tab)
        except BaseException as error:
            self.ledger.release_key(tab)
            self.ended(caller, recording, error)
            raise
        self.ledger.admitted(tab)
        return Admitted(request_id, request, tab, standings, recording)

    def ended(self, caller: Caller, recording: Recording | None, error: BaseException | None) -> None:
        """The request that this recording is of has ended; who joined it is told how."""
        if recording is not None:
            recording.fail(error or asyncio.CancelledError())
            self._recordings.end(caller.account.id, recording)

    async def unique(self, request_id: str) -> str:
        """A client may send an id twice; the ledger's must tell requests apart, so the second gets a longer one.

        The database is asked only for as long as it answers at once: no request waits for it because of its name.
        """
        taken = request_id in self._given
        self._given[request_id] = None  # at once: who comes with it while the database is asked is not the first
        if not taken and self.ledger.writer.away_seconds is None:
            with contextlib.suppress(StoreError):
                taken = await self.books.reader.run(lambda db: requests.is_known(db, request_id), seconds=ASK_SECONDS)
        unique = f"{request_id[:100]}.{secrets.token_hex(6)}" if taken else request_id
        self._given[unique] = None
        while len(self._given) > MAX_GIVEN:
            self._given.popitem(last=False)
        return unique

    def _price(self, named: Model, served: Model) -> Price:
        """The price of the model that was asked for; of the one that answers, where that one has none."""
        return self._prices(named.id, now_us()) or self._prices(served.id, now_us()) or Price()

    async def _claimed(
        self, caller: Caller, key: Key, tab: Tab, wait_on: Callable[[Recording], None]
    ) -> tuple[Recording, bool]:
        """A new recording for this request to fill, and True; or one of the same request, to be read."""
        account = caller.account.id
        known = self._recordings.find(account, key)
        while known is not None and known.is_abandoned and not known.is_done:
            await known.over()
            known = self._recordings.find(account, key)
        if known is None:
            recording = Recording(key, tab.request_id, keep_seconds=self._keep_seconds)
            self._recordings.begin(account, recording)
            try:
                stored = await self._claim(account, key, tab, partial(wait_on, recording))
            except BaseException as error:
                self.ended(caller, recording, error)
                raise
            if stored is None:
                return recording, True
            self._recordings.replace(account, recording, stored)
            return stored, False
        if known.key.body_hash != key.body_hash:
            raise _conflict()
        known.join()
        return known, False

    async def _claim(self, account: str, key: Key, tab: Tab, wait_on: Callable[[], None]) -> Recording | None:
        """None when the key is this request's; otherwise the answer that stands under it, waited for where another
        process is giving it, until `wait_on` raises something."""
        if self.ledger.journal is None:
            return None  # no request has a row, and no answer is kept
        tab.key = (key.value, key.body_hash.hex())
        until, is_elsewhere = time.monotonic() + ELSEWHERE_SECONDS, False
        while True:
            claimed = KeyRow(key.body_hash, tab.id, tab.request_id, self.ledger.instance, now_us())
            claim = partial(keys.claim, account=account, key=key.value, claimed=claimed)
            was_claimed, tab.is_claimed = tab.is_claimed, True  # at once: what is given up here may come to be claimed
            try:
                # Not waited for until it is on disk: what is settled under a key says so again.
                before = await self.books.writer.run(claim, is_durable=False)
                if before is None or before.request == tab.id:  # taken over, and not heard of in time
                    tab.refunds = None if before is None else before.refunds
                    return None
                if before.body_hash != key.body_hash:
                    raise _conflict()
                if before.answer is not None:
                    return unpacked(key, before.request_id, before.answer, before.answered_us or 0)
                is_elsewhere, taken = before.journal != self.ledger.instance, None
                await self.books.writer.caught_up()
                taken = await self.books.write(partial(_take_over, account=account, key=key, claimed=claimed))
            except StoreAway as away:
                tab.is_claimed = was_claimed or not isinstance(away, NotAsked)
                self.ledger.check(has_answered=False)
                if not is_elsewhere:
                    return None  # what is known of the key is in this process then
                # It may be answered there: it is waited for, while others are let through.
            if taken is not None:
                tab.refunds = taken.refunds
                return None
            if time.monotonic() > until:
                raise Unavailable("The same request is still running.", retry_after=5, code="still_running")
            wait_on()
            await asyncio.sleep(POLL_SECONDS)

    async def _reserved(
        self, caller: Caller, request: TextRequest, deployment: Deployment, tab: Tab
    ) -> tuple[TextRequest, Standings | None]:
        if not caller.is_limited:
            return request, None
        request, window = _within_minute(caller, request), deployment.context_length
        each = list(zip(request.generations, await _prompt_tokens(caller, request, deployment), strict=True))
        wanted = Reservation(
            id=tab.id,
            account=caller.account.id,
            token_id=caller.token.id,
            at_us=now_us(),
            nanos=sum(_most_nanos(tab.price, generation, prompt, window) for generation, prompt in each),
            prompt_tokens=sum(most for _, (most, _) in each),
            completion_tokens=sum(_most_completion_tokens(one, least, window) for one, (_, least) in each),
            lease_us=now_us() + LEASE_US,
        )
        return request, await self.ledger.reserve(tab, wanted)


# Tokens that a chat template may put around a message or a tool, and what it may say of how tools are called.
_PER_MESSAGE, _OF_TOOLS = 16, 512


def _take_over(db: Connection, account: str, key: Key, claimed: KeyRow) -> KeyRow | None:
    """Make the key this request's where the one before has ended without an answer, and return it. None while that runs
    elsewhere, and where this request has begun without waiting for the key: it would be given back for itself."""
    before = keys.find(db, account, key.value)
    if before is None or before.answer is not None or requests.of_id(db, claimed.request) is not None:
        return None
    row = requests.of_id(db, before.request)
    if row is None and now_us() - before.claimed_us < ELSEWHERE_SECONDS * 1_000_000:
        return None  # it waits for its turn there, or has just begun
    if row is not None and row.status == "open" and row.lease_us > now_us():
        return None
    if not keys.claim_again(db, account, key.value, before, claimed, before.replaces if row is None else row.id):
        return None
    if row is not None and row.status == "open":  # nobody was heard of for a whole lease
        requests.interrupt(db, [row], now_us())
    return keys.find(db, account, key.value)


def _within_minute(caller: Caller, request: TextRequest) -> TextRequest:
    """A default of ours must not ask for more than the caller may have in a minute. Raises BadRequest."""
    limit = caller.max_completion_tokens
    if limit is None or request.has_max_tokens or request.num_choices * request.max_tokens <= limit:
        return request
    fair = max(1, limit // request.num_choices)
    why = f"the limit is {limit} completion tokens a minute for all choices"
    return replace(request, generations=tuple(each.with_at_most(fair, why) for each in request.generations))


async def _prompt_tokens(caller: Caller, request: TextRequest, deployment: Deployment) -> list[tuple[int, int]]:
    """The most and the least that each prompt can have: as the engine counts it, where a limit depends on it and the
    engine can tell. One that could not is not asked again: it may have taken its time to say nothing."""
    if not caller.needs_prompt_tokens:
        return [(0, 0)] * len(request.generations)
    found, can_tell = [], True
    for generation in request.generations:
        counted = await deployment.engine.count_tokens(generation) if can_tell else None
        can_tell = counted is not None
        most = _most_prompt_tokens(generation, deployment.context_length) if counted is None else counted
        found.append((most, counted or 0))
    return found


def _most_completion_tokens(generation: Generation, prompt_tokens: int, window: int | None) -> int:
    """Beside a prompt of so many tokens at least."""
    left = generation.max_tokens if window is None else max(0, window - prompt_tokens)
    return generation.n * min(generation.max_tokens, left)


def _most_nanos(price: Price, generation: Generation, prompt: tuple[int, int], window: int | None) -> int:
    """Prompt and answer share the window. It costs most with the longest prompt, or with the longest beside which an
    answer still has all that it may: up to there each token more costs more, after it always more or always less."""
    most, least = prompt
    beside = most if window is None else min(most, max(least, window - generation.max_tokens))
    return max(price.most(each, _most_completion_tokens(generation, each, window)) for each in (most, beside))


def _most_prompt_tokens(generation: Generation, window: int | None) -> int:
    """A token is at least a byte of text, images are no more than the window, and so is all of it."""
    if generation.tokens is not None:
        most = len(generation.tokens) + 1
    elif generation.messages is None:
        most = len((generation.text or "").encode()) + 1
    else:
        most = _most_chat_tokens(without_images(generation))
    if generation.has_images:
        most += window or LONGEST_CONTEXT
    return most if window is None else min(most, window)


def _most_chat_tokens(generation: Generation) -> int:
    others = (generation.schema, generation.template_kwargs)
    said = filter(None, (*(generation.messages or ()), *generation.tools, *others))
    most = sum(len(dumped(each)) + _PER_MESSAGE for each in said) + _PER_MESSAGE
    return most + _OF_TOOLS if generation.tools else most


def _conflict() -> KeyConflict:
    return KeyConflict(
        "Idempotency-Key: it was used for another request. Use a new key for a new request, and the same for a retry."
    )
