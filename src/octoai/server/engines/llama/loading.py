"""A child that loads: it may take as long as it does, while it does something.

Weights may be large, and the disk slow: no time is too long for that. One that neither computes, nor reads, nor is
given memory hangs, and would never end. Knows processes, not what they load.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("octoai.engine")

LOOK_SECONDS = 1.0
STILL_SECONDS = 60.0  # counted in looks: while we are stopped ourselves, it is not
SAY_SECONDS = 60.0


async def first_line(process: asyncio.subprocess.Process, name: str) -> bytes:
    """What a child says when it has loaded. Empty where it ended before: also where it was killed here, because nothing
    moved in it for `STILL_SECONDS`."""
    assert process.stdout is not None
    reading = asyncio.ensure_future(process.stdout.readline())
    began = said_at = time.monotonic()
    before, num_still = b"", 0
    try:
        while not (await asyncio.wait({reading}, timeout=LOOK_SECONDS))[0]:
            now, state = time.monotonic(), _state(process.pid)
            num_still = num_still + 1 if state and state == before else 0
            before = state
            if num_still * LOOK_SECONDS >= STILL_SECONDS:
                log.error("engine of %s did nothing for %.0f s while it was to load; it is killed", name, STILL_SECONDS)
                with suppress(ProcessLookupError):
                    process.kill()
                return await reading
            if now - said_at >= SAY_SECONDS:
                said_at = now
                log.warning("engine of %s has been loading for %.0f s", name, now - began)
        return reading.result()
    finally:
        reading.cancel()


def _state(pid: int) -> bytes:
    """What the kernel counts of it (its time on the processor, pages it was given, bytes it read): the same again where
    it does nothing. Empty where nobody can tell."""
    counted = b""
    for each in ("stat", "io"):
        with suppress(OSError):  # another system has neither, and not everybody may read the second
            counted += Path(f"/proc/{pid}/{each}").read_bytes()
    return counted
