"""Nothing stays as a zombie where we are the first process, and what is ours is asked for by ourselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

_AS_FIRST_PROCESS = """
import asyncio, ctypes, os, subprocess, time, uvloop
from octoai.server.machine import zombies
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # what children leave behind is ours, as it is the first process's
zombies.LOOK_SECONDS = 0.1
subprocess.run(["sh", "-c", "sleep 0.1 & sleep 0.1 & sleep 0.1 &"], check=True)

look = zombies._first_ended

def late_look():
    time.sleep(0.2)  # the loop has not heard of ends that came meanwhile
    return look()

zombies._first_ended = late_look

def num_children():
    return len(open(f"/proc/self/task/{os.getpid()}/children").read().split())

async def main():
    reaping = asyncio.create_task(zombies.reap())
    commands = [f"sleep {number / 4}; exit {number}" for number in range(9)]  # some end while the loop is busy
    ours = [await asyncio.create_subprocess_exec("sh", "-c", command) for command in commands]
    print(*[await each.wait() for each in ours])
    await asyncio.sleep(2)
    print(num_children())

print(num_children())
uvloop.run(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="orphans are given to who asks for them on Linux only")
def test_orphans_are_asked_for_and_our_own_left_to_who_started_them() -> None:
    command = [sys.executable, "-u", "-c", _AS_FIRST_PROCESS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["3", "0 1 2 3 4 5 6 7 8", "0"]
