"""Whatever becomes of a worker, its supervisor goes on with it, or says why it cannot."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.registry import Collector

from octoai.server.http.listener import Port
from octoai.server.metrics import totals
from octoai.server.serving import CannotServe, Stop
from octoai.server.settings import Settings
from octoai.server.workers import supervisor, worker
from octoai.server.workers.channel import Channel
from octoai.server.workers.supervisor import Supervisor, _Worker

_SAYING = """
import socket, sys, time
end = socket.socket(fileno=int(sys.argv[1]))
end.sendall({said!r})
time.sleep(60)
"""


class Saying(Supervisor):
    """Its workers say what they are given, and then nothing."""

    said = b""

    async def _started(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            program = _SAYING.format(said=self.said)
            descriptor = theirs.fileno()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", program, str(descriptor)), pass_fds=[descriptor]
            )
        return _Worker(process, await Channel.over(ours))


class Stolen(Port):
    """Its listeners are bound when another begins to listen there."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 0)
        self._thief, *self._listeners = socket.socket(), socket.socket(), socket.socket()
        for each in (self._thief, *self._listeners):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0 if each is self._thief else self._thief.getsockname()[1]))
        self._thief.listen()

    def listener(self, *, is_listening: bool) -> socket.socket:
        return self._listeners.pop()

    def close(self) -> None:
        super().close()
        for each in (self._thief, *self._listeners):
            each.close()


def settings_in(place: Path | str, **settings: object) -> Settings:
    models = [{"id": "far", "engine_url": "http://127.0.0.1:9/v1"}]
    given = {"data_dir": place, "cache_dir": place, "workers": 2, "models": models, **settings}
    return Settings.model_validate(given)


def supervised(kind: type[Supervisor], place: Path, given_port: Port | None = None, **settings: object) -> None:
    """Until it ends by itself."""
    with closing(given_port or Port("127.0.0.1", 0)) as port:

        async def main() -> None:
            supervising = kind(settings_in(place, **settings), port, Stop())
            await asyncio.wait_for(supervising.run(lambda: None), 20)

        asyncio.run(main())


def test_a_worker_that_says_nothing_while_it_starts_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 1.5)
    with pytest.raises(CannotServe, match=r"^worker \d \(process \d+\) ended with -9$"):
        supervised(Saying, tmp_path, worker_stall_seconds=1)


@pytest.mark.parametrize("said", [b"no JSON\n", b"{}\n", b'{"kind": "failed"}\n'])
def test_a_worker_whose_words_cannot_be_read_has_failed(tmp_path: Path, said: bytes) -> None:
    kind = type("", (Saying,), {"said": said})
    with pytest.raises(CannotServe, match=r"^worker \d is lost: "):
        supervised(kind, tmp_path)


def test_a_worker_that_cannot_be_started_for_any_reason_is_said(tmp_path: Path) -> None:
    class Unlucky(Supervisor):
        async def _started(self, number: int) -> _Worker:
            raise TypeError("what nobody thought of")

    with pytest.raises(CannotServe, match=r"^worker \d cannot be started: what nobody thought of$"):
        supervised(Unlucky, tmp_path)


async def read(channel: Channel) -> None:
    async for _ in channel.messages():
        raise AssertionError("nobody asks here")


def test_a_worker_answers_while_what_it_counted_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten thousand API tokens that takes a tenth of a second, in which no stream went on."""
    may_go_on, threads = threading.Event(), list[int]()

    def sent(registry: Collector) -> str:
        threads.append(threading.get_ident())
        assert may_go_on.wait(10)
        return "[]"

    async def main() -> None:
        ours, theirs = [await Channel.over(end) for end in socket.socketpair()]
        obeying = asyncio.create_task(worker._Worker(theirs).obey(theirs.messages()))
        reading = asyncio.create_task(read(ours))
        report = asyncio.create_task(ours.ask("report", seconds=10))
        assert await ours.ask("alive", seconds=5) is True
        assert not report.done()
        may_go_on.set()
        assert await report == "[]"
        for task in (obeying, reading):
            task.cancel()
        await asyncio.gather(obeying, reading, return_exceptions=True)
        await asyncio.gather(ours.close(), theirs.close())

    monkeypatch.setattr("octoai.server.metrics.totals.sent", sent)
    asyncio.run(main())
    assert threads and threading.get_ident() not in threads


def test_reports_are_added_up_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = list[int]()

    def whole(reports: list[totals.Report], told: Any = totals.whole) -> str:
        threads.append(threading.get_ident())
        return str(told(reports))

    async def main() -> None:
        settings = Settings.model_validate({"data_dir": tmp_path, "cache_dir": tmp_path, "workers": 2})
        with closing(Port("127.0.0.1", 0)) as port:
            supervising = Supervisor(settings, port, Stop())
            ours, theirs = [await Channel.over(end) for end in socket.socketpair()]
            asking = _Worker(None, ours)  # type: ignore[arg-type]
            reading = asyncio.create_task(read(theirs))
            scrapes = [asyncio.create_task(theirs.ask("scrape", seconds=10)) for _ in range(3)]
            async for message in ours.messages():
                supervising._hear(asking, message)
                if len(supervising._scrapes) == 3:
                    break
            answering = asyncio.create_task(read(ours))
            for said in await asyncio.gather(*scrapes):
                assert "octoai_workers 0.0" in said
            for task in (reading, answering):
                task.cancel()
            await asyncio.gather(reading, answering, return_exceptions=True)
            await asyncio.gather(ours.close(), theirs.close())

    monkeypatch.setattr("octoai.server.metrics.totals.whole", whole)
    asyncio.run(main())
    assert len(threads) == 3 and threading.get_ident() not in threads


def test_a_report_that_comes_late_takes_no_newer_ones_place(tmp_path: Path) -> None:
    """Nor does one scrape wait for another, whose worker does not answer."""

    async def main() -> None:
        settings = Settings.model_validate({"data_dir": tmp_path, "cache_dir": tmp_path, "workers": 2})
        with closing(Port("127.0.0.1", 0)) as port:
            supervising = Supervisor(settings, port, Stop())
            ours, theirs = [await Channel.over(end) for end in socket.socketpair()]
            worker, questions = _Worker(None, ours), list[Any]()  # type: ignore[arg-type]
            reading = asyncio.create_task(read(ours))
            asked = [asyncio.create_task(supervising._ask_report(worker)) for _ in range(2)]
            async for message in theirs.messages():
                questions.append(message)
                if len(questions) == 2:
                    break
            for question, value in ((questions[1], 2.0), (questions[0], 1.0)):
                theirs.answer(question, json.dumps(totals.counter("x", "Some.", value)))
                await asyncio.sleep(0.05)
            await asyncio.gather(*asked)
            assert worker.report[0]["samples"][0][2] == 2.0
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await asyncio.gather(ours.close(), theirs.close())

    asyncio.run(main())


def test_a_worker_that_cannot_listen_is_not_ready(tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match=r"^cannot listen: Address already in use$"):
        supervised(Supervisor, tmp_path, Stolen())


_AS_FIRST_PROCESS = """
import asyncio, ctypes, os, subprocess
from octoai.server.workers import supervisor
from octoai.server.machine import zombies
from tests.server.workers.test_supervisor import Ready, settings_in
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # what children leave behind is ours, as it is the first process's
zombies.LOOK_SECONDS = 0.2
subprocess.run(["sh", "-c", "sleep 0.1 &"], check=True)

def num_ended():
    return sum(line.split(") ")[1][0] == "Z" for line in map(state, children()))

def children():
    return open(f"/proc/self/task/{os.getpid()}/children").read().split()

def state(pid):
    return open(f"/proc/{pid}/stat").read()

async def main():
    supervising = Ready(settings_in("."), None, supervisor.Stop())
    running = asyncio.create_task(supervising.run(lambda: None))
    await asyncio.sleep(1.5)
    print(len(children()), num_ended())
    first, second = supervising._workers.values()
    first.process.kill()
    print(await first.process.wait())
    second.process.kill()
    os._exit(0)

print(len(children()))
asyncio.run(main())
"""


class Ready(Saying):
    said = b'{"kind": "ready"}\n'


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are given to who asks for them on Linux only")
def test_what_a_worker_leaves_behind_does_not_stay_as_a_zombie(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", _AS_FIRST_PROCESS]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in ran.stderr
    assert ran.stdout.splitlines() == ["1", "2 0", "-9"]  # the orphan; both workers, and it no more; a status is known
