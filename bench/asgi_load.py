"""The load on a candidate of `asgi.py`, from a process of its own, and how the candidate behaves at the edges of a
stream. Raw sockets and asyncio protocols that count bytes."""

import asyncio
import collections
import contextlib
import json
import socket
import statistics
import struct
import time
from typing import Any

from asgi_servers import ASK, EVENT, HOST, LAST_CHUNK

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
