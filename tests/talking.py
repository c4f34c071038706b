"""Plain HTTP against a service in this process: what it says, without an SDK in between."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from octoai.server.engines.scripted import ScriptedEngine, Step
from tests.running import InProcess

MESSAGES = [{"role": "user", "content": "Hi there"}]
LONG: Sequence[Step] = tuple(step for _ in range(4000) for step in ("word ", 0.005))
"""A script of an answer that takes 20 seconds."""


class Talk:
    """One connection, read and written byte by byte."""

    def __init__(self, service: InProcess) -> None:
        self.socket = socket.create_connection(("127.0.0.1", service.port), timeout=5)
        self.authorization = f"authorization: Bearer {service.token}\r\n"
        self.received = b""

    def send(self, path: str, body: Any = None, *, head: str = "", method: str = "POST", auth: bool = True) -> None:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        length = "" if "content-length" in head or "transfer-encoding" in head else f"content-length: {len(raw)}\r\n"
        lines = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{self.authorization if auth else ''}{head}{length}\r\n"
        self.socket.sendall(lines.encode("latin-1") + raw)

    def until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            block = self.socket.recv(65536)
            assert block, self.received[-500:]
            self.received += block
        before, _, self.received = self.received.partition(mark)
        return before + mark

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One answer with a length; the connection stays usable."""
        head = self.until(b"\r\n\r\n").decode("latin-1")
        headers = dict(line.lower().split(": ", 1) for line in head.strip().split("\r\n")[1:])
        length = int(headers.get("content-length", 0))
        while len(self.received) < length:
            self.received += self.socket.recv(65536)
        body, self.received = self.received[:length], self.received[length:]
        return int(head.split()[1]), headers, body

    def rest(self) -> bytes:
        """All until the service ends the connection."""
        while True:
            try:
                block = self.socket.recv(65536)
            except ConnectionResetError:
                block = b""
            if not block:
                return self.received
            self.received += block

    def close(self) -> None:
        self.socket.close()


def ask(
    service: InProcess, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    try:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        all_headers = {"authorization": f"Bearer {service.token}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method or ("GET" if body is None else "POST"), path, raw, all_headers)
        response = connection.getresponse()
        text = response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, text
    finally:
        connection.close()


def chat(service: InProcess, **params: Any) -> tuple[int, dict[str, str], Any]:
    status, headers, text = ask(service, "/v1/chat/completions", request(service, **params))
    return status, headers, json.loads(text) if headers["content-type"] == "application/json" else text


def request(service: InProcess, **params: Any) -> dict[str, Any]:
    return {"model": service.model, "messages": MESSAGES, **params}


def events(text: bytes) -> list[Any]:
    *chunks, last, rest = text.split(b"\n\n")
    assert (last, rest) == (b"data: [DONE]", b"")
    return [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]


def until(fact: Callable[[], bool], seconds: float = 1.0) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def is_idle(service: InProcess) -> bool:
    engine = service.engine
    assert isinstance(engine, ScriptedEngine)
    queue = service.queue
    return (engine.running, queue.num_running, queue.num_waiting, len(service.service.jobs)) == (0, 0, 0, 0)


def metric(service: InProcess, name: str) -> float:
    _, _, text = ask(service, "/metrics")
    rows = [line for line in text.decode().splitlines() if re.match(rf"{re.escape(name)}[{{ ]", line)]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows)


def asked(
    service: InProcess, line: str = "POST /v1/chat/completions HTTP/1.1", head: str = "", **params: object
) -> bytes:
    body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": "hi"}], **params})
    lines = f"{line}\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n{head}content-length: {len(body)}\r\n\r\n"
    return f"{lines}{body}".encode()


def statuses(connection: socket.socket, num: int) -> list[bytes]:
    """Of so many answers, each with a length."""
    found, received = [], b""
    for _ in range(num):
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        head, _, received = received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(received) < length:
            received += connection.recv(65536)
        received = received[length:]
        found.append(head.split()[1])
    return found
