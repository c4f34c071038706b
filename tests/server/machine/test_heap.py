"""Memory is given back after many requests at once, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest

from octoai.server.machine.heap import CALM_LOOKS, MANY, Heap


def trims(*numbers: int) -> list[int]:
    """After which of these numbers of requests."""
    heap, calls, found = Heap(), list[int](), list[int]()
    heap._trim = calls.append
    for at, number in enumerate(numbers):
        heap.look(number)
        if calls:
            calls.clear()
            found.append(at)
    return found


def test_it_trims_once_when_a_burst_has_been_over_for_a_while() -> None:
    calm = [MANY // 4] * CALM_LOOKS
    assert trims(0, MANY, *calm, 0, 0) == [1 + CALM_LOOKS]
    assert trims(1000, *[0] * (CALM_LOOKS - 1), 251, *[250] * 3 * CALM_LOOKS) == [2 * CALM_LOOKS]
    assert trims(MANY, *calm, MANY, *calm) == [CALM_LOOKS, 1 + 2 * CALM_LOOKS]


def test_bursts_that_come_one_after_another_keep_their_memory() -> None:
    assert trims(*[MANY, *[0] * (CALM_LOOKS - 1)] * 5) == []


def test_few_requests_leave_it_as_it_is() -> None:
    assert trims(MANY - 1, *[0] * 2 * CALM_LOOKS, 5) == []


PROGRAM = """
from octoai.server.machine.heap import CALM_LOOKS, MANY, Heap

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

heap, before = Heap(), resident_bytes()
blocks = [bytearray(16_000) for _ in range(4000)]
last = bytearray(16_000)  # stays, behind the others
held = resident_bytes() - before
del blocks
kept = resident_bytes() - before
for number in (MANY, *[0] * CALM_LOOKS):
    heap.look(number)
print(held, kept, resident_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_is_free_between_other_things_goes_back_to_the_system() -> None:
    """In a process of its own, which has no memory left from what ran before."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    held, kept, left = map(int, ran.stdout.split())
    assert kept > 0.9 * held > 50_000_000
    assert left < 5_000_000


def test_a_library_that_cannot_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    heap = Heap()
    for number in (MANY, *[0] * CALM_LOOKS):
        heap.look(number)
