"""How many cores there are, in a container as well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octoai.server.machine import cores
from octoai.server.machine.cores import num_cores


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a machine with 16 cores; nothing is said in it."""
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("said", "expected"),
    [("max 100000", 16), ("200000 100000", 2), ("250000 100000", 3), ("5000 100000", 1), ("9900000 100000", 16)],
)
def test_a_container_may_have_less_time_than_its_cores_have(cgroup: Path, said: str, expected: int) -> None:
    (cgroup / "cpu.max").write_text(f"{said}\n")
    assert num_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [(-1, 16), (150000, 2)])
def test_as_the_first_version_of_cgroups_says_it(cgroup: Path, quota: int, expected: int) -> None:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (cgroup / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert num_cores() == expected


@pytest.mark.parametrize("said", [None, "", "nothing known"])
def test_where_nobody_says_there_are_as_many_as_we_may_run_on(cgroup: Path, said: str | None) -> None:
    if said is not None:
        (cgroup / "cpu.max").write_text(said)
    assert num_cores() == 16
