"""The asynchronous shell: `_sync` with `await`, method by method. Decides as little as that one."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

from octoai import _answers, _calls, _endpoints, _events
from octoai._async_waits import until_stopped
from octoai._deadlines import Deadlines
from octoai._events import NOTHING, Nothing
from octoai._network import async_transport
from octoai._settings import Settings
from octoai._transport import AsyncResponse, Request, is_timeout
from octoai.core.request_options import RequestOptions
from octoai.errors import ApiConnectionError, ApiError, ApiTimeoutError, ServerError
from octoai.wire.answers import ChatCompletionChunk, ChatCompletionResponse, CompletionResponse, UsageStats
from octoai.wire.inference import InferenceFuture
from octoai.wire.params import ChatParams, CompletionParams
from octoai.wire.record import Answer, RawResponse, Record

T = TypeVar("T")
C = TypeVar("C", bound=Record)
A = TypeVar("A", bound=Answer)
_CLOSING: set[asyncio.Task[None]] = set()  # a loop keeps only weak references to its tasks


class Shell:
    """Carries calls out, over one transport."""

    def __init__(self, settings: Settings) -> None:
        self.defaults = _calls.Defaults(
            settings.access.base_url, settings.timeout, settings.max_retries, settings.default_headers
        )
        self._access = settings.access
        self._transport = settings.transport or async_transport(settings.httpx_client)

    async def open(self, call: _calls.Call, deadlines: Deadlines) -> tuple[AsyncResponse, int]:
        """The answer to a call, from its head on, and how many attempts it took."""
        failures = 0
        while True:
            try:
                return await self._attempt(call, failures, deadlines), failures + 1
            except ApiError as error:
                failures += 1
                error.attempts = failures
                wait = call.policy.delay(failures, error, chance=random.random())  # noqa: S311  # jitter, no secret
                if wait is None or not deadlines.allow(wait):
                    raise
            with suppress(TimeoutError):  # nobody wants the answer any more
                async with until_stopped(deadlines, None):
                    await asyncio.sleep(wait)

    async def answer(self, call: _calls.Call) -> RawResponse:
        """The whole answer to a call."""
        deadlines = Deadlines(call.timeout, streams=False)
        response, attempts = await self.open(call, deadlines)
        try:
            return RawResponse(response.status, response.headers, await _body(response, deadlines))
        except ApiError as error:
            error.attempts = attempts
            raise

    async def infer(self, endpoint_url: str, inputs: Any) -> Any:
        return _answers.parsed_json(await self.answer(_endpoints.infer(self.defaults, endpoint_url, inputs)))

    def infer_stream(self, endpoint_url: str, inputs: Any, map_fn: Callable[[Any], Any] | None) -> AsyncJsonStream:
        return AsyncJsonStream(
            self, _endpoints.infer(self.defaults, endpoint_url, inputs, streams=True), _events.JsonReader(map_fn)
        )

    async def infer_async(self, endpoint_url: str, inputs: Any) -> InferenceFuture:
        call = _endpoints.infer(self.defaults, endpoint_url, inputs, later=True)
        return _answers.record(InferenceFuture, await self.answer(call))

    async def response_url(self, future: InferenceFuture) -> str | None:
        return _answers.response_url(await self.answer(_endpoints.poll(self.defaults, future.poll_url)))

    async def future_result(self, future: InferenceFuture) -> Any:
        url = await self.response_url(future)
        return None if url is None else _answers.parsed_json(await self.answer(_endpoints.poll(self.defaults, url)))

    async def health_check(self, endpoint_url: str, timeout: float) -> int:
        ends = time.monotonic() + timeout
        while True:
            try:
                return (await self.answer(_endpoints.health(self.defaults, endpoint_url))).status_code
            except ServerError:
                if time.monotonic() + 1 >= ends:
                    raise
            await asyncio.sleep(1)

    async def close(self) -> None:
        await self._transport.close()

    async def _attempt(self, call: _calls.Call, failures: int, deadlines: Deadlines) -> AsyncResponse:
        request = call.request(await self._token(call.url, deadlines), failures)
        response = await self._send(request, deadlines)
        for _ in range(5):
            follow = call.redirected(request, response.status, response.headers)
            if follow is None:
                break
            await response.close()
            request = follow
            response = await self._send(request, deadlines)
        if response.status < 300:
            return response
        raw = RawResponse(response.status, response.headers, await _body(response, deadlines, whole=False))
        advice = call.token_advice(request, self._access) if response.status == 401 else None
        raise _answers.status_error(raw, advice=advice, now=time.time())

    async def _send(self, request: Request, deadlines: Deadlines) -> AsyncResponse:
        deadlines.send()
        return await self._transport.send(request, deadlines)

    async def _token(self, url: str, deadlines: Deadlines) -> str | None:
        if not self._access.covers(url):
            return None
        token = self._access.token
        if callable(token):
            token = token()
        if inspect.isawaitable(token):
            limit = until_stopped(deadlines, None if deadlines.allow(0) else 0)
            try:
                async with limit:
                    # One refresh may serve all of the user's calls: that one of them is stopped must not end it.
                    token = await (asyncio.shield(token) if isinstance(token, asyncio.Future) else token)
            except TimeoutError as error:
                if not limit.expired():
                    raise  # by the user's function
                raise deadlines.passed() from error
        return _calls.bearer(token)


async def _body(response: AsyncResponse, deadlines: Deadlines, *, whole: bool = True) -> bytes:
    """The body. Where not the `whole` is needed, what came of it before it broke off."""
    blocks = []
    try:
        decompressor = _answers.Decompressor(response.headers)
        while block := await response.receive(deadlines.waiting()):
            blocks.append(decompressor.feed(block))
        decompressor.end()
    except (OSError, ValueError) as error:
        await response.close()
        if whole and is_timeout(error):
            raise deadlines.passed() from error
        if whole:
            raise ApiConnectionError(message=f"the answer was cut off: {error}", headers=response.headers) from error
    except ApiTimeoutError:
        await response.close()
        if whole:
            raise
    except BaseException:
        await response.close()
        raise
    return b"".join(blocks)


class AsyncEventStream(Generic[T]):
    """The events of an answer, as they come: an iterator and a context manager.

    The request is sent when the first event is asked for, or on entering the context; its errors show then. A loop
    that was left early can be gone on with. `close()` and leaving the context close the connection at once, and so it
    is closed when nobody holds the stream any more. Another task may close it at any time; whoever waits for an event
    has an error then.
    """

    def __init__(self, shell: Shell, call: _calls.Call, reader: _events.EventReader[T]) -> None:
        self._shell = shell
        self._call = call
        self._reader = reader
        self._response: AsyncResponse | None = None
        self._raw: RawResponse | None = None
        self._attempts = 1
        self._opening: Deadlines | None = None
        self._over = False
        self._cut = False

    @property
    def raw_response(self) -> RawResponse | None:
        """Status and headers of the answer, once the request is sent. Its `body` is empty."""
        return self._raw

    @property
    def request_id(self) -> str | None:
        return None if self._raw is None else _answers.request_id(self._raw.headers)

    async def __aiter__(self) -> AsyncIterator[T]:
        while (value := await self._next()) is not NOTHING:
            yield value

    async def __anext__(self) -> T:
        if (value := await self._next()) is NOTHING:
            raise StopAsyncIteration
        return value

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection, unless the answer is complete. Asking for what was not read raises."""
        if not self._over:
            self._cut = self._reader.has_unread()
        self._over = True
        self._reader.drop()
        if self._response is not None:
            await self._response.close()
        elif self._opening is not None:
            self._opening.stop()

    async def aclose(self) -> None:
        """The same as `close`, under the name that asynchronous generators and `contextlib.aclosing` know."""
        await self.close()

    def __del__(self) -> None:
        response = getattr(self, "_response", None)
        if response is None or self._over:
            return
        # Forgotten half-read: closing takes an await, so the running loop, if there is one, is asked for it.
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        _CLOSING.add(task := loop.create_task(response.close()))
        task.add_done_callback(_CLOSING.discard)

    async def _begin(self) -> AsyncResponse:
        if self._response is None:
            self._refuse_if_closed()
            if self._opening is not None:
                raise RuntimeError("another task is reading this stream")
            self._opening = self._deadlines = Deadlines(self._call.timeout, streams=True)
            try:
                self._response, self._attempts = await self._shell.open(self._call, self._deadlines)
            except ApiError:
                self._refuse_if_closed()
                raise
            self._refuse_if_closed()  # meanwhile: the error closes what has come
            self._raw = RawResponse(self._response.status, self._response.headers, b"")
            if not self._reader.accepts(self._raw.headers):
                body = await _body(self._response, self._deadlines, whole=False)
                raise _answers.no_stream(dataclasses.replace(self._raw, body=body))
        return self._response

    async def _next(self) -> T | Nothing:
        """The next value, for which it reads on if it must; NOTHING at the end."""
        try:
            while (value := self._reader.take()) is NOTHING and not self._over:
                await self._read(self._response or await self._begin())
        except ApiError as error:
            await self._fail(error)
            raise
        except BaseException:
            await self.close()
            raise
        if value is NOTHING and self._cut:
            raise self._reader.interrupted(_events.CLOSED)
        return value

    def _refuse_if_closed(self) -> None:
        if self._over:
            raise self._reader.interrupted(_events.CLOSED)

    async def _read(self, response: AsyncResponse) -> None:
        """Until something has come, or the end."""
        reader, deadlines = self._reader, self._deadlines
        if reader.moved:
            reader.moved = False
            deadlines.content(started=reader.started)
        while not reader.done:
            try:
                block = await response.receive(deadlines.waiting())
            except (OSError, ValueError) as error:
                if is_timeout(error):
                    raise deadlines.passed() from error
                raise reader.interrupted(_events.CLOSED if self._over else f"too early: {error}") from error
            if not block:
                self._over = reader.end()
                return
            if reader.feed(block):
                return
        await response.finish()
        self._over = True

    async def _fail(self, error: ApiError) -> None:
        """Close, and say in the error what is known; it says why there is no more."""
        self._over, self._cut = True, False
        await self.close()
        self._reader.describe(error, self._raw, self._attempts)


class AsyncJsonStream(AsyncEventStream[Any]):
    """The events of any endpoint's stream, as parsed JSON or what the user's function made of it."""


class AsyncStream(AsyncEventStream[C], Generic[C, A]):
    """The chunks `C` of an answer `A`."""

    def __init__(
        self, shell: Shell, call: _calls.Call, reader: _events.ChunkReader[C], whole: _endpoints.Gather[A]
    ) -> None:
        super().__init__(shell, call, reader)
        self._whole = whole

    @property
    def usage(self) -> UsageStats | None:
        """What the service counted, as soon as it has said so; None until then. Ours says it in a stream only where
        that was asked for, with `stream_options={"include_usage": True}`."""
        usage: UsageStats | None = self._reader.usage
        return usage

    async def text(self) -> AsyncIterator[str]:
        """Only the text, of the first choice, piece by piece."""
        async for chunk in self:
            piece = _events.text_of_chunk(chunk)
            if piece:
                yield piece

    async def final(self) -> A:
        """The whole answer, as the call without `_stream` returns it: all choices, tool calls, log probabilities and
        usage, whether or not some of its chunks have been read already."""
        async for _ in self:
            pass
        return self._whole(self._reader, self._raw)


class AsyncTextGenClient:
    """Text generation. The parameters are `ChatParams` and `CompletionParams` (in `octoai.wire.params`); one that is
    None is sent as null. `extra_body` is for what is not a parameter."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    @_endpoints.signed(_endpoints.CHAT)
    async def create_chat_completion(
        self,
        *,
        request_options: RequestOptions | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Unpack[ChatParams],
    ) -> ChatCompletionResponse:
        """The answer to a chat, when it is complete."""
        call = _endpoints.CHAT.call(self._shell.defaults, params, options=request_options, extra_body=extra_body)
        return _answers.record(ChatCompletionResponse, await self._shell.answer(call))

    @_endpoints.signed(_endpoints.CHAT_STREAM)
    def create_chat_completion_stream(
        self,
        *,
        request_options: RequestOptions | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Unpack[ChatParams],
    ) -> AsyncStream[ChatCompletionChunk, ChatCompletionResponse]:
        """The answer to a chat, chunk by chunk."""
        call = _endpoints.CHAT_STREAM.call(self._shell.defaults, params, options=request_options, extra_body=extra_body)
        return AsyncStream(self._shell, call, _events.ChunkReader(ChatCompletionChunk), _endpoints.whole_chat)

    @_endpoints.signed(_endpoints.COMPLETION)
    async def create_completion(
        self,
        *,
        request_options: RequestOptions | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Unpack[CompletionParams],
    ) -> CompletionResponse:
        """A prompt's continuation, when it is complete."""
        call = _endpoints.COMPLETION.call(self._shell.defaults, params, options=request_options, extra_body=extra_body)
        return _answers.record(CompletionResponse, await self._shell.answer(call))

    @_endpoints.signed(_endpoints.COMPLETION_STREAM)
    def create_completion_stream(
        self,
        *,
        request_options: RequestOptions | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Unpack[CompletionParams],
    ) -> AsyncStream[CompletionResponse, CompletionResponse]:
        """A prompt's continuation, piece by piece."""
        call = _endpoints.COMPLETION_STREAM.call(
            self._shell.defaults, params, options=request_options, extra_body=extra_body
        )
        return AsyncStream(self._shell, call, _events.ChunkReader(CompletionResponse), _endpoints.whole_completion)
