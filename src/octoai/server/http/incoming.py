"""A request to generate text, as its connection has it, and the answer that goes out there.

Such requests come more often than all others together, and do not go through ASGI: a client that leaves is told of by
a call, what has to wait for nothing is no coroutine, and an answer's head leaves with what follows it, in one packet.
Knows HTTP/1.1 and nothing of what is said in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus

from uvicorn.protocols.http.flow_control import FlowControl

from octoai.server.accounts import Caller
from octoai.server.errors import TooLarge, TooSlow, Unavailable
from octoai.server.http.heads import Head

VERSION_HEADER = (b"openai-version", b"2020-10-01")
_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

MAX_BODIES_BYTES = 2**28
UNCOUNTED_BYTES = 64 * 1024  # what a connection may have before its request is asked for it

Headers = Sequence[tuple[bytes, bytes]]


class ClientLeft(Exception):
    """There is nobody to answer any more."""


class Bodies:
    """The room for large bodies on their way, and whose they are. An account that is alone with it leaves an eighth of
    it to who may come; one among others has no more of it than it leaves to them."""

    def __init__(self, max_bytes: int = MAX_BODIES_BYTES) -> None:
        self.num_left = max_bytes
        self._num_kept = max_bytes // 8
        self._held: dict[str, int] = {}

    def hold(self, account: str, num_bytes: int) -> None:
        """Raises Unavailable, with no more held than before."""
        held = self._held.get(account, 0) + num_bytes
        is_alone = self._held.keys() <= {account}
        if self.num_left - num_bytes < (self._num_kept if is_alone else held):
            raise Unavailable("Too many large bodies are on their way here at once.", retry_after=1, code="overloaded")
        self._held[account] = held
        self.num_left -= num_bytes

    def free(self, account: str, num_bytes: int) -> None:
        self.num_left += num_bytes
        self._held[account] -= num_bytes
        if not self._held[account]:
            del self._held[account]


class Connection:
    """What a request needs of its connection; `protocol` has it."""

    transport: asyncio.Transport
    flow: FlowControl
    bodies: Bodies  # of all connections

    def fixed_head(self) -> bytes:
        """Header lines that every answer has."""
        raise NotImplementedError

    def answered(self) -> None:
        """The answer is whole."""
        raise NotImplementedError

    def close(self) -> None:
        """Once the client has read what was sent, or has had some time to."""
        raise NotImplementedError


class Incoming:
    """`caller` and `limit_headers` are known when it has been admitted, `status` when its answer has begun.

    uvicorn's protocol asks `keep_alive`, `more_body`, `disconnected` and `response_complete` of a request under way,
    ours `response_started` as well.
    """

    task: asyncio.Task[None]  # that answers it
    request_id = ""
    is_given_id = False
    caller: Caller | None = None
    limit_headers: Headers | None = None
    has_joined = False  # the answer of another request, under its key
    status: int | None = None
    on_left: Callable[[], None] | None = None  # called once, in the loop, when the client has left
    more_body = True
    disconnected = response_complete = False
    _waiter: asyncio.Future[None] | None = None
    _begun = b""  # the answer's head, until it leaves
    _is_chunked = False

    def __init__(self, connection: Connection, head: Head, num_body_bytes: int | None = None) -> None:
        self.head = head
        self.began = time.perf_counter()
        self.keep_alive = head.keep_alive
        self._connection = connection
        self._num_body_bytes = num_body_bytes
        self._body: bytes | bytearray = b""

    # ---- what is asked ----

    async def body(self, max_bytes: int, seconds: float) -> bytes:
        """The whole body, once; never much more than the limit of it in memory. Raises TooLarge, TooSlow, Unavailable,
        ClientLeft."""
        if self._num_body_bytes is not None and self._num_body_bytes > max_bytes:
            raise TooLarge(max_bytes)
        try:
            if self.more_body:
                await self._rest_of_body(max_bytes, seconds)
            if len(self._body) > max_bytes:
                raise TooLarge(max_bytes)
            return bytes(self._body)
        finally:
            self._body = b""  # its connection keeps this request until the next one

    def check_left(self) -> None:
        """Raises ClientLeft where its client has."""
        if self.disconnected:
            raise ClientLeft

    async def _rest_of_body(self, max_bytes: int, seconds: float) -> None:
        account, num_held = "" if self.caller is None else self.caller.account.id, 0
        try:
            num_held = self._hold(account, num_held)  # where it does not fit, its client hears that before it sends it
            if self.head.expects_continue and not self.disconnected:
                self._connection.transport.write(_CONTINUE)
            async with asyncio.timeout(seconds):
                while self.more_body:
                    self.check_left()
                    if len(self._body) > max_bytes:
                        raise TooLarge(max_bytes)
                    num_held = self._hold(account, num_held)
                    self._connection.flow.resume_reading()  # it was paused where nobody asked for what came
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        except TimeoutError:
            raise TooSlow(f"The request body did not arrive within {seconds:.0f} s.") from None
        finally:
            if num_held:
                self._connection.bodies.free(account, num_held)

    def _hold(self, account: str, num_held: int) -> int:
        """Have room for all of the body, or for what has come where nobody knows how much it will be."""
        num_due = self._num_body_bytes or len(self._body)
        if num_due - num_held <= UNCOUNTED_BYTES:
            return num_held
        self._connection.bodies.hold(account, num_due - num_held)
        return num_due

    # ---- what is answered ----

    @property
    def is_behind(self) -> bool:
        """Whether what is sent now has to wait until the client has read more of what was sent before."""
        return self._connection.flow.write_paused

    async def caught_up(self) -> None:
        """Return when it has not to wait any more, or the client has left."""
        await self._connection.flow.drain()

    @property
    def response_started(self) -> bool:
        return self.status is not None

    def begin(self, status: int, headers: Headers) -> None:
        """The head: it leaves with what follows. A body whose length is not among the headers is sent in chunks,
        where the client knows them."""
        self.status = status
        if self.limit_headers:
            headers = [*headers, *self.limit_headers]
        given = b"\r\n".join([*map(b": ".join, headers), b""])
        self._is_chunked = self.head.takes_chunks and b"\r\ncontent-length: " not in b"\r\n" + given
        if given.count(b"\n") != len(headers):
            raise ValueError("a header with a line break")
        elapsed = int((time.perf_counter() - self.began) * 1000)
        ours = b"x-request-id: %b\r\nopenai-processing-ms: %d\r\n%b: %b\r\n"
        ours %= self.request_id.encode(), elapsed, *VERSION_HEADER
        lines = [_STATUS_LINES[status], self._connection.fixed_head(), given, ours]
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self._is_chunked else b"\r\n")
        self._begun = b"".join(lines)

    def send(self, block: bytes) -> None:
        """More of the body."""
        self._write(self._begun + self._framed(block))

    def end(self, block: bytes) -> None:
        """The rest of the body, or all of it."""
        self._write(self._begun + self._framed(block) + (b"0\r\n\r\n" if self._is_chunked else b""))
        self.response_complete = True
        if not self.keep_alive:
            self._connection.close()
        self._connection.answered()

    def cut(self) -> None:
        """No end where there is none yet: the connection is closed, so that its client notices."""
        if not self.response_complete:
            if self._begun and not self.disconnected:
                self._write(self._begun)
            self._connection.close()

    def give_up(self) -> None:
        """What was sent is not waited for either."""
        self._connection.transport.abort()

    def _framed(self, block: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(block), block) if self._is_chunked and block else block

    def _write(self, data: bytes) -> None:
        self._begun = b""
        if data and not self.disconnected:
            self._connection.transport.write(data)

    # ---- what the connection tells ----

    def came(self, block: bytes) -> None:
        """More of the body. It may come in blocks of a byte: each by itself would take fifty."""
        if not self._body:
            self._body = block
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += block
        self._wake()

    def came_whole(self) -> None:
        self.more_body = False
        self._wake()

    def came_at_once(self, body: bytes) -> None:
        """The whole body, before anybody waits for it."""
        self._body = body
        self.more_body = False

    def leave(self) -> None:
        """The client has."""
        if self.response_complete or self.disconnected:
            return
        self.disconnected = True
        self._wake()
        on_left, self.on_left = self.on_left, None
        if on_left is not None:
            on_left()

    @property
    def num_waiting_bytes(self) -> int:
        """Of the body, that nobody waits for yet."""
        return 0 if self._waiter is not None else len(self._body)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
