"""One connection of a synchronous client: how long it may rest, what can be done on its socket at once, its end."""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress
from typing import Any

from octoai._transport import Origin

MAX_IDLE_SECONDS = 30.0
PIECE_BYTES = 64 * 1024  # of a long request
_NOT_NOW = frozenset({"BlockingIOError", "SSLWantReadError", "SSLWantWriteError"})
_MAX_MILLISECONDS = 2**31 - 1  # that `poll` can wait


class Connection:
    __slots__ = ("idle_since", "origin", "pid", "socket")

    def __init__(self, raw: socket.socket, origin: Origin) -> None:
        self.socket = raw
        self.origin = origin
        self.pid = os.getpid()
        self.idle_since = 0.0

    def is_usable(self) -> bool:
        """Not too old, and silent: bytes that nobody asked for mean that the service has closed it."""
        is_young = time.monotonic() - self.idle_since < MAX_IDLE_SECONDS
        return is_young and self.pid == os.getpid() and is_silent(self.socket)

    def close(self) -> None:
        """The peer sees it at once, even where a forked child has a copy of the descriptor, and so does a thread that
        is waiting for bytes. The child itself only lets go of its copy."""
        if self.pid == os.getpid():
            shut_down(self.socket)
        self.socket.close()


def shut_down(raw: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        raw.shutdown(socket.SHUT_RDWR)


def is_silent(raw: Any) -> bool:
    """Whether the socket is open and has nothing to read."""
    try:
        return not any(ready(raw, 0))
    except (OSError, ValueError):
        return False


def ready(raw: Any, seconds: float | None, *, reads: bool = True, writes: bool = False) -> tuple[bool, bool]:
    """Whether the socket can be read from, and whether it can be written to, as soon as one is so. Broken, it is both:
    to try says why."""
    if not hasattr(select, "poll"):
        read, written, _ = select.select([raw] if reads else [], [raw] if writes else [], [], seconds)
        return bool(read), bool(written)
    poll = select.poll()
    poll.register(raw, (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0))
    events = poll.poll(None if seconds is None else min(seconds * 1000, _MAX_MILLISECONDS))
    event = events[0][1] if events else 0
    return bool(event & ~select.POLLOUT), bool(event & ~select.POLLIN)


def sent_at_once(raw: Any, data: memoryview) -> int:
    """How much of its next piece leaves without a wait, on a socket that does not block. TLS says so only of all that
    it was given, however long that takes."""
    try:
        return int(raw.send(data[:PIECE_BYTES]))
    except OSError as error:
        if type(error).__name__ not in _NOT_NOW:
            raise
        return 0


def received_at_once(raw: Any, num_bytes: int) -> bytes | None:
    """What is there without a wait, on a socket that does not block: None where that is nothing, empty at the end."""
    try:
        return bytes(raw.recv(num_bytes))
    except OSError as error:
        if type(error).__name__ not in _NOT_NOW:
            raise
        return None
