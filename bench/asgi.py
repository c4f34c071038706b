"""Which HTTP server and framework carry a request cheapest, and how each behaves at the edges of a stream.

Every candidate serves the same routes from a process of its own on a loopback port; the load comes from
another process (raw asyncio protocols that count bytes). Rounds are interleaved, after one that is not
counted; figures are medians, ratios are taken within a round. Knows nothing of the project: it measures what
the project stands on.

    python bench/asgi.py [--rounds 5] [--seconds 1] [--only NAME]…
"""

import argparse
import asyncio
import collections
import contextlib
import importlib.util
import json
import logging
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
NUM_EVENTS = 64
EVENT = b"data: " + b"e" * 212 + b"\n\n"  # 220 bytes
DONE = b"data: [DONE]\n\n"
ASK = b'{"prompt":"' + b"q" * 487 + b'"}'  # 500 bytes
ANSWER = b'{"text":"' + b"a" * 589 + b'"}'  # 600 bytes
LAST_CHUNK = b"0\r\n\r\n"
SEEN = ["nothing yet"]  # what a server saw of the last client that went away; asked for at /seen


@dataclass(frozen=True)
class Candidate:
    needs: tuple[str, ...]
    serve: Callable[[str, int], None]
    app: str


# ---- the routes, as raw ASGI: shared by every ASGI candidate ----


async def body_of(receive: Any) -> bytes:
    parts = []
    while (message := await receive()).get("more_body"):
        parts.append(message["body"])
    return b"".join([*parts, message.get("body", b"")])


async def start(send: Any, kind: bytes, length: int | None = None) -> None:
    headers = [(b"content-type", kind)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def chunk(send: Any, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def plain(receive: Any, send: Any) -> None:
    json.loads(await body_of(receive))
    await start(send, b"application/json", len(ANSWER))
    await chunk(send, ANSWER, more=False)


async def seen(receive: Any, send: Any) -> None:
    answer = SEEN[-1].encode()
    await start(send, b"text/plain", len(answer))
    await chunk(send, answer, more=False)


async def stream(receive: Any, send: Any) -> None:
    """One event per send and per turn of the loop, as tokens come; watches for the client leaving."""
    await body_of(receive)
    watch = asyncio.ensure_future(receive())
    await start(send, b"text/event-stream")
    for _ in range(NUM_EVENTS):
        await chunk(send, EVENT)
        await asyncio.sleep(0)
    await chunk(send, b"", more=False)
    watch.cancel()


async def watching(receive: Any, send: Any) -> None:
    """A slow answer whose handler also listens for the disconnect."""
    await body_of(receive)
    began = time.monotonic()
    told = asyncio.ensure_future(receive())
    try:
        done, _ = await asyncio.wait({told}, timeout=0.8)
        SEEN.append(f"told after {time.monotonic() - began:.2f} s" if done else "not told")
    except asyncio.CancelledError:
        SEEN.append(f"cancelled after {time.monotonic() - began:.2f} s")
        raise
    await start(send, b"text/plain", 0)
    await chunk(send, b"", more=False)


async def unwatching(receive: Any, send: Any) -> None:
    await body_of(receive)
    try:
        await asyncio.sleep(0.8)
        SEEN.append("ran to its end")
    except asyncio.CancelledError:
        SEEN.append("cancelled")
        raise
    await start(send, b"text/plain", 0)
    await chunk(send, b"", more=False)


async def cut_by_raising(receive: Any, send: Any) -> None:
    await cut_by_returning(receive, send)
    raise ConnectionAbortedError("the engine died")


async def cut_by_returning(receive: Any, send: Any) -> None:
    await body_of(receive)
    await start(send, b"text/event-stream")
    await chunk(send, EVENT)
    await asyncio.sleep(0.05)


async def done_in_one_send(receive: Any, send: Any) -> None:
    await cut_by_returning(receive, send)
    await chunk(send, DONE, more=False)


async def done_in_two_sends(receive: Any, send: Any) -> None:
    await cut_by_returning(receive, send)
    await chunk(send, DONE)
    await chunk(send, b"", more=False)


ROUTES = {
    "/plain": plain,
    "/stream": stream,
    "/seen": seen,
    "/watching": watching,
    "/unwatching": unwatching,
    "/cut-raising": cut_by_raising,
    "/cut-returning": cut_by_returning,
    "/done-one": done_in_one_send,
    "/done-two": done_in_two_sends,
}


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application on one route (Starlette takes an object with `__call__` as such)."""

    answer: Callable[[Any, Any], Any]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(receive, send)


def raw() -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await ROUTES[scope["path"]](receive, send)

    return app


def starlette(plain: Any = None, stream: Any = None) -> Any:
    """Starlette's routing with its Request and Response, and an own response for the stream; or as given."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        json.loads(await request.body())
        return Response(ANSWER, media_type="application/json")

    routes = [Route("/plain", plain or answer, methods=["POST"])]
    if stream:
        routes.append(Route("/stream", stream, methods=["POST"]))
    return Starlette(routes=routes + [Route(path, Endpoint(each)) for path, each in ROUTES.items()])


def starlette_streaming_response() -> Any:
    from starlette.requests import Request
    from starlette.responses import StreamingResponse

    async def events() -> AsyncIterator[bytes]:
        for _ in range(NUM_EVENTS):
            yield EVENT
            await asyncio.sleep(0)

    async def answer(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(events(), media_type="text/event-stream")

    return starlette(stream=answer)


def starlette_raw_endpoints() -> Any:
    """Starlette finds the route; the hot endpoint is an ASGI application, without Request and Response."""
    return starlette(plain=Endpoint(plain))


# ---- the servers ----


@dataclass
class Cork:
    """A transport that holds a response head until its first body bytes: uvicorn writes each by itself."""

    transport: Any
    loop: asyncio.AbstractEventLoop
    head: bytes = b""

    def write(self, data: bytes) -> None:
        if self.head:
            data, self.head = self.head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self.head = data
            self.loop.call_soon(self.flush)  # a head whose body is not there yet leaves all the same
            return
        self.transport.write(data)

    def flush(self) -> None:
        if self.head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self.transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


def corked_protocol() -> Any:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Corked(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(Cork(transport, self.loop))

    return Corked


def serve_uvicorn(app: str, port: int, http: Any = "httptools") -> None:
    import uvicorn

    uvicorn.run(globals()[app](), host=HOST, port=port, loop="uvloop", http=http, ws="none", access_log=False)


def serve_uvicorn_corked(app: str, port: int) -> None:
    serve_uvicorn(app, port, http=corked_protocol())


def serve_granian(app: str, port: int) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops

    Granian(
        target=f"asgi:{app}",
        factory=True,
        address=HOST,
        port=port,
        interface=Interfaces.ASGINL,
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        workers=1,
    ).serve()


def serve_hypercorn(app: str, port: int) -> None:
    import uvloop
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"{HOST}:{port}"]
    uvloop.run(serve(globals()[app](), config))


async def aiohttp_chunks(request: Any, *chunks: bytes) -> Any:
    from aiohttp import web

    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    for data in chunks:
        await response.write(data)
        await asyncio.sleep(0)
    return response


async def aiohttp_slow(request: Any) -> Any:
    from aiohttp import web

    await request.read()
    began = time.monotonic()
    try:
        await asyncio.sleep(0.8)
        SEEN.append("ran to its end")
    except asyncio.CancelledError:
        SEEN.append(f"cancelled after {time.monotonic() - began:.2f} s")
        raise
    return web.Response()


async def aiohttp_answer(request: Any) -> Any:
    """Every route of `ROUTES`, in aiohttp's own manner; `/cut-raising` closes the transport."""
    from aiohttp import web

    path = request.path
    if path == "/plain":
        json.loads(await request.read())
        return web.Response(body=ANSWER, content_type="application/json")
    if path == "/seen":
        return web.Response(text=SEEN[-1])
    if path in ("/watching", "/unwatching"):
        return await aiohttp_slow(request)
    await request.read()
    if path == "/stream":
        return await aiohttp_chunks(request, *[EVENT] * NUM_EVENTS)
    response = await aiohttp_chunks(request, EVENT)
    await asyncio.sleep(0.05)
    if path == "/cut-raising":
        request.transport.close()
    elif path == "/done-one":
        await response.write_eof(DONE)
    elif path == "/done-two":
        await response.write(DONE)
        await response.write_eof()
    return response


def serve_aiohttp(app: str, port: int) -> None:
    import uvloop
    from aiohttp import web

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    application = web.Application()
    application.router.add_route("*", "/{path}", aiohttp_answer)
    web.run_app(application, host=HOST, port=port, access_log=None, print=None, handler_cancellation=True)


UVICORN = ("uvicorn", "httptools", "uvloop", "starlette")
CANDIDATES = {
    "uvicorn+starlette": Candidate(UVICORN, serve_uvicorn, "starlette"),
    "… StreamingResponse": Candidate(UVICORN, serve_uvicorn, "starlette_streaming_response"),
    "… raw endpoints": Candidate(UVICORN, serve_uvicorn, "starlette_raw_endpoints"),
    "… raw endpoints, corked": Candidate(UVICORN, serve_uvicorn_corked, "starlette_raw_endpoints"),
    "uvicorn+raw ASGI": Candidate(UVICORN[:3], serve_uvicorn, "raw"),
    "granian+starlette": Candidate(("granian", "uvloop", "starlette"), serve_granian, "starlette"),
    "granian+raw ASGI": Candidate(("granian", "uvloop"), serve_granian, "raw"),
    "aiohttp.web": Candidate(("aiohttp", "uvloop"), serve_aiohttp, ""),
    "hypercorn+starlette": Candidate(("hypercorn", "uvloop", "starlette"), serve_hypercorn, "starlette"),
}


# ---- the load: a process of its own ----


def request_bytes(path: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(ASK)}\r\n\r\n".encode() + ASK


class Connection(asyncio.Protocol):
    """Asks again as soon as an answer is whole: by its known size, or by the last chunk where `size` is 0."""

    def __init__(self, path: str, size: int, times: list[float]) -> None:
        self.request, self.size, self.times = request_bytes(path), size, times

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.got, self.tail = 0, b""
        self.began = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.got += len(data)
        if not self.size:
            self.tail = (self.tail + data)[-len(LAST_CHUNK) :]
        if self.tail == LAST_CHUNK if not self.size else self.got >= self.size:
            self.times.append(time.perf_counter() - self.began)
            self.ask()


async def load(port: int, path: str, size: int, clients: int, seconds: float) -> dict[str, float]:
    loop, times = asyncio.get_running_loop(), []
    for _ in range(clients):
        await loop.create_connection(lambda: Connection(path, size, times), HOST, port)
    await asyncio.sleep(0.1)
    times.clear()
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    return {"rate": len(times) / (time.perf_counter() - began), "p50_ms": statistics.median(times) * 1e3}


def run_load(arguments: list[str]) -> None:
    port, path, size, clients, seconds = arguments
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    print(json.dumps(asyncio.run(load(int(port), path, int(size), int(clients), float(seconds)))))


# ---- behaviour at the edges ----


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=2)


def data_segments(client: socket.socket) -> int:
    """TCP segments with data that reached this socket: `tcpi_data_segs_in`, Linux."""
    return struct.unpack_from("I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 152)[0]


def read_until(client: socket.socket, end: bytes) -> tuple[bytes, int]:
    """What came up to `end`, or to the end of the connection, and in how many receive calls."""
    got, calls = b"", 0
    while end not in got and (data := client.recv(65536)):
        got, calls = got + data, calls + 1
    return got, calls


def whole_answer(port: int, path: str) -> bytes:
    with connect(port) as client:
        client.sendall(request_bytes(path))
        return read_until(client, {"/plain": b'"}', "/stream": LAST_CHUNK}[path])[0]


def first_bytes(port: int) -> str:
    """Segments and receive calls until the first event is there: most common of 20."""
    seen_counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for _ in range(20):
        with connect(port) as client:
            client.sendall(request_bytes("/cut-returning"))
            _, calls = read_until(client, EVENT)
            seen_counts[(data_segments(client), calls)] += 1
    (segments, calls), times = seen_counts.most_common(1)[0]
    return f"{segments} segment(s), {calls} recv ({times}/20)"


def last_bytes(port: int, path: str) -> str:
    counts: collections.Counter[int] = collections.Counter()
    for _ in range(10):
        with connect(port) as client:
            client.sendall(request_bytes(path))
            read_until(client, EVENT)
            time.sleep(0.02)
            before = data_segments(client)
            read_until(client, LAST_CHUNK)
            time.sleep(0.005)
            counts[data_segments(client) - before] += 1
    segments, times = counts.most_common(1)[0]
    return f"{segments} ({times}/10)"


def cut(port: int, path: str) -> str:
    with connect(port) as client:
        client.sendall(request_bytes(path))
        try:
            got, _ = read_until(client, LAST_CHUNK)
        except TimeoutError:
            return "left hanging"
        except ConnectionResetError:
            return "cut, by a reset"
    return "ENDS AS IF WHOLE" if got.endswith(LAST_CHUNK) else "cut"


def after_leaving(port: int, path: str) -> str:
    """What the server saw of a client that left a slow, non-streaming request after 0.1 s."""
    with connect(port) as client:
        client.sendall(request_bytes(path))
        time.sleep(0.1)
    time.sleep(1.0)
    with connect(port) as client:
        client.sendall(b"GET /seen HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        return read_until(client, b"\0")[0].rpartition(b"\r\n\r\n")[2].decode()


def behaviour(port: int) -> dict[str, str]:
    return {
        "headers + first event": first_bytes(port),
        "[DONE] + last chunk in one send, segments": last_bytes(port, "/done-one"),
        "[DONE] and last chunk in two sends, segments": last_bytes(port, "/done-two"),
        "body cut by raising": cut(port, "/cut-raising"),
        "body cut by returning early": cut(port, "/cut-returning"),
        "client leaves, handler watches": after_leaving(port, "/watching"),
        "client leaves, handler does not": after_leaving(port, "/unwatching"),
    }


# ---- the run ----


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def wait_until_answering(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            connect(port).close()
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"server did not start: {process.args}")


@contextlib.contextmanager
def server(name: str) -> Iterator[tuple[int, int]]:
    """The candidate in a process group of its own: port and group."""
    port = free_port()
    command = [sys.executable, __file__, "--serve", name, str(port)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True)
    try:
        wait_until_answering(process, port)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(group: int) -> float:
    """User and system time of every process in the group."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(port: int, group: int, path: str, clients: int, seconds: float) -> dict[str, float]:
    whole = whole_answer(port, path)
    size = len(whole) if path == "/plain" else 0
    if b" 200 " not in whole[:20] or (path == "/stream" and whole.count(EVENT) != NUM_EVENTS):
        raise RuntimeError(f"wrong answer at {path}: {whole[:300]!r}")
    before = cpu_seconds(group)
    command = [sys.executable, __file__, "--load", str(port), path, str(size), str(clients), str(seconds)]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=seconds + 30).stdout)
    # The load also runs 0.1 s of warm-up, whose CPU time is in the difference.
    figures["cpu_us"] = (cpu_seconds(group) - before) * 1e6 / (figures["rate"] * (seconds + 0.1))
    return figures


def measure_all(port: int, group: int, seconds: float) -> dict[str, float]:
    one = measure(port, group, "/plain", 1, seconds)
    many = measure(port, group, "/plain", 16, seconds)
    streams = measure(port, group, "/stream", 16, seconds)
    return {
        "p50 ms, 1 client": one["p50_ms"],
        "requests/s, 16": many["rate"],
        "CPU us/request": many["cpu_us"],
        "events/s, 16": streams["rate"] * NUM_EVENTS,
        "CPU us/event": streams["cpu_us"] / NUM_EVENTS,
    }


def run(names: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    edges = {}
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(server(name)) for name in names}
        for name in names:  # a warm-up
            measure_all(*running[name], min(seconds, 0.2))
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                samples[name].append(measure_all(*running[name], seconds))
            print(f"round {number + 1}/{rounds}", file=sys.stderr)
        for name, (port, _) in running.items():
            edges[name] = behaviour(port)
    return {"samples": samples, "behaviour": edges}


def medians(samples: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Per candidate and figure: the median, and that of its ratio to the first candidate in a round."""
    base = next(iter(samples.values()))
    return {
        name: {
            key: (
                statistics.median(each[key] for each in rounds),
                statistics.median(each[key] / first[key] for each, first in zip(rounds, base, strict=True)),
            )
            for key in rounds[0]
        }
        for name, rounds in samples.items()
    }


def show(result: dict[str, Any]) -> None:
    table = result["medians"]
    width = max(map(len, table)) + 2
    print(" " * width + "".join(f"{key:>24}" for key in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{name:<{width}}" + "".join(f"{value:>15,.2f} ({ratio:4.2f}x)" for value, ratio in row.values()))
    print("\nratios: to the first row, within a round\n")
    for question in next(iter(result["behaviour"].values())):
        print(question)
        for name, answers in result["behaviour"].items():
            print(f"    {name:<{width}}{answers[question]}")


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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "asgi.json")
    options = parser.parse_args()
    names = installed(options.only or list(CANDIDATES))
    if not names:
        parser.error("no candidate is installed")
    result = run(names, options.rounds, options.seconds)
    result["medians"] = medians(result["samples"])
    result["machine"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%F"),
    }
    show(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", name, port]:
            logging.disable(logging.CRITICAL)
            CANDIDATES[name].serve(CANDIDATES[name].app, int(port))
        case ["--load", *arguments]:
            run_load(arguments)
        case _:
            main()
