"""What runs while nobody asks: when it begins, that a request ends it, and that it is not begun again once done."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from octoai.server.machine import idle
from octoai.server.machine.idle import Chore

NOTE = """
import sys, time
note = open(sys.argv[1], "a", buffering=1)
note.write("begun ")
note.flush()
time.sleep(float(sys.argv[2]))
note.write("done ")
"""


async def nothing() -> None:
    pass


def noting(path: Path, seconds: float, then: Callable[[], Awaitable[None]] = nothing) -> Chore:
    return Chore([sys.executable, "-c", NOTE, str(path), str(seconds)], then)


def noted(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def until(path: Path, text: str) -> None:
    async with asyncio.timeout(20):
        while noted(path) != text:
            await asyncio.sleep(0.02)


def test_commands_run_in_turn_once_each_and_then_what_follows_from_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    followed = []

    async def then() -> None:
        followed.append((noted(first), noted(second)))

    async def main() -> None:
        chores = [noting(first, 0, then), noting(second, 0, then)]
        async with idle.running(chores, lambda: False, quiet_seconds=0.1):
            await until(second, "begun done ")
            await asyncio.sleep(0.5)

    asyncio.run(main())
    assert first.read_text() == "begun done "
    assert second.read_text() == "begun done "
    assert followed == [("begun done ", ""), ("begun done ", "begun done ")]


def test_what_goes_wrong_then_is_said_and_the_next_one_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def then() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        chores = [noting(tmp_path / "first", 0, then), noting(tmp_path / "second", 0)]
        async with idle.running(chores, lambda: False, quiet_seconds=0.1):
            await until(tmp_path / "second", "begun done ")

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.slow
def test_a_request_ends_it_and_it_is_begun_again_in_quiet(tmp_path: Path) -> None:
    path, busy = tmp_path / "it", False

    async def main() -> None:
        nonlocal busy
        async with idle.running([noting(path, 2)], lambda: busy, quiet_seconds=0.3):
            await until(path, "begun ")
            busy = True
            await asyncio.sleep(3)
            assert path.read_text() == "begun "
            busy = False
            await until(path, "begun begun done ")

    asyncio.run(main())


def test_it_does_not_begin_while_requests_come(tmp_path: Path) -> None:
    async def main() -> None:
        async with idle.running([noting(tmp_path / "it", 0)], lambda: True, quiet_seconds=0.1):
            await asyncio.sleep(1)

    asyncio.run(main())
    assert not (tmp_path / "it").exists()


def test_it_ends_with_the_service_at_once(tmp_path: Path) -> None:
    path = tmp_path / "it"

    async def main() -> None:
        async with idle.running([noting(path, 60)], lambda: False, quiet_seconds=0.1):
            await until(path, "begun ")

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 15


LATER = f"""
import os, sys
sys.exit({idle.LATER} if not os.path.exists(sys.argv[1]) else 0)
"""


def test_what_cannot_be_done_now_is_tried_again_and_others_go_first(tmp_path: Path) -> None:
    needed = tmp_path / "needed"
    followed = []

    async def then() -> None:
        followed.append(noted(tmp_path / "other"))

    waiting = Chore([sys.executable, "-c", LATER, str(needed)], then)

    async def main() -> None:
        chores = [waiting, noting(tmp_path / "other", 0)]
        async with idle.running(chores, lambda: False, quiet_seconds=0.1, retry_seconds=0.1):
            await until(tmp_path / "other", "begun done ")
            await asyncio.sleep(0.5)
            assert not followed
            needed.touch()
            async with asyncio.timeout(20):
                while not followed:
                    await asyncio.sleep(0.02)

    asyncio.run(main())
    assert followed == ["begun done "]


@pytest.mark.slow
def test_what_never_can_be_done_is_tried_less_and_less_often(tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    program = f"import sys; open(sys.argv[1], 'a').write('.'); sys.exit({idle.LATER})"

    async def main() -> None:
        chores = [Chore([sys.executable, "-c", program, str(tried)], noting(tried, 0).then)]
        async with idle.running(chores, lambda: False, quiet_seconds=0.0, retry_seconds=0.3):
            await asyncio.sleep(6.0)

    asyncio.run(main())
    assert 1 < len(tried.read_text()) <= 5  # after 0.3, 0.6, 1.2 and 2.4 seconds


def test_what_cannot_be_run_now_is_tried_again_and_keeps_nobody_from_running(tmp_path: Path) -> None:
    program, followed = tmp_path / "program", tmp_path / "followed"

    async def then() -> None:
        followed.touch()

    async def main() -> None:
        chores = [Chore([str(program)], then), noting(tmp_path / "other", 0)]
        async with idle.running(chores, lambda: False, quiet_seconds=0.1, retry_seconds=0.1):
            await until(tmp_path / "other", "begun done ")
            assert not followed.exists()
            program.write_text("#!/bin/sh\n")
            program.chmod(0o700)
            async with asyncio.timeout(20):
                while not followed.exists():
                    await asyncio.sleep(0.02)

    asyncio.run(main())


# Without a buffer: it may be told to leave while what it wrote last is on its way.
FOLLOWING = """
import os, signal, sys, time
from octoai.cli import optimize
def leave(*_):
    os.write(note, b"cleaned up ")
    sys.exit(1)
note = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
signal.signal(signal.SIGTERM, leave)
os.write(note, b"begun " if optimize._follow_service() else b"alone ")
if "--briefly" not in sys.argv:
    time.sleep(60)
"""
SERVICE = """
import asyncio, sys
from octoai.server.machine import idle
async def nothing(): pass
async def main():
    chore = idle.Chore([sys.executable, "-c", *sys.argv[1:]], nothing)
    async with idle.running([chore], lambda: False, quiet_seconds=0.1):
        await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_it_cleans_up_and_ends_also_when_the_service_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with subprocess.Popen([sys.executable, "-c", SERVICE, FOLLOWING, str(path)]) as service:
        try:
            asyncio.run(until(path, "begun "))
        finally:
            service.kill()
    asyncio.run(until(path, "begun cleaned up "))


def test_who_runs_a_program_by_hand_is_not_followed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FOLLOWING, str(tmp_path / "it"), "--briefly"], check=True)
    assert noted(tmp_path / "it") == "alone "


def test_what_fails_is_not_tried_for_ever(tmp_path: Path) -> None:
    followed = []

    async def then() -> None:
        followed.append(1)

    failing = Chore([sys.executable, "-c", "raise SystemExit(1)"], then)
    missing = Chore(["/nonexistent/program"], then)

    async def main() -> None:
        async with idle.running([failing, missing], lambda: False, quiet_seconds=0.1):
            await asyncio.sleep(1.5)

    asyncio.run(main())
    assert not followed
