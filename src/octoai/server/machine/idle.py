"""Programs that run while nobody asks anything: begun after a quiet while, ended as soon as a request comes.

Knows neither what they do nor what a request is. A program sees in its environment that it was begun so, and by whom:
it should end with us, also where we are killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

log = logging.getLogger("octoai.idle")

QUIET_SECONDS = 30.0
POLL_SECONDS = 0.1
LEAVE_SECONDS = 5.0  # to clean up; then it is killed
RETRY_SECONDS, MAX_RETRY_SECONDS = 60.0, 3600.0  # what never can be done then costs little
LATER = os.EX_TEMPFAIL
"""The exit status of a program that could not do it now."""
PARENT = "OCTOAI_CHORE_OF"
"""In the environment of a program: the process that began it."""


@dataclass(frozen=True, slots=True)
class Chore:
    """A command, and what is done here once it has ended well."""

    command: Sequence[str]
    then: Callable[[], Awaitable[None]]


@asynccontextmanager
async def running(
    chores: Sequence[Chore],
    is_busy: Callable[[], bool],
    *,
    quiet_seconds: float = QUIET_SECONDS,
    retry_seconds: float = RETRY_SECONDS,
) -> AsyncIterator[None]:
    """One after the other, each until it ended by itself once; with `LATER`, again after a while, twice as long each
    time. Those that still run at the end are ended."""
    task = asyncio.create_task(_run_all(chores, is_busy, quiet_seconds, retry_seconds))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _run_all(
    chores: Sequence[Chore], is_busy: Callable[[], bool], quiet_seconds: float, retry_seconds: float
) -> None:
    waiting = deque(chores)
    while waiting:
        chore = waiting.popleft()
        command, status = chore.command, None
        while status is None:
            await _quiet(is_busy, quiet_seconds)
            try:
                status = await _run(command, is_busy)
            except OSError as error:
                log.warning("cannot run %s: %s", command[0], error.strerror or error)
                status = LATER  # there may be no memory, or no descriptor, for a moment
        if status == LATER:
            log.info("what should run while idle cannot now: %s", " ".join(command))
            waiting.append(chore)
            await asyncio.sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, MAX_RETRY_SECONDS)
        elif status:
            log.warning("what should run while idle ended with %d: %s", status, " ".join(command))
        else:
            log.info("done while idle: %s", " ".join(command))
            await _then(chore)


async def _then(chore: Chore) -> None:
    """What goes wrong there is no reason not to go on, and nobody else would say so."""
    try:
        await chore.then()
    except Exception:
        log.exception("what follows from %s failed", " ".join(chore.command))


async def _quiet(is_busy: Callable[[], bool], quiet_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    since = loop.time()
    while loop.time() - since < quiet_seconds:
        await asyncio.sleep(POLL_SECONDS)
        if is_busy():
            since = loop.time()


async def _run(command: Sequence[str], is_busy: Callable[[], bool]) -> int | None:
    """Its exit status; None when a request came first."""
    nothing = asyncio.subprocess.DEVNULL
    environ = {**os.environ, PARENT: str(os.getpid())}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True, env=environ
    )
    try:
        while process.returncode is None:
            if is_busy():
                return None
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await process.wait()
        return process.returncode
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(LEAVE_SECONDS):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
