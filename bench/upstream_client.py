"""What the async HTTP client between the service and an engine costs, over a unix socket.

The engine is a mock in a process of its own that answers at once; each client runs in a process of its own,
whose CPU time is the figure. Rounds are interleaved, figures are medians, ratios are taken within a round.
"Floor" reads with raw asyncio streams and does not even take the chunks apart: nothing real can be cheaper.

    python bench/upstream_client.py [--rounds 5] [--seconds 1] [--only NAME]…
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_EVENTS = 256
BATCH = 16
PACE_SECONDS = 0.002  # between the events of a stream, so that each arrives by itself
EVENT = b"data: " + b"e" * 212 + b"\n\n"  # 220 bytes
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
ASK = b'{"prompt":"' + b"q" * 487 + b'"}'  # 500 bytes
ANSWER = b'{"text":"' + b"a" * 589 + b'"}'  # 600 bytes
LAST_CHUNK = b"0\r\n\r\n"


# ---- the mock engine ----


class Engine(asyncio.Protocol):
    """`/json` answers at once; `/each` streams an event per write, paced; `/batched` 16 per write."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if found and length and len(body) >= int(length[1]):
            self.buffer = b""
            self.answer(head.split(b" ", 2)[1])

    def answer(self, path: bytes) -> None:
        if path == b"/json":
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            self.transport.write(head % len(ANSWER) + ANSWER)
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self.task = asyncio.ensure_future(self.each() if path == b"/each" else self.batched())

    async def each(self) -> None:
        for _ in range(NUM_EVENTS):
            self.transport.write(CHUNK)
            await asyncio.sleep(PACE_SECONDS)
        self.transport.write(LAST_CHUNK)

    async def batched(self) -> None:
        for _ in range(NUM_EVENTS // BATCH):
            self.transport.write(CHUNK * BATCH)
            await asyncio.sleep(0)
        self.transport.write(LAST_CHUNK)


async def serve(path: str) -> None:
    server = await asyncio.get_running_loop().create_unix_server(Engine, path)
    await server.serve_forever()


# ---- the clients: `post` gives a whole body, `stream` its pieces as they come ----


class Aiohttp:
    def __init__(self, socket: str) -> None:
        import aiohttp

        self.session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=socket, limit=0))

    async def post(self) -> bytes:
        async with self.session.post("http://engine/json", data=ASK) as response:
            return bytes(await response.read())

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        async with self.session.post(f"http://engine{path}", data=ASK) as response:
            async for piece in response.content.iter_any():
                yield piece

    async def close(self) -> None:
        await self.session.close()


class Httpx2:
    def __init__(self, socket: str) -> None:
        import httpx2

        transport = httpx2.AsyncHTTPTransport(uds=socket, limits=httpx2.Limits(max_connections=None))
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://engine")

    async def post(self) -> bytes:
        return bytes((await self.client.post("/json", content=ASK)).content)

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        async with self.client.stream("POST", path, content=ASK) as response:
            async for piece in response.aiter_raw():
                yield piece

    async def close(self) -> None:
        await self.client.aclose()


def request_bytes(path: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: engine\r\nContent-Length: {len(ASK)}\r\n\r\n".encode() + ASK


class Floor:
    """Raw asyncio streams; the body's end is recognised, its chunks are not taken apart."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        pair = self.idle.pop() if self.idle else await asyncio.open_unix_connection(self.socket)
        yield pair
        self.idle.append(pair)

    async def post(self) -> bytes:
        async with self.connection() as (reader, writer):
            writer.write(request_bytes("/json"))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            return await reader.readexactly(length)

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        async with self.connection() as (reader, writer):
            writer.write(request_bytes(path))
            await reader.readuntil(b"\r\n\r\n")
            tail = b""
            while tail != LAST_CHUNK:
                piece = await reader.read(65536)
                tail = (tail + piece)[-len(LAST_CHUNK) :]
                yield piece

    async def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


class Parsed(Floor):
    """What one would write instead of taking a client: raw streams under httptools' parser."""

    async def body(self, path: str) -> AsyncIterator[bytes]:
        import httptools

        async with self.connection() as (reader, writer):
            writer.write(request_bytes(path))
            answer = Body()
            parser = httptools.HttpResponseParser(answer)
            while not answer.whole:
                parser.feed_data(await reader.read(65536))
                if answer.pieces:
                    yield b"".join(answer.pieces)
                    answer.pieces.clear()

    async def post(self) -> bytes:
        return b"".join([piece async for piece in self.body("/json")])

    def stream(self, path: str) -> AsyncIterator[bytes]:
        return self.body(path)


class Body:
    """httptools' callbacks."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.whole = False

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        self.whole = True


@dataclass(frozen=True)
class Candidate:
    needs: tuple[str, ...]
    client: Callable[[str], Any]


CANDIDATES = {
    "aiohttp": Candidate(("aiohttp",), Aiohttp),
    "httpx2": Candidate(("httpx2",), Httpx2),
    "streams + httptools": Candidate(("httptools",), Parsed),
    "floor (raw streams)": Candidate((), Floor),
}


# ---- one measurement, in a process of its own ----


async def ask(client: Any, path: str, times: list[float]) -> None:
    """One request; of a stream, all its events must be there."""
    began = time.perf_counter()
    if path == "/json":
        whole = await client.post() == ANSWER
    else:
        whole = sum([piece.count(b"\n\n") async for piece in client.stream(path)]) == NUM_EVENTS
    if not whole:
        raise RuntimeError(f"not the whole answer at {path}")
    times.append(time.perf_counter() - began)


async def drive(name: str, socket: str, path: str, clients: int, seconds: float) -> dict[str, float]:
    client, times = CANDIDATES[name].client(socket), []
    await asyncio.gather(*(ask(client, path, times) for _ in range(clients)))  # connects, warms up
    times.clear()
    wall, cpu = time.perf_counter(), time.process_time()

    async def keep_asking() -> None:
        while time.perf_counter() < wall + seconds:
            await ask(client, path, times)

    await asyncio.gather(*(keep_asking() for _ in range(clients)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    await client.close()
    count = len(times)
    return {"rate": count / wall, "cpu_us": cpu * 1e6 / count, "p50_ms": statistics.median(times) * 1e3}


def run_loop(main: Coroutine[Any, Any, Any]) -> Any:
    """On uvloop, as the service does, where it is installed."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(main)
    return asyncio.run(main)


# ---- the run ----


def measure(name: str, socket: str, path: str, clients: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, socket, path, str(clients), str(seconds)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=seconds + 60)
    return dict(json.loads(answer.stdout))


def measure_all(name: str, socket: str, seconds: float) -> dict[str, float]:
    one = measure(name, socket, "/json", 1, seconds)
    many = measure(name, socket, "/json", 16, seconds)
    each = measure(name, socket, "/each", 16, seconds)
    batched = measure(name, socket, "/batched", 16, seconds)
    return {
        "p50 ms, 1": one["p50_ms"],
        "requests/s, 16": many["rate"],
        "CPU us/request": many["cpu_us"],
        "CPU us/event, each": each["cpu_us"] / NUM_EVENTS,
        "CPU us/event, batched": batched["cpu_us"] / NUM_EVENTS,
        "events/s, batched": batched["rate"] * NUM_EVENTS,
    }


@contextlib.contextmanager
def engine() -> Iterator[str]:
    """The mock engine in a process of its own: the path of its socket."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "engine.sock"
        process = subprocess.Popen([sys.executable, __file__, "--serve", str(path)])
        try:
            while not path.exists() and process.poll() is None:
                time.sleep(0.02)
            yield str(path)
        finally:
            process.terminate()
            process.wait()


def run(names: list[str], rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with engine() as socket:
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                samples[name].append(measure_all(name, socket, seconds))
            print(f"round {number + 1}/{rounds}", file=sys.stderr)
    return samples


def show(samples: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and the median of the ratio to the first candidate within a round."""
    base = next(iter(samples.values()))
    width = max(map(len, samples)) + 2
    print(" " * width + "".join(f"{key:>24}" for key in base[0]))
    for name, rounds in samples.items():
        cells = []
        for key in base[0]:
            value = statistics.median(each[key] for each in rounds)
            ratio = statistics.median(each[key] / first[key] for each, first in zip(rounds, base, strict=True))
            cells.append(f"{value:>15,.2f} ({ratio:4.2f}x)")
        print(f"{name:<{width}}" + "".join(cells))
    print("\nratios: to the first row, within a round")


def installed(names: list[str]) -> list[str]:
    present = []
    for name in names:
        missing = [need for need in CANDIDATES[name].needs if importlib.util.find_spec(need) is None]
        if missing:
            print(f"skipped: {name} (not installed: {', '.join(missing)})")
        else:
            present.append(name)
    return present


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per workload, candidate and round")
    parser.add_argument("--only", action="append", choices=list(CANDIDATES), help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "upstream_client.json")
    options = parser.parse_args()
    names = installed(options.only or list(CANDIDATES))
    if not names:
        parser.error("no candidate is installed")
    samples = run(names, options.rounds, options.seconds)
    show(samples)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%F")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"samples": samples, "machine": machine}, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", path]:
            with contextlib.suppress(KeyboardInterrupt):
                run_loop(serve(path))
        case ["--measure", name, socket, path, clients, seconds]:
            print(json.dumps(run_loop(drive(name, socket, path, int(clients), float(seconds)))))
        case _:
            main()
