"""The whole request, on one screen: `authenticate`, `admit` (everything that can refuse), then a `Job`.

HTTP is not known here; engines are known by their interface. A job is entered, its events are read, and leaving it
settles it once, whatever ended it: the last event, the client, the engine, or our own end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Self, TypeVar

import anyio

from octoai.server.accounts import Caller
from octoai.server.admission import Admission
from octoai.server.directory import Directory
from octoai.server.engines.base import Event, Finished, Generation, OnText, Started
from octoai.server.errors import Forbidden, NotHonoured, Refusal, Unavailable
from octoai.server.idempotency import Key, Recording
from octoai.server.ledger.ledger import Tab
from octoai.server.limits import Standings, standings
from octoai.server.metering import Meter, PartMeter
from octoai.server.metrics.families import Metrics
from octoai.server.params.generations import TextRequest
from octoai.server.parts import parts_of, renumbered
from octoai.server.router import Deployment, Router
from octoai.server.store.database import Connection, StoreError
from octoai.server.times import now_us

log = logging.getLogger("octoai.request")

MAX_NAMED = 20  # of the models that a token may use, where it asks for another

Batch = Sequence[Event]
T = TypeVar("T")


@dataclass
class Service:
    directory: Directory
    admission: Admission
    router: Router
    metrics: Metrics
    drain_seconds: float = 30.0
    allowed_origin: str | None = None  # whose pages may ask; "*": anybody's
    is_draining: bool = False
    jobs: set[Job] = field(default_factory=set)
    _num_coming: int = 0  # that wait to be admitted
    _has_ended: asyncio.Event = field(default_factory=asyncio.Event)  # a request, while it drains

    async def start(self) -> None:
        """Raises StoreError."""
        self.admission.books.start()
        await self.directory.start()
        self.admission.ledger.start()

    async def close(self) -> None:
        """After the last request: what the journal has goes into the database, if that is there."""
        await self.admission.ledger.close()
        await self.directory.close()
        await self.admission.books.close()

    def enter(self, job: Job) -> None:
        self.jobs.add(job)

    def leave(self, job: Job) -> None:
        self.jobs.discard(job)
        if self.is_draining:
            self._has_ended.set()

    @property
    def num_requests(self) -> int:
        """That have come before it was to drain, and have not ended: jobs, and those that may become some."""
        return len(self.jobs) + self._num_coming

    async def authenticate(self, authorization: str | None) -> Caller:
        """401 without a valid token: a hash and a look-up in memory, nothing else."""
        return await self.directory.authenticate(authorization)

    def known(self, token_hash: bytes) -> Caller | None:
        """The caller whose token has that hash, where nothing is to be waited for; 401 where it is good no more."""
        return self.directory.known(token_hash)

    def require(self, caller: Caller, *scopes: str) -> None:
        """403 unless the token has one of these scopes."""
        if caller.token.scopes.isdisjoint(scopes):
            raise Forbidden(f"This API token lacks the scope {' or '.join(map(repr, scopes))}.")

    async def unique_id(self, given: str) -> str:
        """The id that a client gave a request; a longer one where another request has it already."""
        return await self.admission.unique(given)

    async def admit(
        self,
        caller: Caller,
        request: TextRequest,
        request_id: str,
        key: Key | None = None,
        check_left: Callable[[], None] = lambda: None,
    ) -> Job | Recording:
        """Everything that can refuse before an engine is asked. A recording is the answer where the key has one.
        `check_left` raises something once the client has left."""
        self.require(caller, "inference")
        deployment = self.find(caller, request.model)
        if self.is_draining:
            raise self.shutting_down
        for generation in request.generations:
            name = deployment.engine.unsupported(generation)
            if name is not None:
                raise NotHonoured(name, deployment.model.id, self.router.named(request.model).id)
        if not deployment.engine.is_ready:
            raise Unavailable("The engine is not ready.", retry_after=2, code="engine_not_ready")

        def wait_on(recording: Recording) -> None:  # for another process: neither in an end, nor for nobody
            if self.is_draining:
                raise self.shutting_down
            if recording.num_readers == 1:
                check_left()

        meter, model = Meter(), self.router.named(request.model)
        self._num_coming += 1
        try:
            admitted = await self.admission.admit(
                caller, request, deployment, model, request_id, key, lambda: meter.usage, wait_on
            )
        finally:
            self._num_coming -= 1
            if self.is_draining:
                self._has_ended.set()  # who waits for it looks again when a job that it has become is entered
        if isinstance(admitted, Recording):
            return admitted
        return Job(admitted.request_id, caller, deployment, admitted.request, self, admitted.tab, meter,
                   standings=admitted.standings, recording=admitted.recording)  # fmt: skip

    async def read(self, action: Callable[[Connection], T]) -> T:
        """Ask the database, which knows by then of everything that has ended here. Raises StoreAway."""
        return await self.admission.books.read(action)

    async def report(self, caller: Caller, action: Callable[[Connection], T]) -> T:
        """As `read`, for what may take long. Raises StoreAway, RateLimited, Unavailable."""
        return await self.admission.books.report(caller.account.id, action)

    async def standings(self, caller: Caller) -> Standings:
        """How the caller stands with its limits. Raises StoreAway."""
        return await self.read(lambda db: standings(db, caller, now_us()))

    async def write(self, action: Callable[[Connection], T]) -> T:
        """Change the database; when this returns the change is on disk, and in force in this process as soon as it can
        read that. Raises StoreAway, and what `action` raises."""
        result = await self.admission.books.write(action)
        with suppress(StoreError):  # it is done, and to say that it was not would have it done again
            await self.directory.refresh()
        return result

    def may_use(self, caller: Caller, model: str) -> bool:
        """Whether the caller's token may use the model of that name."""
        allowed = caller.token.models
        return allowed is None or self.router.named(model).id in self.router.ids(allowed)

    def find(self, caller: Caller, name: str) -> Deployment:
        """What answers for the model of that name. Raises UnknownModel; Forbidden where the token may not use it."""
        deployment = self.router.find(name, caller.token.models)
        if not self.may_use(caller, name):
            ids = self.router.ids(caller.token.models or ())
            more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
            named = ", ".join(sorted(ids)[:MAX_NAMED])
            raise Forbidden(
                f"This API token may not use the model `{name[:200]}`; it may use {named}{more}.", param="model"
            )
        return deployment

    @property
    def refusal(self) -> Unavailable | None:
        """What every request is refused with now, where none could be recorded or nobody can tell who is asking."""
        try:
            self.admission.ledger.check()
            self.directory.check()
        except Unavailable as refusal:
            return refusal
        return None

    @property
    def shutting_down(self) -> Unavailable:
        return Unavailable("The service is shutting down.", retry_after=self.drain_seconds, code="shutting_down")

    async def drain(self, seconds: float | None = None) -> None:
        """Accept nothing more; return when every running request has ended, or after so long (`drain_seconds`)."""
        self.is_draining = True
        with anyio.move_on_after(self.drain_seconds if seconds is None else seconds):
            while self.num_requests:
                self._has_ended.clear()
                await self._has_ended.wait()


@dataclass(eq=False)
class Job:
    """One admitted request. Use: `async with job: async for batch in job.events(): …`, and before the last of the
    answer leaves `await job.finish()`. Once `on_text` is set, text may go there instead, where that takes it."""

    id: str
    caller: Caller
    deployment: Deployment
    request: TextRequest
    service: Service
    tab: Tab
    meter: Meter
    standings: Standings | None = None
    recording: Recording | None = None
    on_text: OnText | None = field(default=None, init=False)
    _events: AsyncGenerator[Batch] | None = field(default=None, init=False)
    _num_parts: int = field(default=0, init=False)

    async def __aenter__(self) -> Self:
        self.service.enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Every step whatever becomes of the one before. The tab is closed as soon as it is asked to be; what is waited
        # for there is its being on disk.
        try:
            if self._events is not None:
                await self._events.aclose()
        finally:
            outcome = self._outcome(error)
            try:
                await self.tab.close(outcome)
            finally:
                self.service.admission.ended(self.caller, self.recording, error)
                self.service.leave(self)
                self._count(outcome, error)

    @property
    def cost_nanos(self) -> int:
        """What it costs by the tokens counted so far."""
        return self.tab.price.charge(self.meter.usage)

    async def finish(self, answer: str | None = None) -> None:
        """Settle, with the whole answer where it is to be kept. What leaves afterwards is in the ledger."""
        await self.tab.settle("finished", answer)

    def events(self) -> AsyncGenerator[Batch]:
        """Batches of events, choices numbered through. The first one comes when nothing can be refused any more."""
        parts = parts_of(self.request.generations, self.deployment.engine.max_choices)
        self._num_parts = len(parts)
        self._events = self._part(*parts[0]) if len(parts) == 1 else self._merged(parts)
        return self._events

    async def _part(self, prompt: int, first: int, generation: Generation) -> AsyncGenerator[Batch]:
        """One request to the engine, in its turn."""
        part = self.meter.part(prompt)
        tokens, is_durable = generation.most_tokens(self.deployment.context_length), False
        metrics = self.service.metrics.of(self.deployment)
        may_take = self.request.stream and self._num_parts == 1
        on_text = partial(self._take, part, metrics) if may_take else None
        async with self.deployment.queue.turn(self.caller.account.id, tokens, is_admitted=self._has_had_turn) as ended:
            self.meter.took_turn()
            self.tab.open()
            batches = self.deployment.engine.generate(generation, part.count, on_text)
            try:
                async for batch in batches:
                    self._observe(batch, part.count(batch), metrics)
                    if part.is_finished:
                        ended()
                    # The end of the only part waits to be settled; that of one among others does not.
                    if self.request.stream and not is_durable and (self._num_parts > 1 or not part.is_finished):
                        if not self.tab.is_durable:
                            await self.tab.durable()
                        is_durable = True
                    yield batch if first == 0 else renumbered(batch, first)
            finally:
                await batches.aclose()

    def _has_had_turn(self) -> bool:
        return self.meter.turn is not None

    def _take(self, part: PartMeter, metrics: SimpleNamespace, batch: Batch) -> bool:
        """Text for which this request's task need not wake up."""
        if self.on_text is None or not self.on_text(batch):
            return False
        self._observe(batch, part.count(batch), metrics)
        return True

    def _observe(self, batch: Batch, num_tokens: int, metrics: SimpleNamespace) -> None:
        before = self.meter.last_token
        now = self.meter.passed(batch, is_stream=self.request.stream)
        last = batch[-1]
        if isinstance(batch[0], Started) and isinstance(last, Finished) and not self.request.stream:  # it came in one
            num_tokens, before = last.usage.completion_tokens, None
        if num_tokens:
            metrics.iteration_tokens.observe(num_tokens)
            if before is not None:
                metrics.inter_token.observe((now - before) / num_tokens)

    async def _merged(self, parts: Sequence[tuple[int, int, Generation]]) -> AsyncGenerator[Batch]:
        """Several requests to the engine as one: their events as they come, and one end for all.

        No more of them than the engine has slots wait at once: a request with many choices is still one request.
        """
        slots = asyncio.Semaphore(self.deployment.queue.num_slots)
        arrived: asyncio.Queue[Batch | BaseException | None] = asyncio.Queue(maxsize=2 * len(parts))

        async def read(prompt: int, first: int, generation: Generation) -> None:
            try:
                async with slots, aclosing(self._part(prompt, first, generation)) as batches:
                    async for batch in batches:
                        await arrived.put(batch)
                await arrived.put(None)
            except Exception as error:  # noqa: BLE001  # raised again below, where the request is
                await arrived.put(error)

        tasks = [asyncio.create_task(read(*part)) for part in parts]
        reasons: dict[int, str] = {}
        try:
            for _ in parts:
                while (batch := await arrived.get()) is not None:
                    if isinstance(batch, BaseException):
                        raise batch
                    if isinstance(batch[-1], Finished):
                        reasons.update(batch[-1].reasons)
                        batch = batch[:-1]
                    if batch:
                        yield batch
            yield (Finished(reasons, self.meter.usage),)
        finally:
            for task in tasks:
                task.cancel()
            with anyio.CancelScope(shield=True):  # each still reads what its engine has written until it is left
                await asyncio.gather(*tasks, return_exceptions=True)

    def _outcome(self, error: BaseException | None) -> str:
        parts = self.meter.parts
        if self._num_parts and len([part for part in parts if part.is_finished]) == self._num_parts:
            return "finished"
        refusal = _refusal(error)
        if refusal is not None and refusal.status < 500:
            return "refused"
        return "failed" if isinstance(error, Exception) else "aborted"

    def _count(self, outcome: str, error: BaseException | None) -> None:
        usage, token_id = self.meter.usage, self.caller.token.id
        cost = self.tab.price.charge(usage)
        self.service.metrics.count_job(self.deployment, self.request, self.meter, usage, outcome, token_id, cost)
        if log.isEnabledFor(logging.INFO):
            log.info("request", extra={"fields": self._line(outcome, _refusal(error))})

    def _line(self, outcome: str, refusal: BaseException | None) -> dict[str, object]:
        """What is logged of a request: no prompt, no answer."""
        meter, usage, now = self.meter, self.meter.usage, self.meter.clock()
        return {
            "request_id": self.id,
            "account": self.caller.account.id,
            "token": self.caller.token.id,
            "model": self.request.model,
            "served_model": self.deployment.model.id,
            "stream": self.request.stream,
            "outcome": outcome,
            "finish_reason": ",".join(dict.fromkeys(meter.reasons.values())) or None,
            "error": getattr(refusal, "code", None),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost_nanos": self.cost_nanos,
            "queue_ms": _ms(meter.received, meter.turn),
            "first_token_ms": _ms(meter.received, meter.first_token),
            "total_ms": _ms(meter.received, now),
        }


def _refusal(error: BaseException | None) -> Refusal | None:
    """A stream's error event is sent first and the connection cut then: the refusal is the cause of that error."""
    for each in (error, getattr(error, "__cause__", None)):
        if isinstance(each, Refusal):
            return each
    return None


def _ms(start: float, end: float | None) -> float | None:
    return None if end is None else round((end - start) * 1000, 1)
