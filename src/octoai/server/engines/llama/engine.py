"""llama.cpp in a child process of ours, supervised.

The child serves on a unix socket in a directory only we can enter, with a random key. It dies with us. When it
crashes, makes no progress for `stall_seconds` while somebody waits for it, loses its socket, or hangs while it loads,
it is killed and started again with back-off; its running requests end with `EngineFailed`, and until it is back nothing
is accepted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from octoai.server.engines.base import Event, Generation, OnLeft, OnText
from octoai.server.engines.llama import loading
from octoai.server.engines.llama.control import Control
from octoai.server.engines.llama.header import vocabulary
from octoai.server.engines.llama.held import HeldFiles
from octoai.server.engines.llama.kernels import FOR_KERNELS
from octoai.server.engines.llama.options import LlamaOptions, environment
from octoai.server.engines.llama.prefixes import Prefixes
from octoai.server.engines.llama.reading import Reading
from octoai.server.engines.llama.socket_place import SocketPlace
from octoai.server.engines.llama.special import SpecialTokens
from octoai.server.engines.openai.dialects import DIALECTS
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.errors import BadRequest, EngineFailed, Unavailable

log = logging.getLogger("octoai.engine")

FIRST_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 30.0
NUM_FIRST_QUESTIONS = 12  # each of at most five seconds
STEADY_SECONDS = 60.0  # a child that lived this long starts the back-off afresh
MAX_LINE_BYTES = 1024 * 1024
# A prompt is taken apart into tokens before there is any sign of life: 0.7 MB/s on a slow text, and noise on top. What
# special tokens take beside that is bounded (`special.py`).
TOKENIZED_BYTES_PER_SECOND = 100_000
_NO_VOCABULARY = 0  # llama.cpp's type of one; it crashes at the first text


class _NotStarted(EngineFailed):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class LlamaEngine:
    """`model` is the name the child serves the weights under; it is never shown to a client."""

    max_choices = 1

    def __init__(self, weights: Path, *, model: str, options: LlamaOptions) -> None:
        self.model = model
        self._use(weights, options)
        self.files = HeldFiles()
        self.num_restarts = 0
        self._num_vocabulary: int | None = None
        self._http: OpenAIEngine | None = None
        self._prefixes = Prefixes(Path(), "", 0)
        self._reading: Reading | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._last_words: deque[str] = deque(maxlen=20)
        self._num_running = self._num_awaiting = 0
        self._quiet = asyncio.Event()
        self._last_progress = 0.0
        self._patience: list[float] = []  # of each request that runs: until when it may be silent
        self._supervision: asyncio.Task[None] | None = None
        self._is_ready = False
        self._changing: asyncio.Task[None] | None = None

    def _use(self, weights: Path, options: LlamaOptions) -> None:
        self.weights = weights
        self.options = self._wished = options
        self.num_slots = options.num_slots
        self.context_length: int | None = options.context_length

    @property
    def is_ready(self) -> bool:
        """Also while it changes: requests wait then."""
        return self._is_ready or self._changing is not None

    @property
    def pid(self) -> int | None:
        """Of the child, for who measures its memory."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """The first start must succeed: weights that cannot be loaded now cannot be loaded later either."""
        await self._first_spawn()
        self._supervision = asyncio.create_task(self._supervise())

    async def change(self, weights: Path, options: LlamaOptions) -> None:
        """Go on with these, from the next moment on in which no request runs; what comes meanwhile waits. Raises
        EngineFailed where they cannot be loaded, and goes on as before. Once it has begun, only `close` ends it."""
        while self._num_running:
            self._quiet.clear()
            await self._quiet.wait()
        self._changing = asyncio.create_task(self._change(weights, options))
        self._changing.add_done_callback(self._go_on)
        await asyncio.shield(self._changing)  # who waits for it is served, also where who asked for it is cancelled

    async def _change(self, weights: Path, options: LlamaOptions) -> None:
        before = self.weights, self._wished
        await _ended(self._supervision)
        await self._stop()
        self._use(weights, options)
        try:
            await self._first_spawn()
        except (EngineFailed, OSError) as error:
            self._use(*before)
            with suppress(EngineFailed, OSError):  # or it is tried again, as after a crash
                await self._first_spawn()
            raise EngineFailed(f"could not change to {weights}: {error}") from error

    def _go_on(self, changing: asyncio.Task[None]) -> None:
        self._changing = None
        if not changing.cancelled():  # by `close`
            self._supervision = asyncio.create_task(self._supervise())

    async def _first_spawn(self) -> None:
        try:
            with self.files.instead(self.weights, self._wished.tuning.kernels):  # before they load, which takes long
                await self._spawn_with_any_kernels()
        except (OSError, RuntimeError) as error:  # the second where there can be no further thread
            raise EngineFailed(f"could not load {self.weights}: {getattr(error, 'strerror', None) or error}") from None

    async def _spawn_with_any_kernels(self) -> None:
        """Kernels are only faster than those of the wheel: where they do not run, these do, until the next start.
        Attention of the wheel's is slower over one cache for all slots."""
        options = self.options = self._wished
        try:
            await self._spawn()
            return
        except _NotStarted as error:
            if options.tuning.kernels is None or error.status not in FOR_KERNELS:
                raise
            log.warning("%s; trying the kernels of llama.cpp's wheel, not %s", error.message, options.tuning.kernels)
        self.options = replace(options, tuning=replace(options.tuning, kernels=None, is_unified=False))
        try:
            await self._spawn()
        except BaseException:
            self.options = options  # it was not for the kernels
            raise

    async def close(self) -> None:
        await _ended(self._changing)
        await _ended(self._supervision)
        await self._stop()
        self.files.hold()

    def unsupported(self, generation: Generation) -> str | None:
        return DIALECTS["llama.cpp"].unsupported(generation)

    async def count_tokens(self, generation: Generation) -> int | None:
        async with self._running(generation):
            return await self._ready_reading.count_tokens(generation)

    async def generate(
        self, generation: Generation, on_left: OnLeft | None = None, on_text: OnText | None = None
    ) -> AsyncGenerator[Sequence[Event]]:
        self._check_tokens(generation)
        async with (
            self._running(generation),
            aclosing(self._ready_reading.generate(generation, on_left, on_text)) as batches,
        ):
            async for batch in batches:
                self._num_awaiting -= 1  # until who reads it asks for more, which may be long
                try:
                    yield batch
                finally:
                    self._await()

    @asynccontextmanager
    async def _running(self, generation: Generation) -> AsyncIterator[None]:
        """While it runs, the child is not changed for another one, and has to make progress where it is waited for."""
        while self._changing is not None:
            await asyncio.wait({self._changing})
        seconds = generation.num_prompt_bytes / TOKENIZED_BYTES_PER_SECOND
        # Short ones have time enough, and are many: with each of them an engine that hangs would have more time.
        until = time.monotonic() + seconds if seconds > self.options.stall_seconds / 2 else 0.0
        self._patience.append(until)
        self._num_running += 1
        self._await()
        try:
            yield
        finally:
            self._patience.remove(until)
            self._last_progress = max(self._last_progress, min(until, time.monotonic()))  # so far it was excused
            self._num_awaiting -= 1
            self._num_running -= 1
            if self._num_running == 0:
                self._quiet.set()

    def _await(self) -> None:
        if self._num_awaiting == 0:
            self._made_progress()  # as far as anybody has asked
        self._num_awaiting += 1

    def _has_turn(self) -> None:
        """Of one that is the first to wait for the engine: with each of them one that hangs would have more time."""
        if self._num_awaiting - self._num_in_line == 1:
            self._made_progress()

    @property
    def _num_in_line(self) -> int:
        return 0 if self._reading is None else self._reading.num_in_line

    @property
    def _ready_reading(self) -> Reading:
        """Where the child is asked; raises Unavailable while there is none."""
        if self._reading is None or not self._is_ready:
            raise Unavailable("The engine is starting again.", retry_after=2, code="engine_not_ready")
        return self._reading

    def _check_tokens(self, generation: Generation) -> None:
        """The engine ignores a bias for tokens that it does not have; a caller who sent one meant something."""
        limit = self._num_vocabulary
        wrong = next((token for token in generation.logit_bias if limit is not None and token >= limit), None)
        if wrong is not None:
            raise BadRequest(f"logit_bias: this model has tokens 0 to {limit - 1}, not {wrong}", param="logit_bias")  # type: ignore[operator]

    def _made_progress(self) -> None:
        self._last_progress = time.monotonic()

    async def _supervise(self) -> None:
        delay = FIRST_DELAY_SECONDS
        while True:
            started = time.monotonic()
            reason = await self._until_it_fails()
            self._is_ready = False
            log.error("engine of %s %s; starting it again in %.1f s", self.model, reason, delay)
            await self._stop()
            await asyncio.sleep(delay)
            was_steady = time.monotonic() - started > STEADY_SECONDS
            delay = FIRST_DELAY_SECONDS if was_steady else min(delay * 2, MAX_DELAY_SECONDS)
            self.num_restarts += 1
            try:
                await self._spawn_with_any_kernels()
            except Exception as error:  # noqa: BLE001  # no memory, thread or socket: whatever it is, it may pass
                log.error("engine of %s: %s", self.model, str(error) or repr(error))

    async def _until_it_fails(self) -> str:
        """Wait, and say why it is over."""
        process = self._process
        if process is None:
            return "did not start"
        exited = asyncio.ensure_future(process.wait())
        seconds = min(1.0, self.options.stall_seconds / 4)
        try:
            while True:
                began = time.monotonic()
                done, _ = await asyncio.wait({exited}, timeout=seconds)
                if done:
                    return f"exited with {process.returncode}"
                if not self._place.is_there:  # somebody emptied the directory for temporary files
                    return "has lost its socket"
                now = time.monotonic()
                if (late := now - began - seconds) > seconds:  # we were stopped, as a container is, and it was as well
                    self._last_progress = min(now, self._last_progress + late)
                silent = time.monotonic() - max([self._last_progress, *self._patience])
                if self._num_awaiting > self._num_in_line and silent > self.options.stall_seconds:
                    return f"made no progress for {self.options.stall_seconds:g} s"
        finally:
            exited.cancel()

    async def _spawn(self) -> None:
        place = self._place = SocketPlace()
        try:
            await self._spawn_in(place)
        except BaseException:
            await self._stop()  # or a child that nobody asks would live on
            place.remove()
            raise

    async def _spawn_in(self, place: SocketPlace) -> None:
        weights, kernels = self.files.path(self.weights, place.directory), self.options.tuning.kernels
        self._prefixes = self.options.prefixes(weights)
        self._prefixes.open()
        key = secrets.token_urlsafe(32)
        options = {
            "model_path": str(weights),
            "model": self.model,
            "socket": place.socket,
            "key": key,
            "num_slots": self.options.num_slots,
            "context_length": self.options.context_length,
            # Slots that generate have their places beside it: fewer than 64 are attended to more slowly.
            "batch_tokens": self.options.batch_tokens + self.options.num_slots,
            "save_path": f"{self._prefixes.directory}/" if self._prefixes.max_bytes else "",
            "num_threads": self.options.threads,
            "cache_ram_mib": self.options.cache_ram_mib,
            **asdict(self.options.tuning),
            "kernels": str(self.files.path(kernels, place.directory) if kernels else ""),
        }
        self._last_words.clear()
        self._process = await _child(environment(self.options.tuning))
        self._listener = asyncio.create_task(self._listen(self._process))
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(options).encode() + b"\n")
        special = asyncio.ensure_future(asyncio.to_thread(lambda: SpecialTokens(vocabulary(weights))))
        await self._until_it_listens(self._process, place.socket, key, special)

    async def _until_it_listens(
        self, process: asyncio.subprocess.Process, socket: str, key: str, special: Awaitable[SpecialTokens]
    ) -> None:
        if not await loading.first_line(process, self.model):
            status = await process.wait()
            await self._stop()
            last = self._last_words[-1] if self._last_words else "it said nothing"
            raise _NotStarted(f"could not load {self.weights} (exit status {status}): {last}", status)
        self._http = OpenAIEngine(
            f"unix:{socket}",
            model=self.model,
            dialect="llama.cpp",
            key=key,
            num_slots=self.num_slots,
            stall_seconds=2 * self.options.stall_seconds,  # the supervisor acts first
            on_progress=self._made_progress,
        )
        described = await self._described(self._http, process)
        # A model may have less than was asked for; more is what the engine rounds up.
        window = min(self._http.context_length or self.options.context_length, self.options.context_length)
        self.context_length = self._http.context_length = window
        control = Control(socket, key, self.model, await special, window)
        self._reading = Reading(self._http, control, self._prefixes, self.num_slots, self._has_turn)
        self._num_vocabulary = described.get("n_vocab")
        self._made_progress()
        self._is_ready = True

    async def _described(self, http: OpenAIEngine, process: asyncio.subprocess.Process) -> Mapping[str, Any]:
        """What it says of its model, asked until it answers: on a busy machine its first answer takes its time."""
        reason = f"loaded {self.weights}, but does not answer"
        for _ in range(NUM_FIRST_QUESTIONS):
            described = ((await http.connect()) or {}).get("meta") or {}
            if described.get("vocab_type") == _NO_VOCABULARY:
                reason = f"{self.weights} has no tokenizer, and can neither read nor write text: give another file"
                break
            if http.is_ready:
                return described
            if process.returncode is not None:
                break
        await self._stop()
        raise EngineFailed(reason)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Keep the child's last words for the message when it dies; it must never block on a full pipe."""
        assert process.stderr is not None
        while block := await process.stderr.read(MAX_LINE_BYTES):  # in blocks: a line has no limit
            for words in filter(None, block.decode("utf-8", "replace").splitlines()):
                self._last_words.append(words)
                log.debug("llama.cpp: %s", words)

    async def _stop(self) -> None:
        self._is_ready = False
        process, self._process = self._process, None
        http, self._http = self._http, None
        reading, self._reading = self._reading, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            try:  # who waits for it may be cancelled
                await process.wait()
                await asyncio.gather(self._listener, return_exceptions=True)
                assert process.stdin is not None
                process.stdin.close()
            finally:
                self._place.remove()
        if reading is not None:
            await reading.close()
        if http is not None:
            await http.close()


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _child(environ: Mapping[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "octoai.server.engines.llama.child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
        start_new_session=True,  # a terminal's Ctrl-C is ours to handle
        env=environ,
    )
