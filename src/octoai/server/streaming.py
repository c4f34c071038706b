"""Answers that take time, as ASGI applications: an event stream, or one whole body.

Both watch the connection while the engine works: a client that goes away ends its job at once, whether it streams or
not (Starlette notices only for streams). Nothing is decided here; settling is the job's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from starlette.types import Message, Receive, Scope, Send

from octoai.server.billing import usd
from octoai.server.encoding import DONE, ChatEncoder, CompletionEncoder, error_event
from octoai.server.engines.base import Event, Finished
from octoai.server.errors import InternalError, Refusal
from octoai.server.idempotency import Recording, pack
from octoai.server.presence import KEY as PRESENCE
from octoai.server.presence import Presence
from octoai.server.service import Batch, Job

log = logging.getLogger("octoai.http")

Encoder = ChatEncoder | CompletionEncoder
SLOW_READER_SECONDS = 120.0


class SlowReader(Exception):
    """The client has not read for so long that its connection is given up."""


class _Answer:
    def __init__(self, job: Job, encoder: Encoder) -> None:
        self.job = job
        self.encoder = encoder
        self.presence: Presence | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        recording = self.job.recording
        self.presence = scope["state"].get(PRESENCE)
        # Others may have joined a recording: the work goes on as long as one of them is there.
        watched = _Watched(scope, receive) if recording is None else _Watched(scope, receive, recording.leave)
        try:
            async with self.job:  # outside, so that a client that leaves now does not disturb how it is settled
                with watched:
                    await self.answer(send if recording is None else _recorded(send, recording))
        except asyncio.CancelledError:
            if not watched.has_cancelled:
                raise

    async def answer(self, send: Send) -> None:
        raise NotImplementedError

    def _start(self, content_type: bytes, *more: tuple[bytes, bytes]) -> Message:
        served = self.job.deployment.model.id.encode("latin-1", "replace")
        headers = [(b"content-type", content_type), *more, (b"x-octoai-served-model", served)]
        return {"type": "http.response.start", "status": 200, "headers": headers}


class WholeAnswer(_Answer):
    """Every event gathered, then one body."""

    async def answer(self, send: Send) -> None:
        events: list[Event] = []
        async for batch in self.job.events():
            events.extend(batch)
        self.encoder.cost_nanos = cost = self.job.cost_nanos
        body = self.encoder.whole(events)
        length, price = str(len(body)).encode(), usd(cost).encode()
        start = self._start(b"application/json", (b"content-length", length), (b"x-octoai-cost", price))
        await self.job.finish(None if self.job.recording is None else pack(start, body))
        await send(start)
        await send({"type": "http.response.body", "body": body})


class EventStream(_Answer):
    """Server-sent events. What can be refused is refused as a plain answer: headers leave with the first event."""

    async def answer(self, send: Send) -> None:
        batches = self.job.events()
        first = await anext(batches)
        send = _in_time(send, self.presence)
        await send(
            self._start(
                b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")
            )
        )
        try:
            await self._relay(first, batches, send)
        except Refusal as refusal:
            await self._break_off(refusal, send)
        except SlowReader:
            log.warning("request %s: the client stopped reading; given up", self.job.id)
            raise
        except Exception:
            log.exception("request %s failed in its stream", self.job.id)
            await self._break_off(InternalError(self.job.id), send)

    async def _relay(self, batch: Batch, batches: AsyncIterator[Batch], send: Send) -> None:
        while not isinstance(batch[-1], Finished):
            await send(_more(self.encoder.stream(batch)))
            batch = await anext(batches)
        self.encoder.cost_nanos = self.job.cost_nanos
        last = self.encoder.stream(batch) + DONE
        recording = self.job.recording
        await self.job.finish(None if recording is None else recording.packed(last))
        # The end of the events and of the body in one write, or a client that stops at [DONE] loses its connection.
        await send({"type": "http.response.body", "body": last})

    async def _break_off(self, refusal: Refusal, send: Send) -> None:
        """An error event, and then no end of the body: the server cuts the connection, so that clients that skip
        events they do not know notice as well."""
        await send(_more(error_event(refusal.body())))
        raise BrokenOff from refusal


class Replay:
    """An answer that is recorded, or being recorded, under the client's Idempotency-Key."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["request_id"] = self.recording.request_id  # it is that request's answer, and billed as that
        watched = _Watched(scope, receive)
        try:
            with watched:
                async for message in self.recording.replayed():
                    if message["type"] == "http.response.start":
                        message["headers"] = [*message["headers"], (b"idempotent-replayed", b"true")]
                        # Where another process has given the answer, only now is it known which request's it is.
                        scope["state"]["request_id"] = self.recording.request_id
                    await send(message)
        except asyncio.CancelledError:
            if not watched.has_cancelled:
                raise
        finally:
            self.recording.leave()


def _recorded(send: Send, recording: Recording) -> Send:
    async def both(message: Message) -> None:
        recording.add(message)
        await send(message)

    return both


class BrokenOff(Exception):
    """The answer ends here without its end; the server closes the connection."""


def _more(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _in_time(send: Send, presence: Presence | None) -> Send:
    """A reader slower than the engine holds nobody up: the buffer is bounded, and so is the patience. Where nothing has
    to wait, no time is taken."""

    async def sent(message: Message) -> None:
        if presence is not None and not presence.is_behind():
            await send(message)
            return
        try:
            async with asyncio.timeout(SLOW_READER_SECONDS):
                await send(message)
        except TimeoutError:
            raise SlowReader from None

    return sent


class _Watched:
    """Cancels what is inside when the client disconnects, or leaves that to `leave`, which is given how to."""

    def __init__(
        self, scope: Scope, receive: Receive, leave: Callable[[Callable[[], None]], None] = lambda cancel: cancel()
    ) -> None:
        self._presence = scope["state"].get(PRESENCE)
        self._receive = receive
        self._leave = leave
        self.has_cancelled = self._is_over = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._presence is None:  # another server than ours: it tells who waits for it
            self._waiting = asyncio.create_task(self._until_disconnected())
        elif self._presence.has_left:
            self._leave(self._cancel)
        else:
            self._presence.on_left = lambda: self._leave(self._cancel)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        if self._presence is None:
            self._waiting.cancel()
        else:
            self._presence.on_left = None
        if self.has_cancelled:
            self._task.uncancel()

    async def _until_disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave(self._cancel)

    def _cancel(self) -> None:
        if not self._is_over:
            self.has_cancelled = True
            self._task.cancel()
