"""HTTP/1.1 over sockets of our own, kept open between calls. Synchronous; knows no proxies.

Reading straight from the socket costs about a third of what an HTTP library does per streamed event, and gives
exact deadlines: the socket's timeout is that of each wait.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from contextlib import suppress
from functools import partial

from octoai._connection import Connection, ready, received_at_once, sent_at_once, shut_down
from octoai._deadlines import Deadlines
from octoai._http1 import ProtocolError, ResponseParser
from octoai._sockets import connected_by, end_of, seconds_until, tune
from octoai._tls import tls_context
from octoai._transport import (
    DRAIN_BYTES,
    DRAIN_SECONDS,
    Message,
    Origin,
    Request,
    Response,
    connection_error,
    failure,
    is_timeout,
    message_of,
)
from octoai.errors import ApiConnectionError, ApiTimeoutError

MAX_IDLE = 32
_BLOCK_BYTES = 64 * 1024


class SocketTransport:
    """A pool of idle connections for each origin.

    Safe among threads without a lock (a deque's ends are atomic, and a lock could be held by another thread at the
    moment of a fork). A forked child starts with an empty pool: were it to share its parent's sockets, each would
    read the other's answers.
    """

    def __init__(self) -> None:
        self._idle: dict[Origin, deque[Connection]] = {}
        self._pid = os.getpid()

    def send(self, request: Request, deadlines: Deadlines) -> Response:
        origin, message = message_of(request)
        connection = self._take(origin)
        if connection is not None:
            response = SocketResponse(self, connection)
            try:
                return response.open(request, message, deadlines)
            except ApiConnectionError as error:
                # A kept connection may have died while nobody looked. Nothing came back on it: once more, on a new one.
                if not error.retryable:
                    raise
        return SocketResponse(self, self._connect(origin, request, deadlines)).open(request, message, deadlines)

    def give_back(self, connection: Connection) -> None:
        everywhere = self._own_idle()
        idle = everywhere.setdefault(connection.origin, deque())
        connection.idle_since = time.monotonic()
        idle.append(connection)
        if len(idle) > MAX_IDLE:
            self._drop_one(idle)
        # Nobody may ask for another origin again, to see that its connections are over.
        for other in list(everywhere.values()):
            if other is not idle:
                self._drop_unusable(other)

    def close(self) -> None:
        idle, self._idle = self._own_idle(), {}
        for connections in idle.values():
            while self._drop_one(connections):
                pass

    def __del__(self) -> None:
        self.close()

    def _own_idle(self) -> dict[Origin, deque[Connection]]:
        if self._pid != os.getpid():
            inherited, self._idle, self._pid = self._idle, {}, os.getpid()
            for connections in inherited.values():
                for connection in connections:
                    connection.close()  # this process's descriptor only: the parent's connection stands
        return self._idle

    def _take(self, origin: Origin) -> Connection | None:
        idle = self._own_idle().get(origin)
        while idle:
            try:
                connection = idle.pop()
            except IndexError:
                return None
            if connection.is_usable():
                return connection
            connection.close()
        return None

    @staticmethod
    def _drop_unusable(idle: deque[Connection]) -> None:
        """Those at the end where the oldest are."""
        with suppress(IndexError):  # another thread has taken the last
            while not (connection := idle.popleft()).is_usable():
                connection.close()
            idle.appendleft(connection)

    @staticmethod
    def _drop_one(idle: deque[Connection]) -> bool:
        try:
            idle.popleft().close()
        except IndexError:
            return False
        return True

    def _connect(self, origin: Origin, request: Request, deadlines: Deadlines) -> Connection:
        scheme, host, port = origin
        ends = end_of(deadlines.connecting())
        context = tls_context() if scheme == "https" else None
        raw = None
        try:
            raw = connected_by(ends, host, port, partial(_watch, deadlines))
            tune(raw)
            if context is not None:
                raw.settimeout(seconds_until(ends))
                with raw.dup() as twin:  # the handshake takes `raw` away
                    _watch(deadlines, twin)
                    raw = context.wrap_socket(raw, server_hostname=host)
        except BaseException as error:
            if raw is not None:
                raw.close()
            if not isinstance(error, OSError | UnicodeError | ValueError):
                raise
            if is_timeout(error):
                raise deadlines.passed("connect") from error
            certificate = type(error).__name__ == "SSLCertVerificationError"
            raise connection_error(error, request, retryable=not certificate) from error
        return Connection(raw, origin)


def _watch(deadlines: Deadlines, raw: socket.socket) -> None:
    """Have what is waited for on this socket end when nobody wants the answer any more."""
    deadlines.on_stop = partial(shut_down, raw)
    deadlines.connecting()  # raises where that was so just before


class SocketResponse:
    """One exchange on one connection."""

    def __init__(self, pool: SocketTransport, connection: Connection) -> None:
        self._pool = pool
        self._connection: Connection | None = connection
        self._socket = connection.socket
        self._pid = connection.pid
        self._parser = ResponseParser()
        self._first = b""
        self._is_sent = True
        self._patience: float | None = 0.0

    @property
    def status(self) -> int:
        return self._parser.status

    @property
    def headers(self) -> dict[str, str]:
        return self._parser.headers

    def open(self, request: Request, message: Message, deadlines: Deadlines) -> SocketResponse:
        deadlines.on_stop = self.close
        try:
            self._send(message, deadlines)
            while not self.status:
                block = self._received(deadlines.waiting())
                if not block:
                    self._parser.end()
                self._first = self._parser.feed(block)
        except (OSError, ProtocolError) as error:
            self.close()
            raise failure(error, request, deadlines, retryable=not self._parser.begun) from error
        except BaseException:
            self.close()
            raise
        return self

    def receive(self, seconds: float | None) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        if self._pid != os.getpid():
            raise OSError("this stream belongs to the process that opened it")
        ends, has_waited = None, False
        while not self._parser.done:
            if has_waited:  # bytes that are no body, as the head of a chunk, do not begin the wait anew
                ends = ends or end_of(seconds)
                seconds = seconds_until(ends)
            block = self._received(seconds)
            if not block:
                self._parser.end()
                break
            part = self._parser.feed(block)
            if part:
                return part
            has_waited = True
        self._release()
        return b""

    def finish(self) -> None:
        ends, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
        try:
            while self._connection is not None and left > 0:
                part = self.receive(max(ends - time.monotonic(), 0.001))
                left -= len(part)
                if time.monotonic() > ends:
                    break
        except (OSError, ProtocolError):
            pass  # the answer is complete; all that is lost is the connection, which `close` now closes
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def __del__(self) -> None:
        self.close()

    def _received(self, seconds: float | None) -> bytes:
        if seconds != self._patience:  # to set it is a system call, and between events it is nearly always the same
            self._socket.settimeout(seconds)
            self._patience = seconds
        return self._socket.recv(_BLOCK_BYTES)

    def _send(self, message: Message, deadlines: Deadlines) -> None:
        deadlines.waiting()  # none has passed
        self._socket.settimeout(0)
        try:
            rest = memoryview(message)
            rest = rest[sent_at_once(self._socket, rest) :]
            if rest:
                self._send_rest(rest, deadlines)
        except (OSError, ProtocolError, ApiTimeoutError) as error:
            if self._is_refused:  # the status stands, and whatever can still be read of the reason
                if is_timeout(error) or isinstance(error, ApiTimeoutError):
                    self.close()  # which has been waited for
                return
            if not isinstance(error, BrokenPipeError | ConnectionResetError):
                raise
            # A service may refuse a request before it has read all of it: its answer, if there is one, says why.
            block = self._received(1.0)
            if not block:
                raise
            self._first += self._parser.feed(block)

    def _send_rest(self, rest: memoryview, deadlines: Deadlines) -> None:
        """What does not leave at once. The waits begin anew with each part of it that has left. A service that has
        refused the request already may take the rest of it before it says why, and then no more; one that redirects
        has no use for it."""
        self._is_sent = False
        while rest and not (self._is_refused and (self._first or self._parser.done or self.status < 400)):
            reads = self._is_refused or not self.status
            readable, writable = ready(self._socket, deadlines.waiting(), reads=reads, writes=True)
            if readable and reads:
                self._hear()
                continue
            if not writable:
                raise TimeoutError
            num_sent = sent_at_once(self._socket, rest)
            if num_sent:
                rest = rest[num_sent:]
                deadlines.send()
        self._is_sent = not rest

    @property
    def _is_refused(self) -> bool:
        return self.status >= 300

    def _hear(self) -> None:
        """What the service says before it has the whole request."""
        block = received_at_once(self._socket, _BLOCK_BYTES)
        if block is not None:
            if not block:
                self._parser.end()
            self._first = self._parser.feed(block)

    def _release(self) -> None:
        if self._connection is None:
            return
        if self._parser.reusable and self._is_sent and self._pid == os.getpid():
            connection, self._connection = self._connection, None
            self._pool.give_back(connection)
        else:
            self.close()
