"""How answers leave: in how few writes, seen from a bare socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

from octoai.server.engines.scripted import ScriptedEngine
from tests.running import InProcess

Start = Callable[..., InProcess]


def first_and_last_read(service: InProcess) -> tuple[bytes, bytes]:
    body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": "hi"}], "stream": True})
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        reads = [connection.recv(1 << 20)]
        while not reads[-1].endswith(b"0\r\n\r\n"):
            reads.append(connection.recv(1 << 20))
    return reads[0], reads[-1]


def test_headers_and_first_event_leave_together(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 0.05, " world", 0.05]))
    for _ in range(5):
        first, _ = first_and_last_read(service)
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b'"role":"assistant"' in first
        assert b'"content":"Hello"' in first


def test_done_and_the_end_of_the_body_leave_together(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 0.05, " world", 0.05]))
    for _ in range(5):
        _, last = first_and_last_read(service)
        assert last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b'"finish_reason":"stop"' in last
