"""Zombies: processes that have ended, and whose end nobody asks for, since who started them had ended before.

They are given to us where we are the first process of a container, and stay until their end is asked for. Those of our
own are asked for by who started them as soon as the loop hears of their end: what is still there at the next look is
nobody's. Knows none of them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress

LOOK_SECONDS = 1.0


async def reap() -> None:
    """Until it is cancelled."""
    last = None
    while sys.platform == "linux":
        await asyncio.sleep(LOOK_SECONDS)
        ended = _first_ended()
        if ended is not None and ended == last:
            _ask(ended)
            ended = _first_ended()
        last = ended


def _ask(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _first_ended() -> int | None:
    """Of our children whose end nobody has asked for yet."""
    with suppress(ChildProcessError):
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return None if ended is None else ended.si_pid
    return None
