"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """No more than the time that a container is given is enough for: of more threads, all are stopped when it is up."""
    num_allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return math.ceil(min(num_allowed, _time_of_cores()))


def _time_of_cores() -> float:
    """Of so many cores we have all time, by the container that we are in. Infinite where nobody says."""
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()  # "max": no limit
        return int(quota) / int(period)
    with suppress(OSError, ValueError):  # the first version of cgroups, where -1 is none
        quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf
