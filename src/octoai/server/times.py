"""Time as it is counted here: moments in whole microseconds since 1970 (UTC), in seconds where a name ends in `_at`.

Of the system's clock, which may be set back or ahead; what must only go forward asks `time.monotonic`.
"""

from __future__ import annotations

import time

MINUTE, HOUR, DAY = 60, 3600, 86_400
SECOND_US, MINUTE_US, DAY_US = 1_000_000, 60_000_000, 86_400_000_000
MAX_TIME = 253_402_300_800  # the year 10000, in seconds: what is later cannot be written with four digits


def now_us() -> int:
    return time.time_ns() // 1000
