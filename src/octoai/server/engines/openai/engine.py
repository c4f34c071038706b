"""Any OpenAI-shaped server as an engine: vLLM, llama-server, Ollama, over TCP or a unix socket.

Requests are streamed, whatever our client asked, but for brief ones (decision 0014): only then does leaving free the
server's slot (a non-streaming request to llama.cpp that is left keeps its slot to the end), and only then are tokens
counted as they come. Only the paths below and those of its dialect are used, never anything a client could choose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from typing import Any, cast
from urllib.parse import urlsplit

import orjson

from octoai.server.engines.base import Event, Generation, OnLeft, OnText
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.arrivals import Arrivals
from octoai.server.engines.openai.briefly import Briefly
from octoai.server.engines.openai.dialects import DIALECTS
from octoai.server.engines.openai.exchange import CannotConnect, Exchange, Failures, Pool
from octoai.server.engines.openai.plain import MAX_TOKENS, Habits
from octoai.server.engines.openai.refusals import refusal
from octoai.server.engines.openai.whole import is_of_streams, is_streamed, whole
from octoai.server.errors import BadRequest, EngineFailed, Refusal, Unavailable
from octoai.server.logs import without_password
from octoai.server.machine import descriptors

log = logging.getLogger("octoai.engine")

PROBE_SECONDS = 5.0
COUNT_SECONDS = 5.0
COUNTED_BYTES_PER_SECOND = 700_000  # of a slow text
# What comes faster goes on together. To be woken for a token costs as much as what is done with it, and most of all
# beside an engine that has emptied the processor's caches meanwhile.
STREAM_GATHER_SECONDS = 1 / 30  # text that moves as often is smooth to the eye, as a film is
WHOLE_GATHER_SECONDS = 0.1  # nobody sees it before the answer is whole
MAX_BRIEF_BYTES = 16 * 1024  # of what is asked
MAX_ERROR_BYTES = 64 * 1024
MAX_SAID_BYTES = 4 * 1024 * 1024  # of an answer to a short question
MAX_COUNTED_BYTES = 32 * 1024 * 1024  # of one that lists tokens: more than any window has
UNKNOWN = (404, 405, 501)  # of a server that has no such path


class OpenAIEngine:
    """`url` is `http://host:port/v1` or `unix:/path/to/socket`; `key` is sent as a bearer token."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        dialect: str = "openai",
        key: str | None = None,
        num_slots: int = 256,
        context_length: int | None = None,
        stall_seconds: float = 300.0,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self.dialect = DIALECTS[dialect]
        self.num_slots = num_slots
        self.max_choices = self.dialect.max_choices
        self._briefly = Briefly(gives_whole=self.dialect.gives_whole)
        self.context_length = context_length
        self._pool = Pool(url, key=key, keeps_alive=self.dialect.keeps_alive)
        # Where the server's paths begin, and where those of OpenAI's API do.
        self._base = "/v1" if url.startswith("unix:") else urlsplit(url).path.rstrip("/")
        self._root = self._base.removesuffix("/v1")
        self._stall_seconds = stall_seconds
        self._on_progress = on_progress or self._heard
        self._habits = Habits()
        self._failures = Failures(self._failed)
        self._no_descriptors = descriptors.Complaint(log, " for a connection to an engine")
        self._is_ready = self._was_heard = False
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    async def start(self) -> None:
        """Ask once, then keep asking in the background: a server of somebody else's may come and go."""
        await self.connect()
        if not self._is_ready:
            shown = without_password(self.url)
            log.warning("engine %s does not answer yet; it is asked again every %.0f s", shown, PROBE_SECONDS)
        self._probe = asyncio.create_task(self._keep_probing())

    async def connect(self) -> Mapping[str, Any] | None:
        """Whether it answers, and what it says of its model. Sets `is_ready` and `context_length`."""
        listed, is_busy, self._was_heard = None, False, False
        exchange = self._pool.exchange("GET", self._base + "/models")
        with closing(exchange), suppress(ValueError):
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    if await exchange.answered(PROBE_SECONDS) == 200:
                        listed = orjson.loads(await exchange.body(MAX_SAID_BYTES, PROBE_SECONDS))
            except TimeoutError:
                is_busy = self._was_heard  # with its answers, of which something came meanwhile
            except OSError as error:
                if error.errno in descriptors.OUT:
                    return None  # it is for want of ours, which says nothing of the engine
        self._is_ready = is_busy or isinstance(listed, dict)
        described = _described(listed, self.model) if isinstance(listed, dict) else None
        if described is not None:
            meta = described.get("meta")
            meta = meta if isinstance(meta, dict) else {}
            window = described.get("max_model_len") or meta.get("n_ctx")
            if type(window) is int and 0 < window < MAX_TOKENS:
                self.context_length = window
        return described

    def _heard(self) -> None:
        self._was_heard = True

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        self._pool.close()

    def unsupported(self, generation: Generation) -> str | None:
        return self.dialect.unsupported(generation)

    async def count_tokens(self, generation: Generation) -> int | None:
        counting = self.dialect.counting(self._within(generation), self.model)
        if counting is None:
            return None
        answer: bytes | None = None
        try:
            while True:
                path, body = next(counting) if answer is None else counting.send(answer)
                answer = await self._asked(path, body, generation)
                if answer is None:
                    return None
        except StopIteration as counted:
            return cast("int | None", counted.value)
        except Refusal:
            if generation.has_images:  # it may be the question without them that it refuses, or what it has of them
                return None
            raise
        except (KeyError, TypeError, ValueError):
            raise EngineFailed("The engine counted tokens in a shape that is not the protocol's.") from None

    async def _asked(self, path: str, body: bytes, generation: Generation) -> bytes | None:
        """The whole answer to a question about a prompt; None from a server that does not know it, or where the answer
        takes too long, or is too long."""
        seconds = COUNT_SECONDS + len(body) / COUNTED_BYTES_PER_SECOND
        with self._failures, closing(self._pool.exchange("POST", self._root + path, body)) as exchange:
            try:
                async with asyncio.timeout(seconds):
                    status = await exchange.answered(seconds)
                    said = await exchange.body(MAX_COUNTED_BYTES if status == 200 else MAX_ERROR_BYTES, seconds)
            except TimeoutError:
                return None
            is_whole, retry_after = exchange.is_over, exchange.retry_after
        if status == 200:
            return said if is_whole else None
        if status in UNKNOWN:
            return None
        raise refusal(status, said, generation, self.context_length, retry_after)

    def generate(
        self, generation: Generation, on_left: OnLeft | None = None, on_text: OnText | None = None
    ) -> AsyncGenerator[Sequence[Event]]:
        return (self._brief if self._briefly.is_brief(generation) else self._streamed)(
            self._within(generation), on_left, on_text
        )

    async def _brief(
        self, generation: Generation, on_left: OnLeft | None, on_text: OnText | None
    ) -> AsyncGenerator[Sequence[Event]]:
        body = self.dialect.body(generation, self.model, is_stream=False) if self._briefly.is_quick else b""
        was_whole = 0 < len(body) <= MAX_BRIEF_BYTES
        if was_whole:
            events: Sequence[Event] = ()
            try:
                with self._briefly.timed():
                    events = await self._whole(body, generation, on_left)
            except BadRequest as refused:
                if not is_of_streams(refused):
                    raise
            if events:
                yield events
                return
            log.info("engine %s gives no whole answers, or none whose tokens it counts: it is asked again", self.model)
        with self._briefly.timed():
            async with aclosing(self._streamed(generation, on_left, on_text)) as batches:
                async for batch in batches:
                    if was_whole:  # what is no stream either says nothing of the server
                        self._briefly.gives_whole = False
                    yield batch

    async def _whole(self, body: bytes, generation: Generation, on_left: OnLeft | None) -> Sequence[Event]:
        """An answer that is asked for as a whole; nothing where the server does not say how many tokens it has.
        Cancelled, it waits a moment for the answer, which is counted then."""
        blocks: list[bytes] = []
        with self._failures, closing(self._pool.exchange("POST", self._path(generation), body)) as exchange:
            try:
                await self._accepted(exchange, generation)
                said = await exchange.body(MAX_SAID_BYTES, self._stall_seconds, blocks)
            except asyncio.CancelledError:
                await exchange.leave(blocks.append, hangs_up=False)
                if on_left is not None and exchange.is_over:
                    with suppress(Refusal):  # there is nobody left to tell
                        on_left(whole(b"".join(blocks), generation))
                raise
            if not exchange.is_over:
                raise EngineFailed("The engine broke off in the middle of its answer.")
        self._on_progress()
        if is_streamed(said):
            self._briefly.gives_whole = False
        return whole(said, generation)

    async def _streamed(
        self, generation: Generation, on_left: OnLeft | None, on_text: OnText | None
    ) -> AsyncGenerator[Sequence[Event]]:
        body = self.dialect.body(generation, self.model)
        exchange = self._pool.exchange("POST", self._path(generation), body)
        answer, is_told = Answer(generation, self._habits), False
        arrivals = Arrivals(answer, on_progress=self._on_progress, on_text=on_text)
        gather = 0.0  # what comes first goes on at once
        try:
            with self._failures:
                await self._accepted(exchange, generation)
                has_more = True
                while has_more and not answer.is_whole:
                    has_more = await exchange.feed(arrivals.take, self._stall_seconds, gather)
                    events = arrivals.given()
                    is_told = answer.is_whole
                    if events:
                        yield events
                        gather = STREAM_GATHER_SECONDS if generation.is_stream else WHOLE_GATHER_SECONDS
                if not answer.is_whole:
                    raise EngineFailed("The engine broke off in the middle of its answer.")
                if not exchange.is_over:
                    await exchange.end()
        except Refusal:
            if events := arrivals.given():  # what came before it went wrong
                yield events
            raise
        except (GeneratorExit, asyncio.CancelledError):
            if not answer.is_whole:
                with suppress(Refusal):  # there is nobody left to tell
                    await exchange.leave(answer.events)
            raise
        finally:
            exchange.close()
            if on_left is not None and not is_told and (counted := answer.so_far()):
                on_left(counted)

    async def _accepted(self, exchange: Exchange, generation: Generation) -> None:
        """Return when the engine has begun its answer. Raises what it says where it refuses."""
        try:
            status = await exchange.answered(self._stall_seconds)
        except TimeoutError:
            raise EngineFailed(f"The engine did not answer for {self._stall_seconds:.0f} s.") from None
        if status != 200:
            said = await exchange.body(MAX_ERROR_BYTES, self._stall_seconds)
            raise refusal(status, said, generation, self.context_length, exchange.retry_after)

    def _path(self, generation: Generation) -> str:
        return self._base + self.dialect.path(generation)

    def _failed(self, error: OSError) -> Refusal:
        """What can become of a connection, as a refusal."""
        if error.errno in descriptors.OUT:
            self._no_descriptors.say()
            return Unavailable("Too many requests are under way here.", retry_after=1, code="overloaded")
        if isinstance(error, CannotConnect):
            self._is_ready = False
            return Unavailable("The engine does not answer.", retry_after=PROBE_SECONDS)
        if isinstance(error, TimeoutError):  # for servers without a supervisor of ours
            return EngineFailed(f"The engine sent nothing for {self._stall_seconds:.0f} s.")
        return EngineFailed("The engine broke off in the middle of its answer.")

    def _within(self, generation: Generation) -> Generation:
        """More than the window cannot be generated, and vLLM refuses to be asked for it. Raises BadRequest."""
        limit = self.context_length
        return generation if limit is None else generation.with_at_most(limit, "the model's context has no more tokens")

    async def _keep_probing(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            await self.connect()


def _described(listed: Mapping[str, Any], model: str) -> Mapping[str, Any] | None:
    """The server's entry for our model, or its only one."""
    data = listed.get("data")
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    named = [entry for entry in entries if entry.get("id") == model]
    if named:
        return named[0]
    return entries[0] if len(entries) == 1 else None
