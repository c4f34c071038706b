"""`octoai serve`: the service in the foreground, from its first line to its last.

Starts engines and HTTP, says so, waits for a signal, drains, stops. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.lowlevel
import uvicorn

from octoai import _credentials
from octoai.server import accounts, app, idle, tokens
from octoai.server.engines.llama import LlamaOptions
from octoai.server.errors import Refusal
from octoai.server.protocol import BoundedProtocol
from octoai.server.service import Service
from octoai.server.settings import Settings
from octoai.server.store import Connection, StoreAway

BOOTSTRAP_NAME = "bootstrap"
KEEP_ALIVE_SECONDS = 75
DATABASE_POLL_SECONDS = 0.5
GC_THRESHOLD = 20_000  # objects made and not yet freed, Python's own default being 700


class CannotServe(Exception):
    """The service cannot start; the text is one line."""


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling closes the port, and new requests could not be told to wait."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class _Stop:
    """The first signal asks for an orderly end, the second for an immediate one."""

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    now: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self) -> None:
        if self.drain.is_set():
            self.now.set()
        self.drain.set()


def serve(
    settings: Settings,
    weights: Mapping[str, Path],
    tuned: Mapping[str, LlamaOptions] | None = None,
    idle_commands: Sequence[Sequence[str]] = (),
) -> int:
    """Returns the exit status. `weights` are the files of the models that engines of ours serve, `tuned` how to run
    them where that is known, `idle_commands` programs to run while nobody asks anything."""
    db = _database(settings)
    listener = _listen(settings.host, settings.port)
    url = _url(settings.host, listener)
    with closing(db):
        service = app.service(settings, app.catalogue(settings), weights, tuned)
        _bootstrap(db, url)
    if settings.ledger == "off":
        print("octoai: the ledger is off: nothing is recorded, billed or limited", flush=True)
    for line in _stand_in_lines(service):
        print(line, flush=True)
    runner = asyncio.Runner(loop_factory=_loop_factory())
    with runner, listener:
        return runner.run(_serve(service, listener, url, idle_commands))


async def _serve(service: Service, listener: socket.socket, url: str, idle_commands: Sequence[Sequence[str]]) -> int:
    await anyio.lowlevel.checkpoint()  # loads anyio's half for this loop now, not in the first request
    stop = _Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.ask)
    await service.start()
    _settle_memory()
    server = _Server(_config(service))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    engines = [deployment.engine for deployment in service.router.deployments]
    starting = asyncio.gather(*(engine.start() for engine in engines))
    try:
        if await _until_ready(starting, stop):
            print(f"octoai ready on {url}", flush=True)
            async with idle.running(idle_commands, lambda: bool(service.jobs)):
                await stop.drain.wait()
        await _drain(service, stop)
    except Refusal as refusal:
        raise CannotServe(refusal.message) from None
    finally:
        starting.cancel()
        # Engines first: requests that outlived the drain end with an error event, not with silence.
        await asyncio.gather(*(engine.close() for engine in engines))
        server.should_exit, server.force_exit = True, stop.now.is_set()
        await serving
        await service.close()
    return 0


def _settle_memory() -> None:
    """What is there now stays: the garbage collector need not go through it again, a pause of tens of milliseconds
    for whoever is being served then. A request leaves next to no cycles, so young objects are looked at less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


async def _until_ready(starting: asyncio.Future[list[None]], stop: _Stop) -> bool:
    """False when a signal came first. Raises what an engine's start raised."""
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.drain.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        return False
    stopping.cancel()
    starting.result()
    return True


async def _drain(service: Service, stop: _Stop) -> None:
    if service.jobs:
        print(f"octoai: finishing {len(service.jobs)} requests; once more to stop at once", file=sys.stderr, flush=True)
    draining = asyncio.create_task(service.drain())
    now: asyncio.Task[Any] = asyncio.create_task(stop.now.wait())
    await asyncio.wait([draining, now], return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    now.cancel()


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        app.application(service),
        http=BoundedProtocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks who is behind a proxy
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
        ws="none",
    )


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.Loop


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        raise CannotServe(f"cannot listen on {host}:{port}: {reason}; choose another with --port") from None
    return listener


def _url(host: str, listener: socket.socket) -> str:
    """Where clients on this machine reach us: a wildcard address is not one they can connect to."""
    port = listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104  # compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _database(settings: Settings) -> Connection:
    """Wait for a database that does not answer yet, as long as it may be away later."""
    until = time.monotonic() + settings.database_away_seconds
    has_said = False
    while True:
        try:
            return app.prepare(settings)
        except StoreAway as error:
            if time.monotonic() > until:
                raise
            if not has_said:
                print(f"octoai: {error}; waiting for it", file=sys.stderr, flush=True)
            has_said = True
            time.sleep(DATABASE_POLL_SECONDS)


def _bootstrap(db: Connection, url: str) -> None:
    """On the very first start: a token, printed once, and left where `OctoAI()` on this machine finds it."""
    stored = _credentials.read()
    with db.transaction():
        accounts.ensure_default(db)
        minted = tokens.mint(db, BOOTSTRAP_NAME, scopes=tokens.SCOPES) if tokens.is_empty(db) else None
    if minted is not None:
        path = _credentials.write(endpoint=url, token=minted.text)
        print(
            f"octoai: your API token, shown once: {minted.text}\noctoai: endpoint and token are in {path}", flush=True
        )
    elif stored is not None and stored.token and stored.endpoint != url and tokens.is_valid(db, stored.token):
        _credentials.write(endpoint=url, token=stored.token)


def _stand_in_lines(service: Service) -> Iterator[str]:
    stand_in = service.router.stand_in
    if stand_in is None:
        return
    ids = [model.id for model, deployment in service.router.served() if model.id != deployment.model.id]
    if ids:
        shown = ", ".join(ids[:3])
        yield f"octoai: {stand_in.model.id} stands in for {len(ids)} models without weights here ({shown}, …)"
