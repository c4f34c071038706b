"""What the ledger costs a request: the same load on two services, one with the ledger on, one with it off.

Both run over the same mock engine and are asked in turn, in short interleaved rounds whose order changes. Figures are
medians over the rounds; a difference is taken within a round. The engine answers at once ("whole", "stream"), where
everything the ledger does is on the path, or after 20 ms ("whole after 20 ms"), as a quick model might, when it does
most of it meanwhile. A last part sends made-up tokens as fast as it can and counts how often the service looks whether
its database has changed.

    python bench/ledger.py [--rounds 25] [--seconds 0.4] [--short]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ledger.json"
NUM_TOKENS = 16
KINDS = ("whole", "stream", "whole after 20 ms")
SLOW_TOKENS = NUM_TOKENS + 1  # a request for so many is answered after a while
SLOW_SECONDS = 0.02


# ---- the mock engine: a process of its own ----


class Engine(asyncio.Protocol):
    """Speaks vLLM's dialect: every request gets the same few events in one write. It counts tokens, too."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not found or (length and len(body) < int(length[1])):
            return
        self.buffer = b""
        if b'"max_tokens":%d,' % SLOW_TOKENS in body:
            asyncio.get_running_loop().call_later(SLOW_SECONDS, self.transport.write, ANSWER)
        elif head.startswith(b"POST /tokenize"):
            self.transport.write(COUNTED)
        else:
            self.transport.write(MODELS if head.startswith(b"GET") else ANSWER)


def _answer() -> bytes:
    frame = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    events = []
    for number in range(NUM_TOKENS):
        usage = {"prompt_tokens": 30, "completion_tokens": number + 1, "total_tokens": 31 + number}
        last = number == NUM_TOKENS - 1
        choice = {"index": 0, "delta": {"content": " word"}, "finish_reason": "stop" if last else None}
        events.append({**frame, "choices": [choice], "usage": usage})
    events.append({**frame, "choices": [], "usage": usage})
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    body = text.encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def _whole(said: dict[str, Any]) -> bytes:
    body = json.dumps(said).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


ANSWER = _answer()
MODELS = _whole({"object": "list", "data": [{"id": "mock", "max_model_len": 8192}]})
COUNTED = _whole({"count": 30, "max_model_len": 8192, "tokens": [1] * 30})


async def engine() -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# ---- the load: a process of its own ----


class Client(asyncio.Protocol):
    """Asks again as soon as an answer is whole, and keeps how long each took. One that does not begin with `status` is
    the last."""

    def __init__(self, asks: Iterator[bytes], times: list[float], status: bytes) -> None:
        self.asks, self.times, self.status = asks, times, status
        self.wrong = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.got = b""
        self.began = time.perf_counter()
        self.transport.write(next(self.asks))

    def data_received(self, data: bytes) -> None:
        self.got += data
        if not self.got.startswith(self.status):
            self.wrong = self.got
        elif is_whole(self.got):
            self.times.append(time.perf_counter() - self.began)
            self.ask()


def is_whole(got: bytes) -> bool:
    if got.endswith(b"0\r\n\r\n"):
        return True
    head, found, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head) if found else None
    return length is not None and len(body) >= int(length[1])


def chat(token: str, kind: str) -> bytes:
    body = {
        "model": "mock",
        "messages": [{"role": "user", "content": "word " * 30}],
        "max_tokens": SLOW_TOKENS if kind.endswith("ms") else NUM_TOKENS,
    }
    body |= {"stream": True, "stream_options": {"include_usage": True}} if kind == "stream" else {}
    text = json.dumps(body).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    ).encode() + text


def made_up(count: int) -> list[bytes]:
    """Tokens that are well formed, so that only a look-up tells that they are none."""
    from octoai.server.tokens import new_token

    head = "GET /v1/models HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {}\r\n\r\n"
    return [head.format(new_token()).encode() for _ in range(count)]


async def load(
    port: int, asks: Iterator[bytes], clients: int, seconds: float, *, status: bytes = b"HTTP/1.1 200"
) -> dict[str, float]:
    loop, times = asyncio.get_running_loop(), []
    made = [
        await loop.create_connection(lambda: Client(asks, times, status), "127.0.0.1", port) for _ in range(clients)
    ]
    await asyncio.sleep(0.2)
    times.clear()
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - began
    for transport, client in made:
        transport.close()
        if client.wrong:
            raise SystemExit(f"a wrong answer: {client.wrong!r}")
    return {"rate": len(times) / elapsed, "p50_ms": statistics.median(times) * 1e3, "p99_ms": _p99(times) * 1e3}


def _p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


def run_load(port: str, token: str, kind: str, clients: str, seconds: str) -> None:
    import uvloop

    asks, status = itertools.repeat(chat(token, kind)), b"HTTP/1.1 200"
    if kind == "flood":
        asks, status = itertools.cycle(made_up(8_000)), b"HTTP/1.1 401"
    print(json.dumps(uvloop.run(load(int(port), asks, int(clients), float(seconds), status=status))))


# ---- the services ----


class Served:
    """`octoai serve` over the mock engine, with a directory of its own; `python` is that of its environment."""

    def __init__(
        self,
        place: Path,
        engine_url: str,
        ledger: str,
        python: str = sys.executable,
        num_slots: int = 256,
        workers: int = 1,
    ) -> None:
        place.mkdir()
        (place / "octoai.toml").write_text(
            f'ledger = "{ledger}"\nport = 0\nlog_level = "warning"\n[[models]]\nid = "mock"\n'
            f'engine_url = "{engine_url}"\ndialect = "vllm"\nnum_slots = {num_slots}\n'
            'input_price = "0.15"\noutput_price = "0.60"\n'
        )
        self.python = python
        # Only where there are several: a checkout to compare with may not know the setting.
        several = {"OCTOAI_WORKERS": str(workers)} if workers > 1 else {}
        self.environ = {
            **os.environ,
            "OCTOAI_CONFIG_DIR": str(place),
            "OCTOAI_DATA_DIR": str(place / "data"),
            "OCTOAI_COUNT_LOOKS": "1",
            **several,
        }
        command = [python, "-m", "octoai", "serve"]
        self.process = subprocess.Popen(command, cwd=place, env=self.environ, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.token = ""
        for line in self.process.stdout:
            if "shown once:" in line:
                self.token = line.rsplit(" ", 1)[1].strip()
            if "ready on" in line:
                self.port = line.rsplit(":", 1)[1].strip()
                break

    def measured(self, kind: str, clients: int, seconds: float) -> dict[str, float]:
        command = [sys.executable, __file__, "--load", self.port, self.token, kind, str(clients), str(seconds)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def run(self, *arguments: str) -> str:
        command = [self.python, "-m", "octoai", *arguments]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def looks(self) -> float:
        """How often the service has looked whether accounts or tokens changed."""
        from urllib.request import urlopen

        text = urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
        return float(re.search(r"^octoai_directory_looks_total (\S+)", text, re.M)[1])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def compared(on: Served, off: Served, rounds: int, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        for clients in (1, 16):
            pairs = []
            for number in range(rounds):
                order = (on, off) if number % 2 else (off, on)
                measured = {each: each.measured(kind, clients, seconds) for each in order}
                pairs.append((measured[on], measured[off]))
            found[f"{kind}, {clients}"] = {
                "on_p50_ms": statistics.median(a["p50_ms"] for a, _ in pairs),
                "off_p50_ms": statistics.median(b["p50_ms"] for _, b in pairs),
                "added_p50_ms": statistics.median(a["p50_ms"] - b["p50_ms"] for a, b in pairs),
                "added_p99_ms": statistics.median(a["p99_ms"] - b["p99_ms"] for a, b in pairs),
                "on_rate": statistics.median(a["rate"] for a, _ in pairs),
                "off_rate": statistics.median(b["rate"] for _, b in pairs),
                "share_of_rate": statistics.median(a["rate"] / b["rate"] for a, b in pairs),
            }
            print(f"{kind:17} {clients:3} clients  {shown(found[f'{kind}, {clients}'])}", flush=True)
    return found


def shown(figures: dict[str, float]) -> str:
    return (
        f"p50 on {figures['on_p50_ms']:.2f} ms, off {figures['off_p50_ms']:.2f} ms, "
        f"added {figures['added_p50_ms']:+.2f} ms (p99 {figures['added_p99_ms']:+.2f})   "
        f"requests/s on {figures['on_rate']:.0f}, off {figures['off_rate']:.0f}, share {figures['share_of_rate']:.2f}"
    )


def flooded(on: Served, seconds: float) -> dict[str, float]:
    before, began = on.looks(), time.perf_counter()
    figures = on.measured("flood", 512, seconds)
    elapsed = time.perf_counter() - began
    figures["looks_per_second"] = (on.looks() - before) / elapsed
    print(
        f"made-up tokens: {figures['rate']:.0f} a second refused, p50 {figures['p50_ms']:.3f} ms; "
        f"looks into the database: {figures['looks_per_second']:.1f} a second"
    )
    return figures


@contextlib.contextmanager
def mock_engine() -> Iterator[str]:
    """Its URL, while it runs."""
    mock = subprocess.Popen([sys.executable, __file__, "--engine"], stdout=subprocess.PIPE, text=True)
    assert mock.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(mock.stdout.readline())}/v1"
    finally:
        mock.terminate()


def keep(figures: dict[str, Any], place: Path) -> None:
    """With the date and the machine."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, **figures}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        asyncio.run(engine())
        return
    if args.load:
        run_load(*args.load)
        return
    rounds, seconds = (5, 0.4) if args.short else (args.rounds, args.seconds)
    with tempfile.TemporaryDirectory() as directory, mock_engine() as url:
        on, off = (Served(Path(directory, name), url, name) for name in ("on", "off"))
        try:
            found = compared(on, off, rounds, seconds)
            found["flood"] = flooded(on, max(2.0, seconds))
            print(on.run("ledger", "verify"))
        finally:
            on.stop(), off.stop()
    if not args.short:
        keep(found, RESULTS)


if __name__ == "__main__":
    main()
