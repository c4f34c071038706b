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


class Descriptors:
    """Of this process."""

    def __init__(self) -> None:
        self._said = -SAID_SECONDS

    def look(self) -> None:
        """Once a second. Where none is left, connections are turned away without our hearing of it."""
        try:
            socket.socket().close()
        except OSError as error:
            if error.errno in OUT and time.monotonic() - self._said >= SAID_SECONDS:
                self._said = time.monotonic()
                log.error("no file descriptor is left, and connections are turned away: raise the limit (ulimit -n)")
