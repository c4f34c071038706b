"""Starting processes and timing them, for `sdk.py`: rounds in which every SDK has its turn, in a turning order."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdk_peers import Peer

STAGES = ("import", "client", "answer")
_HERE = Path(__file__).parent


@dataclass
class Samples:
    """Per round: `cold[name][stage]` in milliseconds of wall and CPU time (name `bare`: Python that does nothing),
    `calls[name][workload]` in microseconds. `memory[name]` is measured once."""

    cold: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)


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
    """From the start of a process to its end."""
    command = [str(python), "-P", "-c", program]
    began = time.perf_counter()
    _, status, used = os.wait4(os.posix_spawn(command[0], command, env), 0)
    wall = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{python.parents[1].name}: this program failed:\n{program}")
    return {"wall_ms": wall * 1e3, "cpu_ms": (used.ru_utime + used.ru_stime) * 1e3}


def cold_round(peers: list[Peer], url: str, env: dict[str, str]) -> dict[str, Any]:
    """Bare Python is timed before each SDK, since it is what all else is compared with; and once before that without
    counting, so that the caches are no colder for it than for what follows."""
    bares = []
    figures: dict[str, Any] = {}
    for peer in peers:
        process_ms(peer.python, "pass", env)
        bares.append(process_ms(peer.python, "pass", env))
        figures[peer.name] = {stage: process_ms(peer.python, peer.program(stage, url), env) for stage in STAGES}
    middle = sorted(bares, key=lambda each: each["wall_ms"])[len(bares) // 2]
    return {"bare": {"import": middle}, **figures}


def driven(peer: Peer, what: str, url: str, amount: float, env: dict[str, str]) -> dict[str, Any]:
    command = [str(peer.python), str(_HERE / "sdk_driver.py"), what, peer.name, url, str(amount)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, timeout=900, env=env, check=False)
    if answer.returncode:
        raise RuntimeError(f"{peer.name}: failed (above)")
    return dict(json.loads(answer.stdout))


@dataclass(frozen=True)
class Plan:
    cold_rounds: int
    call_rounds: int
    scale: float  # of the work within a round
    requests: int  # over which memory is watched


def measure(peers: list[Peer], plan: Plan) -> Samples:
    samples = Samples()
    with server() as url, environment() as env:
        cold_round(peers, url, env)  # fills the page cache; compiles what is not
        for number in range(plan.cold_rounds):
            samples.cold.append(cold_round(rotated(peers, number), url, env))
            print(f"cold start, round {number + 1}/{plan.cold_rounds}", file=sys.stderr)
        for number in range(plan.call_rounds):
            turn = rotated(peers, number)
            samples.calls.append({peer.name: driven(peer, "calls", url, plan.scale, env) for peer in turn})
            print(f"calls, round {number + 1}/{plan.call_rounds}", file=sys.stderr)
        if plan.requests:
            samples.memory = {peer.name: driven(peer, "memory", url, plan.requests, env) for peer in peers}
    return samples
