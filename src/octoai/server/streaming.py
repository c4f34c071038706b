"""Answers that take time, as ASGI applications: an event stream, or one whole body.

Both watch the connection while the engine works: a client that goes away ends its job at once, whether it streams or
not (Starlette notices only for streams). Nothing is decided here; settling is the job's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import anyio
from starlette.types import Message, Receive, Scope, Send

from octoai.server.billing import usd
from octoai.server.encoding import DONE, ChatEncoder, CompletionEncoder, error_event
from octoai.server.engines.base import Event, Finished
from octoai.server.errors import InternalError, Refusal
from octoai.server.idempotency import Recording, pack
from octoai.server.service import Batch, Job

log = logging.getLogger("octoai.http")

Encoder = ChatEncoder | CompletionEncoder
SLOW_READER_SECONDS = 120.0


class SlowReader(Exception):
    """The client has not read for so long that its connection is given up."""


class _Answer:
    def __init__(self, job: Job, encoder: Encoder, headers: Mapping[str, str]) -> None:
        self.job = job
        self.encoder = encoder
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        recording = self.job.recording
        if recording is None:
            async with _watched(receive), self.job:
                await self.answer(send)
        else:
            # Others may have joined: the work goes on as long as one of them is there.
            async with _watched(receive, recording.leave), self.job:
                await self.answer(_recorded(send, recording))

    async def answer(self, send: Send) -> None:
        raise NotImplementedError

    def _start(self, content_type: bytes, *more: tuple[bytes, bytes]) -> Message:
        own = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in self.headers.items()]
        headers = [(b"content-type", content_type), *more, *own]
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
            await _send_in_time(send, self.encoder.stream(batch))
            batch = await anext(batches)
        self.encoder.cost_nanos = self.job.cost_nanos
        last = self.encoder.stream(batch) + DONE
        recording = self.job.recording
        await self.job.finish(None if recording is None else recording.packed(last))
        # The end of the events and of the body in one write, or a client that stops at [DONE] loses its connection.
        await _send_in_time(send, last, more_body=False)

    async def _break_off(self, refusal: Refusal, send: Send) -> None:
        """An error event, and then no end of the body: the server cuts the connection, so that clients that skip
        events they do not know notice as well."""
        await _send_in_time(send, error_event(refusal.body()))
        raise BrokenOff from refusal


class Replay:
    """An answer that is recorded, or being recorded, under the client's Idempotency-Key."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["request_id"] = self.recording.request_id  # it is that request's answer, and billed as that
        try:
            async with _watched(receive):
                async for message in self.recording.replayed():
                    if message["type"] == "http.response.start":
                        message["headers"] = [*message["headers"], (b"idempotent-replayed", b"true")]
                    await send(message)
        finally:
            self.recording.leave()


def _recorded(send: Send, recording: Recording) -> Send:
    async def both(message: Message) -> None:
        recording.add(message)
        await send(message)

    return both


class BrokenOff(Exception):
    """The answer ends here without its end; the server closes the connection."""


async def _send_in_time(send: Send, body: bytes, *, more_body: bool = True) -> None:
    """A reader slower than the engine holds nobody up: the buffer is bounded, and so is the patience."""
    try:
        async with asyncio.timeout(SLOW_READER_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": more_body})
    except TimeoutError:
        raise SlowReader from None


@asynccontextmanager
async def _watched(
    receive: Receive, leave: Callable[[Callable[[], None]], None] = lambda cancel: cancel()
) -> AsyncIterator[None]:
    """Cancel what is inside when the client disconnects, or leave that to `leave`, which is given how to. Errors come
    out as they went in, not in a group."""
    error: BaseException | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_until_disconnected, receive, lambda: leave(group.cancel_scope.cancel))
        try:
            yield
        except Exception as raised:  # noqa: BLE001  # raised again below, outside the task group
            error = raised
        group.cancel_scope.cancel()
    if error is not None:
        raise error


async def _until_disconnected(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()
