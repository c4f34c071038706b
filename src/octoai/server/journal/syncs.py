"""Bringing files to the disk without waiting: the kernel does it, and tells the event loop when it has.

By Linux's io_uring, or by its older asynchronous I/O where that is not allowed, as in many containers; both through
caio. No thread, which would have to take the interpreter from the event loop twice for every sync. A ring takes a tenth
of the time to ask, and is served by whichever core is idle; the older way by the one that asked. Where there is
neither, a thread does the same (see `writer`).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Done = Callable[[OSError | None], None]
MAX_AT_ONCE = 16


class Syncs:
    """For one event loop. Raises OSError where the kernel offers none, ImportError where there is no library."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._operation, self._context = _ring() or _older()
        self._flush: Callable[[], object] = getattr(self._context, "flush", _nothing)
        loop.add_reader(self._context.fileno, self._on_readable)

    def submit(self, fd: int, done: Done) -> None:
        """`done` is called in the loop, with what failed; here already where there was nothing to do. Raises OSError
        where it could not be begun."""

        def finished(_: Any) -> None:  # what it is called with does not always tell success from failure
            try:
                operation.get_value()
            except Exception as error:  # noqa: BLE001  # SystemError, as above
                done(OSError(errno.EIO, str(error)))
            else:
                done(None)

        operation = self._operation.fdsync(fd)
        operation.set_callback(finished)
        try:
            self._context.submit(operation)
            self._flush()
        except (ValueError, SystemError) as error:  # so it says that the file, or the system behind it, cannot
            raise OSError(errno.EINVAL, str(error)) from None

    def collect(self) -> None:
        """Tell at once of what is done, for somebody who would wait for it."""
        while True:
            try:
                self._context.process_events()
                return
            except SystemError as error:  # the older way, when a signal comes while nothing is done
                if error.args[:1] != (errno.EINTR,):
                    raise

    def _on_readable(self) -> None:
        with suppress(BlockingIOError):
            self._context.poll()
        self.collect()


def _ring() -> tuple[Any, Any] | None:
    try:
        from caio import linux_uring

        return linux_uring.Operation, linux_uring.Context(MAX_AT_ONCE)
    except (ImportError, OSError, SystemError):  # the last with the system's words, where it is not allowed
        return None


def _older() -> tuple[Any, Any]:
    from caio import linux_aio

    return linux_aio.Operation, linux_aio.Context(MAX_AT_ONCE)


def _nothing() -> None:
    """The older way has nothing to flush."""
