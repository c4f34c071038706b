"""The first of a host's addresses that answers, for asyncio: Happy Eyeballs (RFC 8305).

asyncio has it too, but forgets a socket when it is cancelled in the moment in which that was connected, or when two are
connected in the same moment.
"""

from __future__ import annotations

import asyncio
import socket
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
