"""The loopback server that `sdk.py` measures clients against: fixed bytes, raw asyncio, a process of its own.

    python bench/sdk_server.py        prints its port and serves until its standard input ends

A path that begins with `/paced` gets an event per write and a millisecond between them, as tokens come; any other gets
the whole stream in one write. Either way each event is an HTTP chunk of its own.
"""

import asyncio
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import sdk_wire

_SHAPES: dict[bytes, tuple[Callable[[], bytes], Callable[[int], list[bytes]], bytes]] = {
    b"/chat/completions": (sdk_wire.openai_answer, sdk_wire.openai_events, b"text/event-stream"),
    b"/v1/messages": (sdk_wire.anthropic_answer, sdk_wire.anthropic_events, b"text/event-stream"),
    b"/api/chat": (sdk_wire.ollama_answer, sdk_wire.ollama_events, b"application/x-ndjson"),
}
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")
_CHUNKS = re.compile(rb"chunks-(\d+)")
_STREAMS = re.compile(rb'"stream": ?true')
PACE_SECONDS = 0.001  # longer than any client here takes for an event
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def _shape(path: bytes) -> bytes | None:
    return next((suffix for suffix in _SHAPES if path.endswith(suffix)), None)


@functools.cache
def plain(suffix: bytes) -> bytes:
    body = _SHAPES[suffix][0]()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Request-Id: bench\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


@functools.cache
def stream(suffix: bytes, num_chunks: int) -> tuple[bytes, ...]:
    """What each write holds; the head is in the first and the end of the body in the last."""
    _, events, kind = _SHAPES[suffix]
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events(num_chunks)]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nX-Request-Id: bench\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    return (head + chunks[0], *chunks[1:-1], chunks[-1] + b"0\r\n\r\n")


@functools.cache
def whole_stream(suffix: bytes, num_chunks: int) -> bytes:
    return b"".join(stream(suffix, num_chunks))


class Connection(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if found and len(body) >= (int(length[1]) if length else 0):
            self.buffer = b""
            self.answer(head.split(b" ", 2)[1], body)

    def answer(self, path: bytes, body: bytes) -> None:
        suffix = _shape(path)
        if suffix is None:
            self.transport.write(_NOT_FOUND)
        elif not _STREAMS.search(body):
            self.transport.write(plain(suffix))
        else:
            asked = _CHUNKS.search(body)
            num_chunks = int(asked[1]) if asked else 100
            if path.startswith(b"/paced"):
                self.task = asyncio.ensure_future(self.paced(stream(suffix, num_chunks)))
            else:
                self.transport.write(whole_stream(suffix, num_chunks))

    async def paced(self, writes: tuple[bytes, ...]) -> None:
        for data in writes:
            self.transport.write(data)
            await asyncio.sleep(PACE_SECONDS)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
