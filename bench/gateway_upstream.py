"""The mock engine behind every gateway that `gateway.py` measures: vLLM's answers as fixed bytes, a process of its own.

    python bench/gateway_upstream.py SOCKET    prints its port and serves there and on the unix socket,
                                               until its standard input ends

A client that leaves, or ends its half of the connection, ends its stream at once, as it does vLLM's.
"""

import asyncio
import sys
from typing import Any

import httptools
import uvloop

from gateway_wire import MODEL, Reply, reply, whole

_MODELS = b'{"object":"list","data":[{"id":"%b","object":"model","owned_by":"vllm","root":"%b","max_model_len":8192}]}'
_INFO = b'{"model_path":"%b","tokenizer_path":"%b","is_generation":true}'
_NAMES = (MODEL.encode(), MODEL.encode())
# What routers ask of a worker before they send it anything.
_ASKED = {
    b"/health": whole(b"{}"),
    b"/ping": whole(b"{}"),
    b"/version": whole(b'{"version":"0.32.0"}'),
    b"/v1/models": whole(_MODELS % _NAMES),
    b"/get_model_info": whole(_INFO % _NAMES),
    b"/model_info": whole(_INFO % _NAMES),
}
_UNKNOWN = whole(b'{"detail":"Not Found"}', b"404 Not Found")


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.timer: asyncio.TimerHandle | None = None
        self.path, self.parts = b"", list[bytes]()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    # ---- what the parser calls ----

    def on_url(self, url: bytes) -> None:
        self.path, self.parts = url, []

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        if self.path == b"/v1/chat/completions":
            self.answer(reply(b"".join(self.parts)))
        else:
            self.transport.write(_ASKED.get(self.path.partition(b"?")[0], _UNKNOWN))

    # ---- the answer ----

    def answer(self, said: Reply) -> None:
        self.transport.write(said.writes[0])
        if len(said.writes) > 1:
            self.loop = asyncio.get_running_loop()
            self.began, self.said, self.sent = self.loop.time(), said, 1
            self.rest()

    def rest(self) -> None:
        self.timer = self.loop.call_at(self.began + self.sent * self.said.seconds, self.next)

    def next(self) -> None:
        """All that is due: a write that comes late does not put off those after it."""
        due = int((self.loop.time() - self.began) / self.said.seconds) + 1
        until = min(max(due, self.sent + 1), len(self.said.writes))
        self.transport.write(b"".join(self.said.writes[self.sent : until]))
        self.sent = until
        if until < len(self.said.writes):
            self.rest()


async def serve(path: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=2048)
    await loop.create_unix_server(Connection, path, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
