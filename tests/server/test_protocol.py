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


def test_a_request_head_without_an_end_is_cut_off(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-long: ")
        received = b""
        try:
            for _ in range(200):
                connection.sendall(b"a" * 10_000)
        except OSError:
            pass  # it hung up while we were still sending: that is the point
        else:
            received = connection.recv(1000)
    assert received == b"" or received.startswith(b"HTTP/1.1 431 ")


def test_a_large_body_does_not_count_as_a_head(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    text = "word " * 7000
    for _ in range(2):
        body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": text}], "x": "y" * 300_000})
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_too_large_is_answered_even_when_the_client_sends_all_of_it_first(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
        connection.sendall(f"{head}content-length: 12000000\r\n\r\n".encode())
        connection.sendall(b"x" * 12_000_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_what_is_no_http_is_refused_in_the_one_shape_with_an_id(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GARBAGE / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(nonsense)
            answer = b""
            while block := connection.recv(65536):
                answer += block
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"x-request-id: req_" in head
        said = json.loads(body)
        assert said["code"] == said["error"]["code"] == "invalid_http"
