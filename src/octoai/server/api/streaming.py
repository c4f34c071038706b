"""Answers that take time: an event stream, or one whole body.

A client that goes away ends its job at once, whether it streams or not, queued or not. Nothing is decided here;
settling is the job's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from types import TracebackType

from octoai.server.api.encoding import DONE, ChatEncoder, CompletionEncoder, error_event
from octoai.server.billing.money import usd
from octoai.server.engines.base import Event, Finished
from octoai.server.errors import InternalError, Refusal
from octoai.server.http.incoming import Headers, Incoming
from octoai.server.idempotency import Recording, pack
from octoai.server.service import Batch, Job

log = logging.getLogger("octoai.http")

Encoder = ChatEncoder | CompletionEncoder
SLOW_READER_SECONDS = 120.0
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class SlowReader(Exception):
    """The client has not read for so long that its connection is given up."""


class BrokenOff(Exception):
    """The answer ends here without its end; the connection is closed."""


async def answer(job: Job, encoder: Encoder, incoming: Incoming) -> None:
    """Run the job, and send what comes of it."""
    watched = _Watched(incoming, job.recording)
    try:
        async with job:  # outside, so that a client that leaves now does not disturb how it is settled
            with watched:
                if watched.has_cancelled:
                    await asyncio.sleep(0)  # it ends here, before its engine is asked
                out = incoming if job.recording is None else _Recorded(incoming, job.recording)
                await (_stream if job.request.stream else _whole)(job, encoder, out)
    except asyncio.CancelledError:
        if not watched.has_cancelled:
            raise


async def _whole(job: Job, encoder: Encoder, out: Incoming | _Recorded) -> None:
    """Every event gathered, then one body."""
    events: list[Event] = []
    async for batch in job.events():
        events += batch
    encoder.cost = cost = usd(job.cost_nanos)
    body = encoder.whole(events)
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-octoai-cost", cost.encode()),
        _served_model(job),
    )
    await job.finish(None if job.recording is None else await pack(200, headers, [body]))
    out.begin(200, headers)
    out.end(body)


async def _stream(job: Job, encoder: Encoder, out: Incoming | _Recorded) -> None:
    """Server-sent events. What can be refused is refused as a plain answer: headers leave with the first event."""
    batches = job.events()
    first = await anext(batches)
    out.begin(200, (*_STREAM_HEADERS, _served_model(job)))
    try:
        await _relay(job, encoder, out, first, batches)
    except Refusal as refusal:
        await _break_off(refusal, out)
    except SlowReader:
        log.warning("request %s: the client stopped reading; given up", job.id)
        raise
    except Exception:
        log.exception("request %s failed in its stream", job.id)
        await _break_off(InternalError(job.id), out)


async def _relay(
    job: Job, encoder: Encoder, out: Incoming | _Recorded, batch: Batch, batches: AsyncIterator[Batch]
) -> None:
    job.on_text = pass_on = partial(_passed_on, encoder, out)
    while not isinstance(batch[-1], Finished):
        if not pass_on(batch):
            await _caught_up(out)
            out.send(encoder.stream(batch))
        batch = await anext(batches)
    encoder.cost = usd(job.cost_nanos)
    last = encoder.stream(batch) + DONE
    await job.finish(None if job.recording is None else await job.recording.packed(last))
    # The end of the events and of the body in one write, or a client that stops at [DONE] loses its connection.
    if out.is_behind:
        await _caught_up(out)
    out.end(last)


def _passed_on(encoder: Encoder, out: Incoming | _Recorded, batch: Batch) -> bool:
    """Sent at once, unless it would have to wait behind what was sent before."""
    if out.is_behind:
        return False
    out.send(encoder.stream(batch))
    return True


async def _send(out: Incoming | _Recorded, block: bytes) -> None:
    if out.is_behind:
        await _caught_up(out)
    out.send(block)


async def _caught_up(out: Incoming | _Recorded) -> None:
    """A reader slower than the engine holds nobody up: the buffer is bounded, and so is the patience."""
    try:
        async with asyncio.timeout(SLOW_READER_SECONDS):
            await out.caught_up()
    except TimeoutError:
        if not (isinstance(out, _Recorded) and out.goes_on_alone()):
            raise SlowReader from None


async def _break_off(refusal: Refusal, out: Incoming | _Recorded) -> None:
    """An error event, and then no end of the body: the connection is closed, so that clients that skip events they do
    not know notice as well."""
    await _send(out, error_event(refusal.body()))
    raise BrokenOff from refusal


def _served_model(job: Job) -> tuple[bytes, bytes]:
    return b"x-octoai-served-model", job.deployment.model.id.encode("latin-1", "replace")


async def replay(recording: Recording, incoming: Incoming) -> None:
    """An answer that is recorded, or being recorded, under the client's Idempotency-Key."""
    incoming.request_id = recording.request_id  # it is that request's answer, and billed as that
    watched = _Watched(incoming)
    try:
        with watched:
            async for message in recording.replayed():
                if isinstance(message, bytes):
                    await _send(incoming, message)
                else:
                    # Where another process has given the answer, only now is it known which request's it is.
                    incoming.request_id = recording.request_id
                    status, headers = message
                    incoming.begin(status, (*headers, (b"idempotent-replayed", b"true")))
            incoming.end(b"")
    except asyncio.CancelledError:
        if not watched.has_cancelled:
            raise
    finally:
        recording.leave()


class _Recorded:
    """An answer that is also recorded, for those who ask again under its key."""

    def __init__(self, incoming: Incoming, recording: Recording) -> None:
        self._incoming, self._recording = incoming, recording
        self.caught_up = incoming.caught_up

    @property
    def is_behind(self) -> bool:
        return self._incoming.is_behind

    def goes_on_alone(self) -> bool:
        """Let go of a client that does not read, where others have joined: the answer goes on for them."""
        has_others = self._recording.num_readers > 1
        if has_others:
            self._incoming.give_up()
        return has_others

    def begin(self, status: int, headers: Headers) -> None:
        self._recording.begin(status, headers)
        self._incoming.begin(status, headers)

    def send(self, block: bytes) -> None:
        self._recording.add(block)
        self._incoming.send(block)

    def end(self, block: bytes) -> None:
        self._recording.end(block)
        self._incoming.end(block)


class _Watched:
    """Cancels what is inside when the client leaves. Others may have joined a recording: then that goes on as long as
    one of them is there."""

    def __init__(self, incoming: Incoming, recording: Recording | None = None) -> None:
        self._incoming = incoming
        self._recording = recording
        self.has_cancelled = self._is_over = False

    def __enter__(self) -> None:
        self._task = self._incoming.task
        if self._incoming.disconnected:
            self._left()
        else:
            self._incoming.on_left = self._left

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._incoming.on_left = None
        if self.has_cancelled:
            self._task.uncancel()

    def _left(self) -> None:
        if self._recording is None:
            self._cancel()
        else:
            self._recording.leave(self._cancel)

    def _cancel(self) -> None:
        if not self._is_over:
            self.has_cancelled = True
            self._task.cancel()
