"""File descriptors: each connection is one, and a request to an engine over HTTP takes two.

Systems give a process a thousand, and let it have many more if it asks.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
import time
from contextlib import suppress

log = logging.getLogger("octoai.descriptors")

# Not all that is allowed, which may be a billion: there are programs that begin by closing every one there could be.
# Programs that we start have the same limit, and open few.
WANTED = 65_536
SAID_SECONDS = 60.0
OUT = (errno.EMFILE, errno.ENFILE)


def raise_limit() -> None:
    """To what is wanted, as far as this process may. Where the system refuses, it stays as it is."""
    if sys.platform == "win32":
        return
    import resource

    with suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class Complaint:
    """That none is left: once a minute, however many connections there are none for."""

    def __init__(self, log: logging.Logger, consequence: str) -> None:
        self._log = log
        self._consequence = consequence
        self._said = -SAID_SECONDS

    def say(self) -> None:
        if time.monotonic() - self._said >= SAID_SECONDS:
            self._said = time.monotonic()
            self._log.error("no file descriptor is left%s: raise the limit (ulimit -n)", self._consequence)


class Descriptors:
    """Of this process."""

    def __init__(self) -> None:
        self._complaint = Complaint(log, ", and connections are turned away")

    def look(self) -> None:
        """Once a second. Where none is left, connections are turned away without our hearing of it."""
        try:
            socket.socket().close()
        except OSError as error:
            if error.errno in OUT:
                self._complaint.say()
