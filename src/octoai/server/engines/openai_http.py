"""Any OpenAI-shaped server as an engine: vLLM, llama-server, Ollama, over TCP or a unix socket.

Requests are always streamed, whatever our client asked for: only then does leaving free the server's slot (a
non-streaming request to llama.cpp that is left keeps its slot to the end), and only then are tokens counted as they
come. Only the paths below and those of its dialect are used, never anything a client could choose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import aiohttp

from octoai.server.engines.base import Event, Generation, OnLeft
from octoai.server.engines.call import Call
from octoai.server.engines.dialects import DIALECTS
from octoai.server.engines.reader import Answer
from octoai.server.engines.refusals import refusal
from octoai.server.errors import EngineFailed, Unavailable

log = logging.getLogger("octoai.engine")

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 5.0
COUNT_SECONDS = 5.0
END_SECONDS = 0.5
MAX_ERROR_BYTES = 64 * 1024
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
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.url = url
        self.model = model
        self.dialect = DIALECTS[dialect]
        self.num_slots = num_slots
        self.max_choices = self.dialect.max_choices
        self.context_length = context_length
        self._key = key
        self._stall_seconds = stall_seconds
        self._on_progress = on_progress
        self._session: aiohttp.ClientSession | None = None
        self._is_ready = False
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    async def start(self) -> None:
        """Ask once, then keep asking in the background: a server of somebody else's may come and go."""
        await self.connect()
        if not self._is_ready:
            log.warning("engine %s does not answer yet; it is asked again every %.0f s", self.url, PROBE_SECONDS)
        self._probe = asyncio.create_task(self._keep_probing())

    async def connect(self) -> Mapping[str, Any] | None:
        """Whether it answers, and what it says of its model. Sets `is_ready` and `context_length`."""
        try:
            async with (
                asyncio.timeout(PROBE_SECONDS),
                self._http().get("/v1/models" if self._is_unix else self._base + "/models") as response,
            ):
                listed = await response.json(content_type=None) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            listed = None
        self._is_ready = isinstance(listed, dict)
        described = _described(listed, self.model) if isinstance(listed, dict) else None
        if described is not None:
            meta = described.get("meta")
            meta = meta if isinstance(meta, dict) else {}
            window = described.get("max_model_len") or meta.get("n_ctx")
            self.context_length = window if isinstance(window, int) else self.context_length
        return described

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def unsupported(self, generation: Generation) -> str | None:
        return self.dialect.unsupported(generation)

    async def count_tokens(self, generation: Generation) -> int | None:
        counting = self.dialect.counting(self._within(generation), self.model)
        if counting is None:
            return None
        answer: Mapping[str, Any] | None = None
        try:
            while True:
                path, body = next(counting) if answer is None else counting.send(answer)
                answer = await self._asked(path, body, generation)
                if answer is None:
                    return None
        except StopIteration as counted:
            return int(counted.value)
        except (KeyError, TypeError, ValueError):
            raise EngineFailed("The engine counted tokens in a shape that is not the protocol's.") from None

    async def _asked(self, path: str, body: bytes, generation: Generation) -> Mapping[str, Any] | None:
        """The whole answer to a short question, None from a server that does not know it."""
        url = path if self._is_unix else self._base.removesuffix("/v1") + path
        with self._failures_named():
            try:
                async with asyncio.timeout(COUNT_SECONDS), await self._sent(url, body) as response:
                    if response.status == 200:
                        return dict(await response.json(content_type=None))
                    said = await response.content.read(MAX_ERROR_BYTES)
            except TimeoutError:
                raise EngineFailed(f"The engine did not count tokens in {COUNT_SECONDS:.0f} s.") from None
        if response.status in UNKNOWN:
            return None
        raise refusal(response.status, said, generation, self.context_length)

    async def generate(self, generation: Generation, on_left: OnLeft | None = None) -> AsyncGenerator[Sequence[Event]]:
        answer, is_told = Answer(generation), False
        try:
            async with self._post(generation, answer) as response:
                while not answer.is_whole and (block := await self._block(response)):
                    self._on_progress()
                    events = answer.events(block)
                    is_told = answer.is_whole
                    if events:
                        yield events
                if not answer.is_whole:
                    raise EngineFailed("The engine broke off in the middle of its answer.")
                await _end(response)
        finally:
            if on_left is not None and not is_told and (counted := answer.so_far()):
                on_left(counted)

    @asynccontextmanager
    async def _post(self, generation: Generation, answer: Answer) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer's head. Who leaves this block before the answer is whole leaves the engine, and the answer reads
        what that had already written."""
        body = self.dialect.body(self._within(generation), self.model)
        url = ("/v1" if self._is_unix else self._base) + self.dialect.path(generation)
        call = Call(lambda note: self._sent(url, body, note))
        try:
            with self._failures_named():
                response = await call.response(self._stall_seconds)
                if response.status != 200:
                    said = await response.content.read(MAX_ERROR_BYTES)
                    raise refusal(response.status, said, generation, self.context_length)
                yield response
        except (GeneratorExit, asyncio.CancelledError):
            if not answer.is_whole:
                await call.leave(answer.events)
            raise
        finally:
            await call.close()

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """What can become of a connection, as refusals."""
        try:
            yield
        except aiohttp.ClientConnectorError:
            self._is_ready = False
            raise Unavailable("The engine does not answer.", retry_after=PROBE_SECONDS) from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineFailed("The engine broke off in the middle of its answer.") from error

    def _within(self, generation: Generation) -> Generation:
        """More than the window cannot be generated, and vLLM refuses to be asked for it."""
        limit = self.context_length
        return generation if limit is None else replace(generation, max_tokens=min(generation.max_tokens, limit))

    async def _sent(self, url: str, body: bytes, *around: aiohttp.ClientMiddlewareType) -> aiohttp.ClientResponse:
        """The request, once more on a fresh connection where a kept one was closed under it unanswered."""
        headers = {"content-type": "application/json"}
        try:
            return await self._http().post(url, data=body, headers=headers, middlewares=around)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError, aiohttp.ClientOSError) as error:
            if not self.dialect.keeps_alive or isinstance(error, aiohttp.ClientConnectorError):
                raise
            return await self._http().post(url, data=body, headers=headers, middlewares=around)

    async def _block(self, response: aiohttp.ClientResponse) -> bytes:
        """All that has arrived, at once. The stall limit is for servers without a supervisor of ours."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                return await response.content.readany()
        except TimeoutError:
            raise EngineFailed(f"The engine sent nothing for {self._stall_seconds:.0f} s.") from None

    async def _keep_probing(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            await self.connect()

    @property
    def _is_unix(self) -> bool:
        return self.url.startswith("unix:")

    @property
    def _base(self) -> str:
        return self.url.rstrip("/")

    def _connector(self) -> aiohttp.BaseConnector:
        once = not self.dialect.keeps_alive
        if self._is_unix:
            path = self.url.removeprefix("unix:").removeprefix("//")
            return aiohttp.UnixConnector(path, limit=0, force_close=once)
        return aiohttp.TCPConnector(limit=0, force_close=once)

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                base_url="http://engine" if self._is_unix else None,
                connector=self._connector(),
                headers={"authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                read_bufsize=2**18,
                trust_env=False,
            )
        return self._session


async def _end(response: aiohttp.ClientResponse) -> None:
    """A moment for the body to end, so that its connection can be used again; no more, the answer is whole."""
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(END_SECONDS):
            await response.content.readany()


def _described(listed: Mapping[str, Any], model: str) -> Mapping[str, Any] | None:
    """The server's entry for our model, or its only one."""
    data = listed.get("data")
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    named = [entry for entry in entries if entry.get("id") == model]
    if named:
        return named[0]
    return entries[0] if len(entries) == 1 else None
