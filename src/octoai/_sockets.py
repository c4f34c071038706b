"""A socket to a host, and how long to wait for it. Without asyncio, which a synchronous client never needs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable


def connected_by(ends: float | None, host: str, port: int, watch: Callable[[socket.socket], object]) -> socket.socket:
    """The first of the host's addresses that answers, one after the other. `watch` sees each socket before it waits.

    All of them have one end. What is left until then is shared by those that are left, so that a silent one does not
    take the time of the next; where they are many, one that is far away still has a second, or half of what is left.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failed: Exception = OSError(f"{host} has no address")
    for number, (family, kind, protocol, _, place) in enumerate(addresses):
        left = seconds_until(ends)
        raw = None
        try:
            raw = socket.socket(family, kind, protocol)  # fails where the kernel does not know the family
            raw.settimeout(None if left is None else _share(left, len(addresses) - number))
            watch(raw)
            raw.connect(place)
            return raw
        except BaseException as error:
            if raw is not None:
                raw.close()
            if not isinstance(error, OSError):
                raise
            failed = error
    raise failed


def _share(seconds: float, number: int) -> float:
    """Of what is left for this number of addresses, the time of the next one."""
    return max(seconds / number, min(seconds / 2, 1.0))


def tune(raw: socket.socket) -> None:
    """No delay for small writes; and a peer that vanished behind a NAT is noticed in minutes, not hours."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def end_of(seconds: float | None) -> float | None:
    """When a wait that begins now is over; None where it has no end."""
    return None if seconds is None else time.monotonic() + seconds


def seconds_until(ends: float | None) -> float | None:
    """None where there is no end. `TimeoutError` once it has passed."""
    if ends is None:
        return None
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
