"""Services to test against: one in this process over a scripted engine, one as people start it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
import uvloop

from octoai.server import app, tokens
from octoai.server.accounts import DEFAULT_ACCOUNT
from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue
from octoai.server.engines.base import Engine
from octoai.server.metrics.families import Metrics
from octoai.server.queue import FairQueue
from octoai.server.router import Deployment, Router
from octoai.server.service import Service
from octoai.server.serving import http_config
from octoai.server.settings import Settings
from octoai.server.store import Connection, connect
from octoai.server.tokens import SCOPES, Minted

START_SECONDS = 60
T = TypeVar("T")


class InProcess:
    """The real application on a real socket, over the engine given; `model` and historical ids are served."""

    def __init__(
        self,
        engine: Engine,
        data_dir: Path,
        *,
        max_waiting: int = 64,
        url: str | None = None,
        **settings: object,
    ) -> None:
        catalogue = Catalogue.load()
        deployment = Deployment(catalogue[EMBEDDED_MODEL_ID], engine, FairQueue(engine.num_slots, max_waiting))
        metrics = Metrics()
        metrics.watch([deployment])
        self.engine = engine
        self.queue = deployment.queue
        self.model = EMBEDDED_MODEL_ID
        self.settings = Settings.model_validate(
            {"data_dir": data_dir, "cache_dir": data_dir / "cache", "drain_seconds": 5, "database": url, **settings}
        )
        self.place = self.settings.place
        app.prepare(self.settings).close()
        self.token = self.mint("tests", scopes=SCOPES).text
        self.router = Router([deployment], catalogue, stand_in=deployment)
        self._make: Callable[[], Service] = lambda: app.over(self.settings, self.router, metrics)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def books(self, action: Callable[[Connection], T]) -> T:
        """Do something in the database, as another process would, in one transaction."""
        with closing(connect(self.place)) as db, db.transaction():
            return action(db)

    def read(self, action: Callable[[Connection], T]) -> T:
        """Ask the database, once it has all that has ended here."""
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(self.service.read(action), self.loop).result(10)

    def mint(self, name: str, account: str = DEFAULT_ACCOUNT, **options: Any) -> Minted:
        return self.books(lambda db: tokens.mint(db, name, account, **options))

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = self._make()
        await self.engine.start()
        await self.service.start()
        config = http_config(self.service)
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            await asyncio.sleep(0.005)
        self._ready.set()
        await task
        await self.service.close()
        await self.engine.close()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        self._listener.close()


Start = Callable[..., InProcess]
"""What the fixture `in_process` gives: an engine, and settings by their names, make a service."""


class Serve:
    """`octoai serve` as a process of its own, with everything it keeps in `place`."""

    def __init__(self, place: Path, *arguments: str, environ: dict[str, str] | None = None, wait: bool = True) -> None:
        self.config_dir, self.data_dir = place / "config", place / "data"
        self.environ = {
            **os.environ,
            "OCTOAI_CONFIG_DIR": str(self.config_dir),
            "OCTOAI_DATA_DIR": str(self.data_dir),
            **(environ or {}),
        }
        place.mkdir(parents=True, exist_ok=True)
        self.log = place / "log"
        self.lines: list[str] = []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "octoai", "serve", "--port", "0", *arguments],
                env=self.environ,
                cwd=place,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            assert self._ready.wait(START_SECONDS) and self.url, (self.lines, self.log.read_text()[-2000:])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if ready := re.match(r"octoai ready on (\S+)", line):
                self.url = ready[1]
                self._ready.set()
        self._ready.set()

    @property
    def token(self) -> str:
        return str(tomllib.loads((self.config_dir / "credentials.toml").read_text())["token"])

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another `octoai` command, beside the service."""
        command: Sequence[str] = [sys.executable, "-m", "octoai", *arguments]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=60, check=False)

    def children(self) -> list[int]:
        """Process ids of the engines."""
        return self._children(self.process.pid, b"octoai.server.engines.llama.child")

    def workers(self) -> list[int]:
        """Process ids of the workers, where there are several."""
        return self._children(self.process.pid, b"octoai.server.workers.worker")

    def appliers(self) -> list[int]:
        """Process ids of those that write to the database for the workers."""
        return [pid for worker in self.workers() for pid in self._children(worker, b"store.applier")]

    @staticmethod
    def _children(pid: int, command: bytes) -> list[int]:
        listed = " ".join(_read(path).decode() for path in Path(f"/proc/{pid}/task").glob("*/children"))
        return [int(child) for child in listed.split() if command in _read(Path(f"/proc/{child}/cmdline"))]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 40) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(seconds)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


def ledger_verifies(service: Serve) -> None:
    ran = service.run("ledger", "verify")
    assert ran.returncode == 0, ran.stderr


def _read(path: Path) -> bytes:
    """What `/proc` says of a process; nothing of one that has just ended."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
