"""A connection without a network, to the protocol of our server: what comes, byte by byte, and what is answered."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from octoai.server.errors import Refusal
from octoai.server.http.incoming import Incoming

PATH = "/v1/chat/completions"
LINE = f"POST {PATH} HTTP/1.1\r\n".encode()


class Recording:
    """In the place of an edge: says what came, and answers it with that."""

    def __init__(self) -> None:
        self.posts = {PATH: None}
        self.posts_by_url = {PATH.encode(): PATH}
        self.seen: list[tuple[dict[bytes, bytes], bytes]] = []

    async def answer(self, incoming: Incoming) -> None:
        body = await incoming.body(10_000, 5)
        headers = {name: value for name, value in incoming.head.headers.items() if name != b"content-length"}
        self.seen.append((headers, body))
        incoming.request_id = "x"
        incoming.begin(200, [(b"content-length", b"%d" % len(body))])
        incoming.end(body)

    def refuse_unread(self, refusal: Refusal, _request_id: str) -> bytes:
        return json.dumps(refusal.body()).encode()


class Pipe(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def write_eof(self) -> None:
        self.is_closed = True  # as far as who reads it can tell

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def request(name: str, body: bytes, how: str) -> bytes:
    lines = LINE + f"host: x\r\nAuthorization: Bearer {name}\r\n".encode()
    if how == "chunked":
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return lines + b"transfer-encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
    if how == "close":
        return lines + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    if how == "zeros":
        return lines + b"content-length: %06d\r\n\r\n" % len(body) + body
    if how == "last":
        return lines + b"x-after: 1\r\nContent-Length:%d\r\nx-last: content-length: 7\r\n\r\n" % len(body) + body
    if how == "blank":
        return b"\r\n" + lines + b"content-length: %d\r\n\r\n" % len(body) + body
    return lines + b"content-length: %d\r\n\r\n" % len(body) + body
