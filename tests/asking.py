"""Plain HTTP against a service in a process of its own: what it says, without an SDK in between."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

from tests.running import Serve

CHAT = {
    "model": "meta-llama-3-8b-instruct",
    "messages": [{"role": "user", "content": "Write a blog about Seattle"}],
    "max_tokens": 12,
    "temperature": 0,
}


class Client:
    """Asks with the token that the service printed."""

    def __init__(self, service: Serve) -> None:
        place = urlsplit(service.url)
        self.address = (place.hostname, place.port)
        self.headers = {"authorization": f"Bearer {service.token}", "content-type": "application/json"}

    def send(
        self, path: str, body: Any = None, method: str | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        payload = None if body is None else json.dumps(body)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, payload, self.headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def ask(self, path: str, body: Any = None) -> Any:
        status, _, text = self.send(path, body)
        assert status == 200, text
        return json.loads(text)

    def chat(self, **params: Any) -> Any:
        return self.ask("/v1/chat/completions", {**CHAT, **params})

    def stream(self, path: str = "/v1/chat/completions", **params: Any) -> list[Any]:
        status, _, text = self.send(path, {**(CHAT if "prompt" not in params else {}), **params, "stream": True})
        assert status == 200, text
        events = [line.removeprefix(b"data: ") for line in text.split(b"\n\n") if line]
        assert events[-1] == b"[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def refused(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
        status, headers, text = self.send(path, body)
        answer = json.loads(text)
        assert headers["x-request-id"]
        assert {"object", "message", "type", "param", "code", "error"} <= answer.keys()
        assert answer["error"]["message"] == answer["message"]
        return status, answer


class Raw:
    """A request over a bare socket: every byte of the answer, and how it ended."""

    def __init__(self, client: Client, body: dict[str, Any]) -> None:
        self.socket = socket.create_connection(client.address)
        self.received = b""
        text = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: {client.headers['authorization']}\r\n"
        self.socket.sendall(f"{head}connection: close\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)

    def read_until(self, words: bytes, seconds: float = 20) -> None:
        self.socket.settimeout(seconds)
        while words not in self.received:
            block = self.socket.recv(65536)
            assert block, self.received[-500:]
            self.received += block

    def read_to_the_end(self, seconds: float = 20) -> bytes:
        self.socket.settimeout(seconds)
        while block := self.socket.recv(65536):
            self.received += block
        self.socket.close()
        return self.received


def is_ready(client: Client) -> bool:
    return client.send("/health/ready")[0] == 200
