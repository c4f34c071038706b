"""Memory is given back after many requests at once, and only then."""

from __future__ import annotations

import sys

import pytest

from octoai.server.heap import MANY, Heap


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


def test_it_trims_once_when_a_burst_is_over() -> None:
    assert trims(0, MANY // 2, MANY, MANY // 2, MANY // 4, 3, 0, 0) == [4]
    assert trims(0, 1000, 251, 250, 100, 62, 61, 0) == [3, 5]
    assert trims(MANY, 0, MANY, 0) == [1, 3]


def test_few_requests_leave_it_as_it_is() -> None:
    assert trims(0, MANY - 1, 0, 5, MANY - 1, 0) == []


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_is_free_between_other_things_goes_back_to_the_system() -> None:
    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    blocks = [bytearray(16_000) for _ in range(4000)]
    last = bytearray(16_000)  # stays, behind the others
    assert resident_bytes() - before > 50_000_000
    del blocks
    heap = Heap()
    heap.look(MANY)
    heap.look(0)
    assert resident_bytes() - before < 20_000_000
    assert last


def test_a_library_that_cannot_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    heap = Heap()
    heap.look(MANY)
    heap.look(0)
