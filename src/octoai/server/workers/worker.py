"""One of several processes that serve on one port: does what its supervisor says, and goes when that is gone.

    python -m octoai.server.workers.worker CHANNEL LISTENER

are descriptors it inherits. Over the channel it is told its settings first (`serve`), later `drain` or `now`, and asked
for its metrics (`report`) and whether it still answers (`alive`); it tells that it is `ready`, or why it `failed`, and
asks for the metrics of all (`scrape`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry

from octoai.server import app, logs, serving
from octoai.server.errors import Unavailable
from octoai.server.journal import JournalError
from octoai.server.machine.parent import die_with_parent
from octoai.server.metrics import totals
from octoai.server.service import Service
from octoai.server.serving import CannotServe, Stop
from octoai.server.settings import BadSettings, Settings
from octoai.server.store import StoreError
from octoai.server.workers.channel import Channel, ChannelClosed, Message

log = logging.getLogger("octoai.worker")

SCRAPE_SECONDS = 5.0


def main() -> None:
    die_with_parent()
    # Which whoever ends the service may send to us as well.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel, listener = (socket.socket(fileno=int(each)) for each in sys.argv[1:])
    with serving.runner() as runner, listener:
        status = 1
        try:
            status = runner.run(_main(channel, listener))
        except Exception:
            log.exception("a worker failed")
        finally:
            # Not by way of the threads: one may still wait for a database that is away.
            logging.shutdown()
            os._exit(status)


async def _main(end: socket.socket, listener: socket.socket) -> int:
    channel = await Channel.over(end)
    try:
        await _Worker(channel).run(listener)
    except (BadSettings, CannotServe, JournalError, StoreError) as error:
        channel.tell("failed", reason=str(error))
        return 1
    except Exception as error:
        channel.tell("failed", reason=f"a fault of ours, which the log has: {type(error).__name__}")
        raise
    finally:
        await channel.close()
    return 0


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stop = Stop()
        self._service: Service | None = None
        self._reports: set[asyncio.Task[None]] = set()

    async def run(self, listener: socket.socket) -> None:
        messages = self._channel.messages()
        settings = Settings.model_validate((await anext(messages))["settings"])
        logs.set_up(settings.log_level)
        obeying = asyncio.create_task(self.obey(messages))
        try:
            await self.serve(settings, listener)
        finally:
            obeying.cancel()

    async def serve(self, settings: Settings, listener: socket.socket) -> None:
        if not await self._prepared(settings):
            return
        self._service = app.service(settings, app.router(settings, app.catalogue(settings), {}))
        self._service.metrics.of_all = self._metrics_of_all
        await serving.serve(self._service, listener, self._stop, lambda: self._channel.tell("ready"))

    async def obey(self, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            if message["kind"] == "report":
                report = asyncio.create_task(self._report(message))
                self._reports.add(report)
                report.add_done_callback(self._reports.discard)
            elif message["kind"] == "alive":
                self._channel.answer(message, True)
            elif message["kind"] == "drain":
                self._stop.drain.set()
            elif message["kind"] == "now":
                self._stop.drain.set()
                self._stop.now.set()
        os._exit(1)  # the supervisor is gone: as if we had been killed with it

    async def _report(self, question: Message) -> None:
        counted = CollectorRegistry() if self._service is None else self._service.metrics.counted()
        self._channel.answer(question, await asyncio.to_thread(totals.sent, counted))

    async def _prepared(self, settings: Settings) -> bool:
        """Bring in what a worker before us left, once the database answers. False when we are to stop before."""
        preparing = asyncio.create_task(asyncio.to_thread(lambda: serving.database(settings).close()))
        stopping = asyncio.create_task(self._stop.drain.wait())
        await asyncio.wait([preparing, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if preparing.done():
            preparing.result()
        return preparing.done()

    async def _metrics_of_all(self) -> bytes:
        try:
            return str(await self._channel.ask("scrape", seconds=SCRAPE_SECONDS)).encode()
        except (ChannelClosed, TimeoutError):
            raise Unavailable("The other processes' metrics did not come.", retry_after=1) from None


if __name__ == "__main__":
    main()
