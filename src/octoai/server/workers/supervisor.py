"""Several processes that serve on one port, and the one that starts them, starts again those that die or hang, and
ends them.

What a worker left open when it died is settled by the one that is started for it, before that serves. Here is also who
knows the metrics of all. Requests never come here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from octoai.server.http.listener import Port
from octoai.server.machine import zombies
from octoai.server.metrics import totals
from octoai.server.serving import CannotServe, Stop
from octoai.server.settings import Settings
from octoai.server.workers.channel import Channel, ChannelClosed, Message
from octoai.server.workers.shares import share

log = logging.getLogger("octoai.supervisor")

FIRST_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a worker that lived this long starts the back-off afresh
START_SECONDS = 60.0  # in which a worker that is not ready yet may say nothing
REPORT_SECONDS = 2.0
NOW_SECONDS = 30.0  # for workers that are to stop at once; then they are killed


@dataclass(eq=False)
class _Worker:
    """`report` is what it counted when it was last asked, `reason` why it cannot serve, if it said so."""

    process: Process
    channel: Channel
    is_ready: bool = False
    reason: str | None = None
    report: totals.Report = field(default_factory=list)
    report_number = 0  # of the question that it answers


class Supervisor:
    def __init__(self, settings: Settings, port: Port, stop: Stop) -> None:
        self._settings = settings
        self._port = port
        self._stop = stop
        self._workers: dict[int, _Worker] = {}
        self._all_ready = asyncio.Event()
        self._failure: str | None = None
        self._ended: totals.Report = []  # what workers that are no more had counted
        self._num_restarts = 0
        self._scrapes: set[asyncio.Task[None]] = set()
        self._questions = itertools.count(1)

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Until a stop is asked for and all have ended. Raises CannotServe where they cannot be started."""
        keeping = [asyncio.create_task(self._keep(number)) for number in range(self._settings.workers)]
        telling = asyncio.create_task(self._tell_when_ready(on_ready))
        reaping = asyncio.create_task(zombies.reap())  # what a worker that died had started
        try:
            await self._stop.drain.wait()
            for worker in self._workers.values():
                worker.channel.tell("drain")
            hurrying = asyncio.create_task(self._hurry())
            await asyncio.gather(*keeping)
            hurrying.cancel()
        finally:
            telling.cancel()
            reaping.cancel()
            self._kill()
        if self._failure is not None:
            raise CannotServe(self._failure)

    async def _tell_when_ready(self, on_ready: Callable[[], None]) -> None:
        await self._all_ready.wait()
        on_ready()

    async def _hurry(self) -> None:
        await self._stop.now.wait()
        for worker in self._workers.values():
            worker.channel.tell("now")
        await asyncio.sleep(NOW_SECONDS)
        self._kill()

    def _kill(self) -> None:
        for worker in self._workers.values():
            _kill(worker)

    async def _keep(self, number: int) -> None:
        """One worker after the other under this number, until a stop is asked for."""
        loop, delay = asyncio.get_running_loop(), FIRST_DELAY_SECONDS
        while not self._stop.drain.is_set():
            began = loop.time()
            try:
                how = await self._one(number)
            except Exception as error:  # a fault of ours: the number would have no worker, and nobody would know
                log.exception("worker %d is lost", number)
                how = f"worker {number} is lost: {error!r}"
            if self._stop.drain.is_set():
                return
            if not self._all_ready.is_set():
                self._failure = how
                self._stop.drain.set()
                return
            delay = FIRST_DELAY_SECONDS if loop.time() - began > STEADY_SECONDS else delay
            log.error("%s; another is started in %.1f s", how, delay)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.drain.wait()
            delay = min(2 * delay, MAX_DELAY_SECONDS)
            self._num_restarts += 1

    async def _one(self, number: int) -> str:
        """Start a worker, and return how it ended when it has."""
        try:
            worker = await self._started(number)
        except Exception as error:  # noqa: BLE001  # no memory, no more processes, or what nobody thought of
            return f"worker {number} cannot be started: {error}"
        self._workers[number] = worker
        if self._stop.drain.is_set():
            worker.channel.tell("drain")
        watching = asyncio.create_task(self._watch(worker, number))
        try:
            async for message in worker.channel.messages():
                self._hear(worker, message)
        except Exception:  # what it said could not be read
            _kill(worker)
            raise
        finally:
            watching.cancel()
            status = await worker.process.wait()
            # Both at once: a sum of counters that is taken meanwhile has them once.
            del self._workers[number]
            self._ended = totals.merged([self._ended, totals.counted(worker.report)])
            await worker.channel.close()
        return worker.reason or f"worker {number} (process {worker.process.pid}) ended with {status}"

    async def _started(self, number: int) -> _Worker:
        # While none has served, who comes waits for the first; later, others serve until this one can.
        listener = self._port.listener(is_listening=not self._all_ready.is_set())
        ours, theirs = socket.socketpair()
        with listener, theirs:
            descriptors = (theirs.fileno(), listener.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "octoai.server.workers.worker", *map(str, descriptors)),
                stdin=DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # a terminal's Ctrl-C is ours to handle
            )
        channel = await Channel.over(ours)
        channel.tell("serve", settings=share(self._settings, number).model_dump(mode="json"))
        return _Worker(process, channel)

    async def _watch(self, worker: _Worker, number: int) -> None:
        """Kill it when it does not answer any more: its part of all connections would wait for ever, and so would who
        ends the service. One that starts is given longer, since its loop may be busy with that."""
        seconds, silent_seconds = self._settings.worker_stall_seconds, 0.0
        with suppress(ChannelClosed, ProcessLookupError):  # it has ended meanwhile
            while silent_seconds < self._patience(worker):
                try:
                    await worker.channel.ask("alive", seconds=seconds / 2)
                except TimeoutError:  # one may be missed by a machine that was itself asleep
                    silent_seconds += seconds / 2
                else:
                    silent_seconds = 0.0
                    await asyncio.sleep(min(1.0, seconds / 4))
            log.error("worker %d (process %d) did not answer for %g s", number, worker.process.pid, silent_seconds)
            worker.process.kill()

    def _patience(self, worker: _Worker) -> float:
        seconds = self._settings.worker_stall_seconds
        is_starting = not worker.is_ready and not self._stop.drain.is_set()
        return max(seconds, START_SECONDS) if is_starting else seconds

    def _hear(self, worker: _Worker, message: Message) -> None:
        if message["kind"] == "ready":
            worker.is_ready = True
            if sum(each.is_ready for each in self._workers.values()) == self._settings.workers:
                self._all_ready.set()
        elif message["kind"] == "failed":
            worker.reason = message["reason"]
        elif message["kind"] == "scrape":
            scrape = asyncio.create_task(self._answer_scrape(worker, message))
            self._scrapes.add(scrape)
            scrape.add_done_callback(self._scrapes.discard)

    async def _answer_scrape(self, asking: _Worker, question: Message) -> None:
        await asyncio.gather(*map(self._ask_report, tuple(self._workers.values())))
        reports = [self._ended, *(worker.report for worker in self._workers.values()), self._own()]
        asking.channel.answer(question, await asyncio.to_thread(totals.whole, reports))

    async def _ask_report(self, worker: _Worker) -> None:
        """One that does not answer in time has counted what it said last, at least."""
        with suppress(ChannelClosed, TimeoutError):
            number = next(self._questions)
            said = await worker.channel.ask("report", seconds=REPORT_SECONDS)
            report = await asyncio.to_thread(totals.received, said)
            if number > worker.report_number:  # none that was asked for later is here already
                worker.report, worker.report_number = report, number

    def _own(self) -> totals.Report:
        num_ready = sum(worker.is_ready for worker in self._workers.values())
        return [
            *totals.gauge("octoai_workers", "Processes that serve.", num_ready),
            *totals.counter("octoai_worker_restarts", "Times a process that serves was started again.",
                            self._num_restarts),
        ]  # fmt: skip


def _kill(worker: _Worker) -> None:
    with suppress(ProcessLookupError):
        worker.process.kill()
