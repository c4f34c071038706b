"""Starting processes and timing them, for `sdk.py`.

The machine's speed wanders (other tenants, clock rates), so whatever is compared is measured within a second or two: in
a round every SDK has its turn at one thing, in a turning order, before the next thing begins.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdk_peers import Peer

STAGES = ("import", "client", "answer")
WORKLOADS = (
    "stream",
    "stream, async",
    "stream, paced",
    "stream, async, paced",
    "plain",
    "plain, async",
    "100 streams",
)
TURN_SECONDS = 300.0  # for one thing that one SDK is asked for
_HERE = Path(__file__).parent


class FailedError(RuntimeError):
    """An SDK did not do what it was asked for; the text says which, and what."""


@dataclass
class Samples:
    """Per round: `cold[name][stage]` in milliseconds of wall and CPU time (name `bare`: Python that does nothing),
    `calls[name][workload]` in microseconds. `memory[name]` is measured once. An SDK is in a round where it did all of
    it; `failed[name]` says why one was left out from some time on."""

    cold: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def turn(self, peer: Peer, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What it measures; nothing of an SDK that fails, now or before."""
        if peer.name not in self.failed:
            try:
                return work()
            except FailedError as error:
                self.failed[peer.name] = str(error)
                print(f"{error}; it is left out from here on", file=sys.stderr)
        return {}

    def whole(self, figures: dict[str, Any]) -> dict[str, Any]:
        """A round without those that did not do all of it."""
        return {name: each for name, each in figures.items() if name not in self.failed}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The loopback server's address."""
    command = [sys.executable, str(_HERE / "sdk_server.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(10)


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Of the measured processes: an empty home, no proxies, a token for every SDK that wants one to be made."""
    keys = ("OCTOAI_TOKEN", "OPENAI_API_KEY", "GROQ_API_KEY", "TOGETHER_API_KEY")
    with tempfile.TemporaryDirectory() as home:
        yield {"PATH": os.defpath, "HOME": home, "LANG": "C.UTF-8", **dict.fromkeys(keys, "bench")}


def rotated(peers: list[Peer], number: int) -> list[Peer]:
    return peers[number % len(peers) :] + peers[: number % len(peers)]


def process_ms(python: Path, program: str, env: dict[str, str]) -> dict[str, float]:
    """From the start of a process to its end. Raises FailedError."""
    command = [str(python), "-P", "-c", program]
    pids: list[int] = []
    watch = threading.Timer(TURN_SECONDS, lambda: os.kill(pids[0], signal.SIGKILL))
    watch.start()
    try:
        began = time.perf_counter()
        pids.append(os.posix_spawn(command[0], command, env))
        _, status, used = os.wait4(pids[0], 0)
        wall = time.perf_counter() - began
    finally:
        watch.cancel()
    if status:
        raise FailedError(f"{python.parents[1].name}: this program failed:\n{program}")
    return {"wall_ms": wall * 1e3, "cpu_ms": (used.ru_utime + used.ru_stime) * 1e3}


def cold_round(peers: list[Peer], samples: Samples, url: str, env: dict[str, str]) -> dict[str, Any]:
    """Bare Python is what all else is compared with: it has a turn like any other, at every stage."""
    figures: dict[str, Any] = {"bare": {}, **{peer.name: {} for peer in peers}}
    python = peers[0].python
    for stage in STAGES:
        process_ms(python, "pass", env)  # not counted: what came before has filled the processor's caches
        figures["bare"][stage] = process_ms(python, "pass", env)
        for peer in peers:
            program = peer.program(stage, url)
            figures[peer.name][stage] = samples.turn(peer, lambda p=peer, do=program: process_ms(p.python, do, env))
    return samples.whole(figures)


def driver(peer: Peer, env: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [str(peer.python), str(_HERE / "sdk_driver.py"), words[0], peer.name, *words[1:]]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def said(peer: Peer, process: subprocess.Popen[str], line: str = "") -> dict[str, float]:
    """The driver's answer to a line. It has printed why, if there is none: then FailedError is raised."""
    assert process.stdin is not None
    assert process.stdout is not None
    answer = ""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=process.stdin, flush=True)
        if select.select([process.stdout], [], [], TURN_SECONDS)[0]:
            answer = process.stdout.readline()
    if not answer:
        process.kill()
        raise FailedError(f"{peer.name}: failed at {line or 'memory'!r}")
    return dict(json.loads(answer))


def call_round(peers: list[Peer], samples: Samples, drivers: dict[str, subprocess.Popen[str]]) -> dict[str, Any]:
    figures: dict[str, Any] = {peer.name: {} for peer in peers}
    for work in WORKLOADS:
        for peer in peers:
            figures[peer.name][work] = samples.turn(peer, lambda p=peer, do=work: said(p, drivers[p.name], do))
    return samples.whole(figures)


def call_rounds(peers: list[Peer], samples: Samples, rounds: int, url: str, env: dict[str, str]) -> None:
    with contextlib.ExitStack() as stack:
        drivers = {peer.name: stack.enter_context(driver(peer, env, "calls", url)) for peer in peers}
        call_round(peers, samples, drivers)  # connects, builds models, warms up
        for number in range(rounds):
            samples.calls.append(call_round(rotated(peers, number), samples, drivers))
            print(f"calls, round {number + 1}/{rounds}", file=sys.stderr)


def memory(peer: Peer, requests: int, url: str, env: dict[str, str]) -> dict[str, float]:
    with driver(peer, env, "memory", url, str(requests)) as process:
        return said(peer, process)


@dataclass(frozen=True)
class Plan:
    cold_rounds: int
    call_rounds: int
    requests: int  # over which memory is watched


def measure(peers: list[Peer], plan: Plan) -> Samples:
    """One that fails is left out from then on; what was measured before stays."""
    samples = Samples()
    with server() as url, environment() as env:
        cold_round(peers, samples, url, env)  # fills the page cache; compiles what is not
        for number in range(plan.cold_rounds):
            samples.cold.append(cold_round(rotated(peers, number), samples, url, env))
            print(f"cold start, round {number + 1}/{plan.cold_rounds}", file=sys.stderr)
        call_rounds(peers, samples, plan.call_rounds, url, env)
        for peer in peers if plan.requests else ():
            found = samples.turn(peer, lambda p=peer: memory(p, plan.requests, url, env))
            samples.memory |= {peer.name: found} if found else {}
    return samples
