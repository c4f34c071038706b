"""A service in this process: its engines and HTTP started, then stopped in order when it is asked to.

Knows neither signals nor other processes: who runs it tells it when to stop, and is told when it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio.lowlevel
import uvicorn

from octoai.server import app, logs
from octoai.server.api import cors
from octoai.server.errors import Refusal
from octoai.server.http.listener import BACKLOG, doors
from octoai.server.http.protocol import protocol_for
from octoai.server.machine import descriptors, idle
from octoai.server.machine.heap import Heap
from octoai.server.service import Service
from octoai.server.settings import Settings
from octoai.server.store import Connection, StoreAway

KEEP_ALIVE_SECONDS = 75
DATABASE_POLL_SECONDS = 0.5
TICK_SECONDS = 1.0
SETTLE_SECONDS = 2.0  # for requests that are left in the end
GC_THRESHOLD = 20_000  # objects made and not yet freed, Python's own default being 700


class CannotServe(Exception):
    """The service cannot start; the text is one line."""


@dataclass
class Stop:
    """The first `ask` is for an orderly end, the second for an immediate one. Who only sets `drain` has not asked."""

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    now: asyncio.Event = field(default_factory=asyncio.Event)
    _is_asked: bool = False

    def ask(self) -> None:
        if self._is_asked:
            self.now.set()
        self._is_asked = True
        self.drain.set()


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling closes the port, and new requests could not be told to wait."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()
        self._heap = Heap()
        self._descriptors = descriptors.Descriptors()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        """Once a second, for the date in its answers. uvicorn's own also looks ten times a second whether it is to end:
        beside an engine on the same cores, waking up is what an idle service costs."""
        while not await self.on_tick(0):
            self._heap.look(len(self.server_state.tasks))
            self._descriptors.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._ending.wait()

    def end(self, *, at_once: bool) -> None:
        self.should_exit, self.force_exit = True, at_once
        self._ending.set()


async def serve(
    service: Service,
    listener: socket.socket,
    stop: Stop,
    on_ready: Callable[[], None],
    chores: Sequence[idle.Chore] = (),
) -> None:
    """Until `stop` is asked for. Raises CannotServe where an engine cannot be started or the port is another's by now,
    StoreError."""
    descriptors.raise_limit()
    await anyio.lowlevel.checkpoint()  # loads anyio's half for this loop now, not in the first request
    await service.start()
    try:
        listener.listen(BACKLOG)  # uvloop does not say where it cannot
    except OSError as error:
        await service.close()
        raise CannotServe(f"cannot listen: {error.strerror or error}") from None
    _settle_memory()
    # A request's generators are closed by who reads them, or hold nothing: asyncio need not keep a set of them all.
    sys.set_asyncgen_hooks(None, None)
    server = _Server(http_config(service))
    serving = asyncio.create_task(server.serve(sockets=doors(listener)))
    engines = [deployment.engine for deployment in service.router.deployments]
    starting = asyncio.gather(*(engine.start() for engine in engines))
    try:
        if await _until_ready(starting, stop):
            on_ready()
            async with idle.running(chores, lambda: bool(service.jobs)):
                await stop.drain.wait()
        await _drain(service, stop)
    except Refusal as refusal:
        raise CannotServe(refusal.message) from None
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        # Engines first: requests that outlived the drain end with an error event, not with silence.
        await asyncio.gather(*(engine.close() for engine in engines))
        server.end(at_once=stop.now.is_set())
        await serving
        await _settled(service, server)
        await service.close()


def database(settings: Settings) -> Connection:
    """Wait for a database that does not answer yet, as long as it may be away later. Raises StoreError."""
    until = time.monotonic() + settings.database_away_seconds
    has_said = False
    while True:
        try:
            return app.prepare(settings)
        except StoreAway as error:
            if time.monotonic() > until:
                raise
            if not has_said:
                logs.tell(f"{error}; waiting for it")
            has_said = True
            time.sleep(DATABASE_POLL_SECONDS)


def runner() -> asyncio.Runner:
    """For the loop that serves."""
    if sys.platform == "win32":
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.Loop)


def _settle_memory() -> None:
    """What is there now stays: the garbage collector need not go through it again, a pause of tens of milliseconds
    for whoever is being served then. A request leaves next to no cycles, so young objects are looked at less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


async def _until_ready(starting: asyncio.Future[list[None]], stop: Stop) -> bool:
    """False when we are to stop before. Raises what an engine's start raised."""
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.drain.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        return False
    stopping.cancel()
    starting.result()
    return True


async def _drain(service: Service, stop: Stop) -> None:
    if service.num_requests:  # which are not to wait for who may not read this
        said = f"finishing {service.num_requests} requests; once more to stop at once"
        asyncio.get_running_loop().run_in_executor(None, logs.tell, said)
    draining = asyncio.create_task(service.drain())
    now: asyncio.Task[Any] = asyncio.create_task(stop.now.wait())
    await asyncio.wait([draining, now], return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    now.cancel()


async def _settled(service: Service, server: _Server) -> None:
    """What still runs is left, so that its usage is in the journal before that closes."""
    if server.force_exit:  # otherwise the server has told them
        for task in server.server_state.tasks:
            task.cancel()
    await service.drain(SETTLE_SECONDS)


def http_config(service: Service) -> uvicorn.Config:
    """Of the HTTP server before a service."""
    edge = app.edge(service)
    return uvicorn.Config(
        edge,
        http=protocol_for(edge),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        headers=list(cors.headers(service.allowed_origin)),
        proxy_headers=False,  # nothing here asks who is behind a proxy
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
        ws="none",
        callback_notify=service.metrics.fold,
        timeout_notify=0,  # at every tick
    )
