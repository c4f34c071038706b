"""When the engine's threads are in company, and what then becomes of their waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest

from octoai.server.engines.llama.company import (
    CROWDED_TICKS,
    MAX_CALM_SECONDS,
    MIN_CALM_SECONDS,
    TICK_SECONDS,
    Crowding,
    IdleTeam,
    is_visible,
)


@dataclass
class Cores:
    """Two threads that compute, on a clock of their own."""

    now: float = 50.0
    ran: float = 0.0
    waited: float = 0.0
    crowding: Crowding = field(default_factory=Crowding)

    def tick(self, share: float) -> bool:
        """The second thread waits for its core for that share of a tick."""
        self.now += TICK_SECONDS
        self.ran += TICK_SECONDS
        self.waited += share * TICK_SECONDS
        return self.crowding.told(self.now, {1: (self.ran, 0.0), 2: (self.ran - self.waited, self.waited)})

    def seconds_until(self, is_crowded: bool, share: float) -> float:
        began = self.now
        while self.tick(share) != is_crowded:
            assert self.now < began + 60
        return self.now - began


def test_threads_that_have_their_cores_are_not_crowded() -> None:
    cores = Cores()
    assert not any(cores.tick(0.14) for _ in range(1000))
    assert cores.crowding.busy == {1, 2}


def test_a_neighbour_is_noticed_in_a_tenth_of_a_second() -> None:
    cores = Cores()
    cores.tick(0.0)
    assert cores.seconds_until(True, 0.5) < 0.1


def test_one_tick_is_no_neighbour() -> None:
    cores = Cores()
    for _ in range(50):
        assert not any(cores.tick(0.9) for _ in range(CROWDED_TICKS - 1))
        assert not cores.tick(0.0)


def test_a_neighbour_that_leaves_is_soon_forgotten() -> None:
    cores = Cores()
    cores.seconds_until(True, 0.5)
    assert MIN_CALM_SECONDS <= cores.seconds_until(False, 0.05) < MIN_CALM_SECONDS + 0.1


def test_a_neighbour_that_comes_and_goes_has_to_stay_away_longer_each_time_and_only_while_it_does() -> None:
    cores = Cores()
    calm = []
    for _ in range(8):
        cores.seconds_until(True, 0.5)
        calm.append(cores.seconds_until(False, 0.05))
    assert calm == sorted(calm)
    assert MAX_CALM_SECONDS <= calm[-1] < MAX_CALM_SECONDS + 0.1
    while cores.now < cores.crowding._left_at + MAX_CALM_SECONDS:
        cores.tick(0.0)
    cores.seconds_until(True, 0.5)
    assert cores.seconds_until(False, 0.05) < MIN_CALM_SECONDS + 0.1


def test_a_thread_that_is_new_or_gone_says_nothing() -> None:
    crowding = Crowding()
    assert not crowding.told(1.0, {1: (0.0, 0.0)})
    assert not crowding.told(1.1, {2: (0.0, 99.0)})
    assert not crowding.told(1.2, {})
    assert crowding.busy == frozenset()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells nothing")
def test_the_kernel_tells_of_threads() -> None:
    assert is_visible() == os.path.exists("/proc/self/schedstat")


@dataclass
class Library:
    """Records teams."""

    num_cores: int
    teams: list[int] = field(default_factory=list)
    made: threading.Event = field(default_factory=threading.Event)

    def omp_get_num_procs(self) -> int:
        return self.num_cores

    def GOMP_parallel(self, function: object, _data: None, num_threads: object, _flags: object) -> None:
        self.teams.append(num_threads.value)  # type: ignore[attr-defined]
        self.made.set()


@pytest.mark.parametrize(("num_cores", "num_threads"), [(2, 2), (8, 8), (8, 4), (64, 2)])
def test_an_idle_team_makes_for_more_threads_than_cores(num_cores: int, num_threads: int) -> None:
    library = Library(num_cores)
    team = IdleTeam(library, num_threads)
    team.keep(True)
    team.keep(True)
    assert library.made.wait(5)
    # One thread of a team is the one that makes it, and was there before.
    assert 1 + (num_threads - 1) + (library.teams[0] - 1) > num_cores
    team.keep(False)
    team.keep(False)
    assert len(library.teams) == 1


_HELD = """
import ctypes, os, time
from octoai.server.engines.llama.company import IdleTeam
from xllamacpp import xllamacpp
team = IdleTeam(ctypes.CDLL(xllamacpp.__file__), os.cpu_count() or 1)
count = lambda: len(os.listdir("/proc/self/task"))
def until(number):
    deadline = time.monotonic() + 10
    while count() != number and time.monotonic() < deadline:
        time.sleep(0.01)
    return count()
alone = count()
for _ in range(3):
    team.keep(True)
    print(until(alone + 2) - alone)
    team.keep(False)
    print(until(alone) - alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP")
def test_the_real_team_comes_and_goes() -> None:
    said = subprocess.run([sys.executable, "-c", _HELD], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.split() == ["2", "0"] * 3
