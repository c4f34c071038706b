"""uvicorn's HTTP protocol with three changes: bounded request heads, one write for an answer's head and first event,
and a client that leaves is told of by a call.

uvicorn writes each by itself, and uvloop sends at once: two packets where one does, and a client that reads twice for
its first token. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octoai.server import presence
from octoai.server.errors import HeadTooLarge, MalformedRequest, Refusal, new_request_id

MAX_HEAD_BYTES = 64 * 1024
_HEAD = b"HTTP/1.1 "


class HeldHead:
    """A transport that keeps a response's head until something follows it, at most until the loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self.flush)  # a head whose body takes its time leaves all the same
            return
        self._transport.write(data)

    def flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedProtocol(HttpToolsProtocol):
    """Heads of answers held until their body, and heads of requests bounded: the parser itself has no limit."""

    _head_bytes = 0
    _reads_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._presence = presence.Presence(
            is_behind=lambda: bool(self.flow.write_paused), has_body=lambda: not self.cycle.more_body
        )
        super().connection_made(HeldHead(transport, self.loop))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._presence.leave()

    def data_received(self, data: bytes) -> None:
        if self._reads_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._reads_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(MAX_HEAD_BYTES))

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest("This is not a request in HTTP/1.1."))

    def _refuse(self, refusal: Refusal) -> None:
        """Before there is a request, nobody else can: the same body and the same headers as any refusal."""
        body = orjson.dumps(refusal.body())
        head = (
            f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {new_request_id()}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._reads_head, self._head_bytes = False, 0
        self.scope["state"][presence.KEY] = self._presence
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reads_head = True
        super().on_message_complete()
