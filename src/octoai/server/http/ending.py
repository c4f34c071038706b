"""How a connection ends, from either side: its client has left, or all is answered that will be.

One that is closed at once may lose what was sent last, and one that waits may wait for ever: here is between the two.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

from octoai.server.http.incoming import Connection, Incoming

LINGER_SECONDS = 30.0  # for a client to read some of what it was sent before its connection was closed, or to send on


class Flow(FlowControl):
    """Nothing more is read while some of what came is held back, though each of uvicorn's requests asks for more."""

    is_holding = False

    def resume_reading(self) -> None:
        if not self.is_holding:
            super().resume_reading()


class Ending(Connection):
    """Of one connection; `protocol` has the rest of it."""

    loop: asyncio.AbstractEventLoop
    flow: Flow

    _answering: Any = None  # the request that is: an `Incoming`, or what uvicorn has for one
    _is_between = True  # nothing of the next request has come
    _held = b""  # of what came, behind as many requests as are kept
    _is_deaf = False  # all that is answered has come; what its client still sends is dropped
    _is_leaving = False  # and all that we say is said
    _leaving: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._is_between or self.transport.is_closing():
            self.transport.close()
            self._linger()
        elif not self._is_leaving:
            self._leave()

    def _leave(self) -> None:
        """Where its client is not done with sending: closed at once, what comes now would have the kernel throw away
        the answer on its way, and the client would hear of a broken connection instead."""
        self._is_leaving = self._is_deaf = True
        self.transport.write_eof()
        self._held, self.flow.is_holding = b"", False
        self.flow.resume_reading()
        self._tell_that_nobody_hears()
        self._leaving = self.loop.call_later(LINGER_SECONDS, self._has_left)

    def _tell_that_nobody_hears(self) -> None:
        answering = self._answering
        if isinstance(answering, Incoming):
            answering.leave()
        elif answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()

    def _has_left(self) -> None:
        self.transport.close()
        self._linger()

    def _linger(self) -> None:
        """A transport that closes waits until all is written: for ever to who does not read, here while he does."""
        if self._lingering is None and self.transport.get_write_buffer_size():
            self._lingering = self.loop.call_later(LINGER_SECONDS, self._close_if_unread, self._num_unread())

    def _close_if_unread(self, num_before: int) -> None:
        self._lingering = None
        if self._num_unread() < num_before:
            self._linger()
        else:
            self.transport.abort()

    def _num_unread(self) -> int:
        """Bytes that the client's machine has not acknowledged, as far as the system tells: the kernel holds megabytes,
        and takes no more from us until a good part of them has gone."""
        return self.transport.get_write_buffer_size() + num_unacknowledged(self.transport.get_extra_info("socket"))


def num_unacknowledged(raw: Any) -> int:
    """What of it is in the kernel's buffer for that socket; 0 where the system does not tell."""
    try:
        return int.from_bytes(fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (AttributeError, OSError, ValueError):
        return 0
