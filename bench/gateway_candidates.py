"""The gateways that `gateway.py` measures, each started over the mock engine: ours from a checkout, the others at
pinned versions in environments of their own, as `sdk.py` has its peers.

Each peer is told of one engine and no more: one worker process or its own threads, logs of warnings only, LiteLLM with
a master key, because it is what asks who is calling. None of them keeps a ledger; ours does.
"""

import contextlib
import http.client
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from gateway_wire import Ask
from ledger import Served
from sdk_peers import Peer, distributions, prepare

START_SECONDS = 90.0
NUM_SLOTS = 4096  # streams at once that ours is told the engine can take: the peers have no such limit by default
_KEY = "sk-bench"
_LITELLM = """\
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_base: "{url}/v1", api_key: none}}
general_settings: {{master_key: {key}}}
"""


class Failed(RuntimeError):
    """A gateway could not be installed or started; the text says which, and why."""


@dataclass
class Upstream:
    """The mock engine, from outside."""

    place: Path
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("gateway_upstream.py")), str(self.socket)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @property
    def socket(self) -> Path:
        return self.place / "engine.sock"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


@dataclass
class Running:
    """A gateway that answers. `headers` are whole lines; `pid` is None for the engine itself."""

    name: str
    version: str
    port: int
    headers: str = ""
    pid: int | None = None
    stop: Callable[[], None] = lambda: None
    service: Served | None = None

    def cpu_seconds(self) -> float:
        """What its processes and all their threads have used."""
        return sum(map(_cpu_nanos, _tree(self.pid))) / 1e9

    def rss_kib(self) -> int:
        return sum(map(_rss_kib, _tree(self.pid)))


def _tree(pid: int | None) -> list[int]:
    """A process and all below it."""
    if pid is None:
        return []
    below = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        below += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(each for child in below for each in _tree(child))]


def _cpu_nanos(pid: int) -> int:
    nanos = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
            nanos += int((task / "schedstat").read_text().split()[0])
    return nanos


def _rss_kib(pid: int) -> int:
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


# ---- the peers ----


@dataclass(frozen=True)
class Gateway:
    """`command` makes the arguments of its start from the engine's address, a free port, another and a scratch
    directory."""

    name: str
    distribution: str
    command: Callable[[str, int, int, Path], list[str]]
    headers: str = ""

    @property
    def peer(self) -> Peer:
        """Only its environment is used here."""
        return Peer(self.name, load="", ready="", answer="")

    def start(self, upstream: Upstream, place: Path) -> Running:
        try:
            prepare(self.peer)
        except (subprocess.CalledProcessError, OSError) as error:
            raise Failed(f"{self.name} cannot be installed: {error}") from None
        place.mkdir()
        port, other_port = _free_port(), _free_port()
        arguments = self.command(upstream.url, port, other_port, place)
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                [str(self.peer.python.with_name(arguments[0])), *arguments[1:]],
                env=_environ(place), cwd=place, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        version = distributions(self.peer)[self.distribution]
        running = Running(self.name, version, port, self.headers, process.pid, lambda: _end(process))
        try:
            _until_ready(running, process)
        except TimeoutError as error:
            running.stop()
            raise Failed(f"{self.name} does not answer: {error}\n{(place / 'log').read_text()[-1500:]}") from None
        return running


def _environ(place: Path) -> dict[str, str]:
    """An empty home, no proxies; LiteLLM's list of prices is the one it was shipped with."""
    return {
        "PATH": os.defpath,
        "HOME": str(place),
        "LANG": "C.UTF-8",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
    }


def _router(name: str, program: list[str], *more: str) -> Gateway:
    """Both came from one code base, and have these options in common."""

    def command(url: str, port: int, other_port: int, place: Path) -> list[str]:
        return [
            *program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", url, "--policy", "round_robin",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(other_port), *more,
        ]  # fmt: skip

    return Gateway(name, name, command)


def _litellm(url: str, port: int, other_port: int, place: Path) -> list[str]:
    config = place / "config.yaml"
    config.write_text(_LITELLM.format(url=url, key=_KEY))
    return ["litellm", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


PEERS = {
    "smg": _router("smg", ["smg", "launch"], "--log-level", "warn"),
    "vllm-router": _router("vllm-router", ["vllm-router"], "--log-level", "warning"),
    "litellm": Gateway("litellm", "litellm", _litellm, f"authorization: Bearer {_KEY}\r\n"),
}


def _free_port() -> int:
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def _until_ready(running: Running, process: subprocess.Popen[bytes]) -> None:
    """Raises TimeoutError, with what it said last."""
    end, said = time.monotonic() + START_SECONDS, ""
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.25)
        try:
            said = answer(running)
        except (OSError, http.client.HTTPException) as error:
            said = repr(error)
        if Ask(2).text in said:
            return
    raise TimeoutError(said)


def answer(running: Running) -> str:
    """One whole answer to two tokens."""
    head, _, body = Ask(2).request("bench", running.headers).decode().partition("\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)) as connection:
        connection.request("POST", "/v1/chat/completions", body, headers)
        return connection.getresponse().read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


# ---- ours ----


def start_ours(name: str, engine_url: str, checkout: Path, place: Path, workers: int) -> Running:
    """The service of that checkout, as `octoai serve` of its own environment, in so many processes."""
    python = checkout / ".venv" / "bin" / "python"
    if not python.exists():
        raise Failed(f"{checkout} has no environment: run `make setup` there")
    service = Served(place, engine_url, "on", str(python), NUM_SLOTS, workers)
    if service.process.poll() is not None or not service.token:
        raise Failed(f"the service of {checkout} did not start")
    version = service.run("--version").split()[-1]
    headers = f"authorization: Bearer {service.token}\r\n"
    return Running(name, version, int(service.port), headers, service.process.pid, service.stop, service)


def ledger_problems(service: Served, answers: int, unanswered: int) -> list[str]:
    """What is wrong with the ledger of a service that has stopped, in sentences.

    Every answer that a client got the beginning of is one request and one charge; what was sent and never answered may
    be in it or not.
    """
    try:
        service.run("ledger", "verify")
    except subprocess.CalledProcessError as error:
        return [f"`octoai ledger verify` fails: {error.stderr.strip()}"]
    path = Path(service.environ["OCTOAI_DATA_DIR"], "octoai.db")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        (rows,) = db.execute("SELECT COUNT(*) FROM requests").fetchone()
        (charges,) = db.execute("SELECT COUNT(*) FROM entries WHERE kind = 'charge'").fetchone()
    return [
        f"{answers} answers (and {unanswered} without one), but {count} {what} in the ledger"
        for what, count in (("requests", rows), ("charges", charges))
        if not answers <= count <= answers + unanswered
    ]
