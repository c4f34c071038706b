"""uvicorn's HTTP protocol, with bounded request heads, and a shorter way for the requests that come most often.

What is posted to one of the edge's paths becomes an `Incoming`, and a task of the edge's; all other requests go through
ASGI, as uvicorn does it. The order of both on one connection is uvicorn's. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Container, Mapping
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octoai.server.errors import HeadTooLarge, MalformedRequest, Refusal
from octoai.server.http import heads
from octoai.server.http.ending import Ending, Flow
from octoai.server.http.heads import Head, KnownHead
from octoai.server.http.incoming import Bodies, Incoming
from octoai.server.ids import new_request_id
from octoai.server.machine.awake import Awake

MAX_HEAD_BYTES = 64 * 1024
MAX_AHEAD = 16  # behind that many requests what came stays bytes: as a request, 20 of them may take 2 KB


class Edge(Protocol):
    """What answers here: the API's edge, of which nothing else is known."""

    @property
    def posts(self) -> Container[str]: ...

    @property
    def posts_by_url(self) -> Mapping[bytes, str]: ...

    async def answer(self, incoming: Incoming) -> None: ...

    def refuse_unread(self, refusal: Refusal, request_id: str) -> bytes: ...


class ServiceProtocol(Ending, HttpToolsProtocol):
    """`edge`, `awake` and `bodies` are the server's (see `protocol_for`)."""

    edge: Edge
    awake: Awake
    flow: Any  # `Ending` says of which kind: uvicorn's own knows of no holding
    cycle: Any  # the newest request: an `Incoming`, or what uvicorn has for one
    pipeline: deque[Any]  # of those behind the one that is answered, the newest first

    _fixed: tuple[Any, bytes] = (None, b"")  # header lines, and of which headers; for all connections
    _head_bytes = 0  # of a head, or of what stands between the chunks of a body and behind them
    _reads_head = True
    _known: KnownHead | None = None
    _num_missing = 0  # bytes of a body that the parser does not see: its head was known, or offers an upgrade
    _is_behind = False  # between two answers its client does not read
    _rests_since: float | None = None  # where a request is waited for, the rest of its head, or that of a refused body
    _resting: asyncio.TimerHandle | None = None

    # ---- what the loop calls ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.flow = Flow(transport)
        self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tell_that_nobody_hears()
        self._answering = self.cycle = None  # they know us as well: all would be left to the garbage collector
        self.pipeline.clear()
        for timer in (self._resting, self._lingering, self._leaving):
            if timer is not None:
                timer.cancel()
        self._resting = self._lingering = self._leaving = None
        super().connection_lost(exc)

    def eof_received(self) -> None:
        self._linger()  # the transport closes itself

    def data_received(self, data: bytes) -> None:
        if self._held:
            data, self._held, self.flow.is_holding = self._held + data, b"", False
        while data:
            if self._is_deaf:
                self._is_between = False  # its client is not done with sending
                return
            if len(self.pipeline) >= MAX_AHEAD:
                self._held, self.flow.is_holding = data, True
                self.flow.pause_reading()
                return
            if self._num_missing:
                data = self._rest_of_body(data)
            if self._is_between and self._known is not None:
                data = self._as_before(self._known, data)
            if data and len(self.pipeline) < MAX_AHEAD:
                data = self._parse(data)

    def _parse(self, data: bytes) -> bytes:
        """Returns what is left: of more than a few requests, or behind a head that asks for another protocol."""
        is_whole_head, before = self._is_between, self.cycle
        part = heads.few(data)
        rest = data[len(part) :]
        self._head_bytes += len(part)
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserError:
            self.send_400_response("")
            return b""
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(MAX_HEAD_BYTES))
        elif is_whole_head and self.cycle is not before and isinstance(self.cycle, Incoming):
            self._known = heads.known(self.cycle.head, len(self.headers), part)
        return rest

    def _as_before(self, known: KnownHead, data: bytes) -> bytes:
        """Begin requests whose heads are as one was before; returns what is left."""
        while len(self.pipeline) < MAX_AHEAD and data and (read := known.read(data)) is not None:
            self._rests_since = None
            length, start = read
            incoming = Incoming(self, known.head, length)
            if len(data) < start + length:
                self._num_missing = length
                self._begin(incoming)
                return self._rest_of_body(data[start:])
            incoming.came_at_once(data[start : start + length])
            self._begin(incoming)
            data = data[start + length :]
        return data

    def _rest_of_body(self, data: bytes) -> bytes:
        """Take what is of the body; returns what is left."""
        body, rest = data[: self._num_missing], data[self._num_missing :]
        self._num_missing -= len(body)
        if body:
            self.on_body(body)
        if not self._num_missing:
            self.on_message_complete()
        return rest

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest("This is not a request in HTTP/1.1."))

    def _refuse(self, refusal: Refusal) -> None:
        """What cannot be read is answered behind what came before it. In the middle of an answer, or behind the one to
        the same request, that would be read as something else."""
        if self._is_deaf:
            return
        self._is_deaf, self._is_between = True, False  # nobody knows how much more of it there is
        is_body = not self._reads_head
        if is_body and self.cycle.response_started:
            self.close()
        elif is_body and self.cycle is self._answering:
            self._answer_unread(refusal)
        else:
            if is_body:
                self.pipeline.popleft()
            if self.pipeline or not (self._answering is None or self._answering.response_complete):
                self.pipeline.appendleft((refusal, None))
            else:
                self._answer_unread(refusal)

    def _answer_unread(self, refusal: Refusal) -> None:
        """Where there is no request, nobody else can: the same body and the same headers as any refusal."""
        request_id = new_request_id()
        body = self.edge.refuse_unread(refusal, request_id)
        status = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(status.encode() + self.fixed_head() + head.encode() + body)
        self.close()

    def shutdown(self) -> None:
        if self._is_leaving:
            self._has_left()
        else:
            super().shutdown()

    # ---- what the parser calls ----

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._is_between = False
        self._rests_since = self.loop.time()  # so long may its head take, however often more of it comes

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._reads_head:
            return  # behind the last chunk: nobody asks for those
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._rests_since = None
        if self.parser.should_upgrade():  # to the parser such a message ends with its head
            self._num_missing = heads.length_of_offer(self.parser.get_method(), self.headers)
        path = self._posted_to()
        if path is None:
            self._go_through_asgi()
        else:
            self._go_directly(path)
        self._reads_head, self._head_bytes = False, 0

    def _go_directly(self, path: str) -> None:
        is_1_1 = self.parser.get_http_version() == "1.1"
        keep_alive = is_1_1 and self.parser.should_keep_alive()
        head = Head(path, dict(reversed(self.headers)), keep_alive, is_1_1 and self.expect_100_continue, is_1_1)
        length = (head.header(b"content-length") or "").lstrip("0")  # as many as there are: int() takes 4300 digits
        self._begin(Incoming(self, head, int(length) if length.isdigit() else None))

    def _begin(self, incoming: Incoming) -> None:
        before, self.cycle = self.cycle, incoming
        if before is None or before.response_complete:
            self._start_asgi_task(incoming, None)
        else:  # sent before the answer to an earlier one
            if self.pipeline:
                self.flow.pause_reading()
            self.pipeline.appendleft((incoming, None))

    def _read_on(self) -> None:
        """One request may wait behind another: who does not read does not notice that a client leaves."""
        if len(self.pipeline) < 2:
            self.flow.resume_reading()

    def _posted_to(self) -> str | None:
        """The edge's path that this is posted to, if it is one."""
        if self.parser.get_method() != b"POST":
            return None
        path = self.edge.posts_by_url.get(self.url)
        if path is None and (b"%" in self.url or b"?" in self.url or not self.url.startswith(b"/")):
            path = unquote((httptools.parse_url(self.url).path or b"/").decode("ascii"))
        return path if path in self.edge.posts else None

    def _go_through_asgi(self) -> None:
        url, headers, expects_continue = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.headers += headers
        self.url, self.expect_100_continue = url, expects_continue
        super().on_headers_complete()
        self.cycle.transport = _Transport(self)
        if expects_continue:  # answered before the body is asked for, the next request could be read as this one's body
            self.cycle.keep_alive = False
        self._read_on()

    def on_body(self, body: bytes) -> None:
        incoming, self._head_bytes = self.cycle, 0
        if not isinstance(incoming, Incoming):
            super().on_body(body)
        elif not incoming.response_complete:
            incoming.came(body)
            if incoming.num_waiting_bytes > HIGH_WATER_LIMIT:
                self.flow.pause_reading()

    def on_message_complete(self) -> None:
        if self._num_missing:  # says the parser, at the end of a head
            return
        self._reads_head, self._is_between, self._head_bytes = True, True, 0
        incoming = self.cycle
        if not incoming.keep_alive:  # it was the last
            self._is_deaf = True
        if incoming.response_complete:  # the rest of what was refused
            self._rests_since = self.loop.time()
        if not isinstance(incoming, Incoming):
            super().on_message_complete()
        elif not incoming.response_complete:
            incoming.came_whole()
        if self.flow.read_paused:  # much of the body came before it was asked for
            self._read_on()

    # ---- what uvicorn calls, and requests ----

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Incoming):
            self._answering = cycle
            self.awake.begins(cycle.began, is_alone=not self.tasks)
            cycle.task = self.loop.create_task(self._answer(cycle))
            self.tasks.add(cycle.task)
        elif isinstance(cycle, Refusal):
            self._answer_unread(cycle)
        else:
            self._answering = cycle
            super()._start_asgi_task(cycle, app)

    async def _answer(self, incoming: Incoming) -> None:
        try:
            await self.edge.answer(incoming)
        finally:
            incoming.cut()
            self.tasks.discard(incoming.task)
            if self._answering is incoming:  # each knows the other: who has gone would be left to the garbage collector
                self._answering = None

    def fixed_head(self) -> bytes:
        headers = self.server_state.default_headers  # another list when the date is another
        if self._fixed[0] is not headers:
            ServiceProtocol._fixed = headers, b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._fixed[1]

    def answered(self) -> None:
        self.on_response_complete()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing() or self._is_leaving:
            self._linger()
            return
        self._rest()
        if self.flow.write_paused:  # who does not read its answers is given no more of them
            self._is_behind = True
            self.flow.pause_reading()
        elif self.pipeline:
            self._go_on()
        else:
            self.flow.resume_reading()

    def _go_on(self) -> None:
        if self.pipeline:
            self._rests_since = None
            self._start_asgi_task(*self.pipeline.pop())
        if self._held:
            self.data_received(b"")
        self._read_on()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._is_behind and not (self.transport.is_closing() or self._is_leaving):
            self._is_behind = False
            self._go_on()

    def _rest(self) -> None:
        """One timer for all the rests of a connection: to set one for each would be a tenth of what uvicorn does."""
        self._rests_since = self.loop.time()
        if self._resting is None:
            self._resting = self.loop.call_later(self.timeout_keep_alive, self._close_if_resting)

    def _close_if_resting(self) -> None:
        self._resting = None
        is_whole = self.cycle is None or self.cycle.response_complete
        is_answering = not is_whole and not self._is_behind  # and rests when that is done
        if self._rests_since is None or is_answering or self.transport.is_closing() or self._is_leaving:
            return
        left = self._rests_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self.close()
        else:
            self._resting = self.loop.call_later(left, self._close_if_resting)


class _Transport:
    """A connection's, for uvicorn's requests: they write, and close it where it is not to be kept."""

    def __init__(self, protocol: ServiceProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._protocol.transport.write(data)

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol._is_leaving or self._protocol.transport.is_closing()


def protocol_for(edge: Edge) -> type[ServiceProtocol]:
    """uvicorn makes one for each connection, and does not say of whose."""
    return type("ServiceProtocol", (ServiceProtocol,), {"edge": edge, "awake": Awake(), "bodies": Bodies()})
