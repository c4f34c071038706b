"""Bringing files to the disk without waiting: the kernel does it, and tells the event loop when it has.

By Linux's own asynchronous I/O, through caio: no thread, which would have to take the interpreter from the event loop
twice for every sync. Where there is none, a thread does the same (see `writer`).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

Done = Callable[[OSError | None], None]
MAX_AT_ONCE = 16


class Syncs:
    """For one event loop. Raises OSError where the kernel offers none, ImportError where there is no library."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        from caio import linux_aio

        self.loop = loop
        self._operation = linux_aio.Operation
        self._context = linux_aio.Context(MAX_AT_ONCE)
        loop.add_reader(self._context.fileno, self._collect)

    def submit(self, fd: int, done: Done) -> None:
        """`done` is called in the loop, with what failed. Raises OSError where it could not be begun."""

        def finished(_: Any) -> None:  # what it is called with does not tell success from failure
            try:
                operation.get_value()
            except Exception as error:  # noqa: BLE001  # it raises SystemError with the system's words
                done(OSError(errno.EIO, str(error)))
            else:
                done(None)

        operation = self._operation.fdsync(fd)
        operation.set_callback(finished)
        try:
            self._context.submit(operation)
        except ValueError as error:  # so it says that the file, or the system behind it, cannot
            raise OSError(errno.EINVAL, str(error)) from None

    def _collect(self) -> None:
        self._context.poll()
        self._context.process_events()
