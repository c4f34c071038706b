"""A process of its own that brings a journal into the database: beside the event loop, not between its steps.

A thread for it costs a request more than the work itself: each of the two waits for the interpreter that the other has.
Here is both ends: `Applier` in the service, and `main`, the process, which does what the writer's thread does without
one. It is told how far the journal is durable, tells how far it has come and what fails, and dies with the service.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octoai.server import logs
from octoai.server.journal import START, Followed, Journal, Position
from octoai.server.machine.parent import die_with_parent
from octoai.server.store import Place

log = logging.getLogger("octoai.store")

RESTART_SECONDS = 0.5
END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class News:
    """How far the database has the journal, and what kept it from going on, if something did."""

    applied: Position
    failure: str | None = None
    is_full: bool = False


class Applier:
    """Its process begins when there is something to bring in. Methods are for the thread of the event loop, but for
    `durable`, which is for any."""

    def __init__(self, place: Place, journal: Journal) -> None:
        self._place = place
        self._journal = journal
        self._applied = START
        self._heard: Callable[[News], None] = lambda _: None
        self._process: subprocess.Popen[bytes] | None = None
        self._telling = threading.Lock()  # in any thread, while its pipe is closed in the loop's
        self._loop: asyncio.AbstractEventLoop | None = None
        self._said = b""
        self._is_told = False  # of something durable that it has not answered yet
        self._is_begun = self._is_closing = False

    def start(self, heard: Callable[[News], None]) -> None:
        self._heard, self._loop = heard, asyncio.get_running_loop()

    def durable(self) -> None:
        """More of the journal is durable. It is told once, until it answers: what comes meanwhile shares the next."""
        if not self._is_begun and self._loop is not None:
            self._is_begun = self._is_told = True
            with suppress(RuntimeError):  # the loop is closed: the next service brings it in
                self._loop.call_soon_threadsafe(self._spawn)
        elif not self._is_told:
            self._is_told = True
            self._tell("durable")

    def hurry(self) -> None:
        """Somebody waits for what is durable now."""
        self._is_told = True
        self._tell("hurry")

    def look(self) -> None:
        """The database may have gone back in time: the process looks, and brings in again what is missing."""
        self._tell("look")

    def close(self, seconds: float = END_SECONDS) -> None:
        """Bring in what is durable, if the database lets us, and end. Blocks for at most so long."""
        self._is_closing = True
        process = self._process
        if process is None:
            return
        self._tell("end")
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _spawn(self) -> None:
        if self._is_closing or self._loop is None:
            return
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "octoai.server.store.applier"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is the service's to handle
            )
        except OSError as error:  # no memory, no more processes
            self._failed(f"cannot be started: {error.strerror or error}")
            return
        assert process.stdout is not None
        assert process.stdin is not None
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._said, self._is_told = b"", True
        self._loop.add_reader(process.stdout.fileno(), self._read, process)
        options = {
            "data_dir": str(self._place.data_dir),
            "url": self._place.url,
            "journal": [str(self._journal.directory), self._journal.instance],
            "applied": list(self._applied),
            "log_level": logging.getLevelName(logging.getLogger().level),
        }
        _send(process, options)
        self._process = process  # only now: other threads may tell it something at once
        self._tell("durable")

    def _tell(self, what: str) -> None:
        with self._telling:
            if self._process is not None:
                _send(self._process, {what: list(self._journal.durable)})

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert self._loop is not None
        data = os.read(process.stdout.fileno(), 64 * 1024)
        if not data:
            self._loop.remove_reader(process.stdout.fileno())
            self._ended(process)
            return
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            self._applied = Position(*said["applied"])
            self._heard(News(self._applied, said["failure"], said["is_full"]))
        self._is_told = False
        if self._journal.durable > self._applied:
            self.durable()

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with self._telling:
            self._process = None
            process.stdin.close()
        process.stdout.close()
        if self._is_closing or self._loop is None:
            return
        status = process.wait()
        self._failed(f"ended with {status}")

    def _failed(self, how: str) -> None:
        assert self._loop is not None
        log.error("the process that writes to the database %s; it is started again", how)
        self._heard(News(self._applied, failure=f"the process that writes to the database {how}"))
        self._loop.call_later(RESTART_SECONDS, self._spawn)


def _send(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    """One that does not read has enough to read: it will answer, and then be told. One that died is noticed."""
    assert process.stdin is not None
    with suppress(BrokenPipeError, BlockingIOError):
        os.write(process.stdin.fileno(), json.dumps(message).encode() + b"\n")


# ── the process ──


def main() -> None:
    die_with_parent()
    _give_way()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # the service decides when we go
        signal.signal(number, signal.SIG_IGN)
    options = json.loads(sys.stdin.buffer.readline())
    logs.set_up(options["log_level"])
    _follow(options)
    logging.shutdown()
    # Our own end of the pipe: where it is lost without a word, the service has died, and the next one goes on.
    os._exit(0)


def _give_way() -> None:
    """The service is not to be interrupted because there is something to do here. One client's 98th percentile was 1.9
    instead of 2.7 ms for it (two cores, an engine that answers at once)."""
    if sys.platform == "linux":
        with suppress(OSError):  # where it is not allowed, it is done without
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _follow(options: dict[str, Any]) -> None:
    from octoai.server.store.writer import Writer

    directory, instance = options["journal"]
    journal = Followed(Path(directory), instance)
    writer = Writer(Place(Path(options["data_dir"]), options["url"]), journal, start=Position(*options["applied"]))
    telling = threading.Lock()

    def tell() -> None:
        news = {"applied": list(writer.applied), "failure": writer.failure, "is_full": writer.is_full}
        with telling, suppress(BrokenPipeError):
            os.write(1, json.dumps(news).encode() + b"\n")

    writer.on_change = tell
    writer.start()
    for line in sys.stdin.buffer:
        ((what, durable),) = json.loads(line).items()
        journal.durable = Position(*durable)
        if what == "end":
            writer.close(END_SECONDS)
            return
        if what == "look":  # which any transaction does
            writer.later(lambda _: None, is_kept=True)
        else:
            (writer.hurry if what == "hurry" else writer.wake)()


if __name__ == "__main__":
    main()
