"""A TCP proxy that loses answers: for tests of what a retry costs."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit


class LossyProxy:
    """Passes connections on to a service. Of the first `num_lost`, it passes only the request, and once the service
    has it (or, with `at_answer`, has begun to answer) it cuts the client off.

    `hangs_up`: whether it ends its connection to the service then as well, or leaves it open.
    """

    def __init__(self, url: str, num_lost: int, *, hangs_up: bool, at_answer: bool) -> None:
        place = urlsplit(url)
        self._service = (place.hostname, place.port)
        self._num_left = num_lost
        self._hangs_up, self._at_answer = hangs_up, at_answer
        self._kept: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for each in self._kept:
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.num_connections += 1
                is_lost = self._num_left > 0
                self._num_left -= 1
                threading.Thread(target=self._carry, args=(client, is_lost), daemon=True).start()

    def _carry(self, client: socket.socket, is_lost: bool) -> None:
        service = socket.create_connection(self._service)
        with suppress(OSError):
            service.sendall(_request(client))
            if is_lost:
                self._lose(client, service)
                return
            threading.Thread(target=_pump, args=(client, service), daemon=True).start()
            _pump(service, client)

    def _lose(self, client: socket.socket, service: socket.socket) -> None:
        if self._at_answer:
            service.recv(1)
        client.close()
        if self._hangs_up:
            service.close()
        else:
            self._kept.append(service)


def _request(client: socket.socket) -> bytes:
    """The whole of one request."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _block(client)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += _block(client)
    return head + b"\r\n\r\n" + body


def _block(client: socket.socket) -> bytes:
    block = client.recv(65536)
    if not block:
        raise ConnectionError
    return block


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(65536):
            target.sendall(block)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
