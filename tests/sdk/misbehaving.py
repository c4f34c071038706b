"""A raw HTTP server on the loopback that does exactly what a test tells it, wrong things above all.

A test gives it a script: a function called with an `Exchange` for each request. Speaks bytes; knows no SDK.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Script = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request that arrived, and the ways to answer it."""

    socket: socket.socket
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    number: int
    keep_open: bool = field(default=True)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self, status: int = 200, body: Any = None, **headers: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json", "content-length": str(len(data))}
        named.update({name.replace("_", "-"): str(value) for name, value in headers.items()})
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in named.items()), "", ""]
        self.send("\r\n".join(lines).encode() + data)

    def begin_stream(self, **headers: Any) -> None:
        named = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
        named.update({name.replace("_", "-"): str(value) for name, value in headers.items()})
        self.send("\r\n".join(["HTTP/1.1 200 OK", *(f"{n}: {v}" for n, v in named.items()), "", ""]).encode())

    def part(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, data: Any) -> None:
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.part(b"data: " + text + b"\n\n")

    def end_stream(self, *, done: bool = True) -> None:
        if done:
            self.send(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            self.send(b"0\r\n\r\n")

    def stream(self, chunks: Iterable[Any], *, done: bool = True) -> None:
        self.begin_stream()
        for chunk in chunks:
            self.event(chunk)
        self.end_stream(done=done)

    def reset(self) -> None:
        """Drop the connection as a crashed peer does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.hang_up()

    def hang_up(self) -> None:
        self.keep_open = False
        self.socket.close()

    def seconds_until_closed(self, limit: float = 5.0) -> float | None:
        """How long until the client closes; None if it has not within the limit."""
        began = time.monotonic()
        self.socket.settimeout(limit)
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return None
        except OSError:
            pass
        self.keep_open = False
        return time.monotonic() - began


class Server:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Exchange] = []
        self.connections = 0
        self.errors: list[BaseException] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._accepting.join(2)
        for thread in self._threads:
            thread.join(2)
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection, self.connections), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            while (exchange := self._receive(connection, number)) is not None:
                self.requests.append(exchange)
                exchange.number = len(self.requests)
                self.script(exchange)
                if not exchange.keep_open:
                    break
        except OSError:
            pass  # the client went away: the test says whether it should have
        except BaseException as error:  # noqa: BLE001  # shown by the fixture
            self.errors.append(error)
        finally:
            connection.close()

    @staticmethod
    def _receive(connection: socket.socket, number: int) -> Exchange | None:
        data = b""
        while b"\r\n\r\n" not in data:
            block = connection.recv(65536)
            if not block:
                return None
            data += block
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        return Exchange(connection, method, target, headers, body, number, 0)


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    server = Server(script)
    try:
        yield server
    finally:
        server.close()
        if server.errors:
            raise server.errors[0]


def chunk(text: str | None = None, *, finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    """A chat completion chunk with one choice."""
    delta: dict[str, Any] = {} if text is None else {"content": text}
    choice = {"index": index, "delta": {**delta, **more.pop("delta", {})}, "finish_reason": finish}
    base = {"id": "cmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return {**base, **more}


def answer(text: str = "hello", **more: Any) -> dict[str, Any]:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    base = {"id": "cmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return {**base, "usage": usage, **more}


def words(count: int = 3) -> list[dict[str, Any]]:
    """A whole stream: `count` chunks of text, the last with the finish reason."""
    return [chunk(f"w{number} ", finish="stop" if number == count - 1 else None) for number in range(count)]


def in_one_write(events: list[Any]) -> Script:
    """A stream whose events come all at once, and no other end than theirs."""

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.part(b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events))
        x.end_stream(done=False)

    return script
