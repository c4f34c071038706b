"""The first of a host's addresses that answers; for asyncio by Happy Eyeballs (RFC 8305).

asyncio has it too, but forgets a socket when it is cancelled in the moment in which that was connected, or when two are
connected in the same moment.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

DELAY_SECONDS = 0.25  # for an address to answer, before the next one is asked beside it: the RFC's advice

Address = tuple[Any, ...]
"""As `getaddrinfo` gives it: family, type, protocol, canonical name, and what `connect` takes."""


async def connected(host: str, port: int) -> socket.socket:
    """A connection to the host. Raises what the address that failed last did where none answers, mostly OSError."""
    loop = asyncio.get_running_loop()
    left = deque(_by_turns(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    attempts: list[asyncio.Task[socket.socket]] = []
    pending: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException = OSError(f"{host} has no address")
    winner = None
    try:
        while winner is None and (left or pending):
            if left:
                attempts.append(loop.create_task(_connected(loop, left.popleft())))
                pending.add(attempts[-1])
            seconds = DELAY_SECONDS if left else None
            done, pending = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                error = attempt.exception()
                if error is None:
                    winner = attempt
                else:
                    failure = error
    finally:
        for attempt in attempts:
            if attempt is not winner:
                _give_up(attempt)
    if winner is None:
        raise failure
    return winner.result()


async def _connected(loop: asyncio.AbstractEventLoop, address: Address) -> socket.socket:
    family, kind, protocol, _, place = address
    made = socket.socket(family, kind, protocol)
    try:
        made.setblocking(False)
        await loop.sock_connect(made, place)
    except BaseException:
        made.close()
        raise
    return made


def _give_up(attempt: asyncio.Task[socket.socket]) -> None:
    """A task that is cancelled closes its socket itself."""
    if not attempt.done():
        attempt.cancel()
    elif not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def _by_turns(addresses: Sequence[Address]) -> list[Address]:
    """One of the first's family, one of the other, and so on."""
    first = [each for each in addresses if each[0] == addresses[0][0]]
    others = [each for each in addresses if each[0] != addresses[0][0]]
    return [each for each in chain.from_iterable(zip_longest(first, others)) if each is not None]


def connected_by(ends: float | None, host: str, port: int) -> socket.socket:
    """Without asyncio: the first of the host's addresses that answers, one after the other.

    All of them have one end. What is left until then is shared by those that are left, so that a silent one does not
    take the time of the next.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failed: Exception = OSError(f"{host} has no address")
    for number, (family, kind, protocol, _, place) in enumerate(addresses):
        left = seconds_until(ends)
        raw = socket.socket(family, kind, protocol)
        try:
            raw.settimeout(None if left is None else left / (len(addresses) - number))
            raw.connect(place)
            return raw
        except OSError as error:
            raw.close()
            failed = error
        except BaseException:
            raw.close()
            raise
    raise failed


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
