"""The port that the service is reached at: one listener for one process, or one for each of several.

Several share a port by `SO_REUSEPORT`: the system spreads connections over their listeners by a hash, evenly enough
whenever they come. One listener that all accept from gives a burst of connections to whoever wakes first. A listener
goes with its process, so none keeps connections that nobody will accept.
"""

from __future__ import annotations

import errno
import socket
import sys

BACKLOG = 2048
NUM_DOORS = 8
_SPREADS = sys.platform == "linux"  # elsewhere the option gives all connections to one


class CannotListen(Exception):
    """The text is one line."""


def listen(host: str, port: int) -> socket.socket:
    """For a process that serves alone. Raises CannotListen."""
    listener = _bound(host, port)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _refusal(host, port, error) from None
    return listener


def doors(listener: socket.socket) -> list[socket.socket]:
    """It, and itself again, for the loop to accept from each.

    uvloop takes one connection off a listener in each of its turns. While hundreds of streams are served a turn is tens
    of milliseconds, and of a burst of new clients the last would not be heard for seconds. More doors would cost every
    connection more: each looks who is there.
    """
    return [listener, *(listener.dup() for _ in range(NUM_DOORS - 1))]


def url(host: str, listener: socket.socket) -> str:
    """Where clients on this machine reach us: a wildcard address is not one they can connect to."""
    port = listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104  # compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Port:
    """For several processes, as long as it is open. Raises CannotListen."""

    def __init__(self, host: str, port: int) -> None:
        # Without the option no other may have the port: with it a second service of ours would go unnoticed.
        self.held = listen(host, port)
        self._host = host
        if _SPREADS:
            port = self.held.getsockname()[1]
            self.held.close()
            # Bound, not listening, it keeps the port while no worker serves: from all who do not share it, which one
            # that lets an address be used again would not. The workers' own may still.
            self.held = _bound(host, port, is_shared=True)
            self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self.number = self.held.getsockname()[1]

    def listener(self, *, is_listening: bool) -> socket.socket:
        """For one more process: `is_listening` already, so that who comes waits for it, or when it can answer."""
        if not _SPREADS:
            return self.held.dup()
        listener = _bound(self._host, self.number, is_shared=True)
        if is_listening:
            listener.listen(BACKLOG)
        return listener

    def close(self) -> None:
        self.held.close()


def _bound(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except UnicodeError:
        reason = "it is no name of a machine; choose another with --host"
        raise CannotListen(f"cannot listen on {host!r:.80}: {reason}") from None
    except OSError as error:
        raise _refusal(host, port, error) from None
    return bound


def _refusal(host: str, port: int, error: OSError) -> CannotListen:
    reason = "it is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
    is_of_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
    option = "--host" if is_of_host else "--port"
    return CannotListen(f"cannot listen on {host}:{port}: {reason}; choose another with {option}")
