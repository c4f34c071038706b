"""What is in the ledger after `kill -9` at random moments under load, and of streams that their clients left.

The service runs over an engine that counts what it writes; clients remember what they were told. After every kill it
is started again in the same place. A request that is lost, charged twice or not exact fails the script.

    python bench/ledger_crashes.py [--short] [--kills N] [--aborts N] [--json PATH]
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the load is that of the tests

from tests.load.aborts import differences, left, settled
from tests.load.crashes import Crashes
from tests.load.places import serve
from tests.load.upstream import Upstream
from tests.running import Serve


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="5 kills and 200 streams: a minute")
    parser.add_argument("--kills", type=int, help="default 30, short 5")
    parser.add_argument("--aborts", type=int, help="streams that are left (default 1000, short 200)")
    results = Path(__file__).parent / "results" / "ledger_crashes.json"
    parser.add_argument("--json", type=Path, default=results, metavar="PATH")
    return parser.parse_args()


@contextmanager
def upstream() -> Iterator[Upstream]:
    running = Upstream()
    try:
        yield running
    finally:
        running.close()


def verifies(service: Serve) -> bool:
    ran = service.run("ledger", "verify")
    if ran.returncode != 0:
        print(ran.stderr, file=sys.stderr)
    return ran.returncode == 0


def crashes(num_kills: int, place: Path) -> dict[str, Any]:
    chance = random.Random()
    with upstream() as engine:
        crashing = Crashes(place, engine, num_clients=16)
        try:
            for _ in range(num_kills):
                crashing.round(chance)
            found = crashing.findings()
            is_whole = verifies(crashing.service)
        finally:
            crashing.close()
    for problem in found.problems:
        print(problem, file=sys.stderr)
    return {
        "kills": crashing.num_kills,
        "requests that got a byte": found.num_requests,
        "told to the end, and exact": found.num_finished,
        "left or broken off, settled": found.num_left,
        "interrupted by a kill": found.num_interrupted,
        "lost": len(found.lost),
        "doubled": len(found.doubled),
        "not exact": len(found.wrong),
        "most tokens short": found.short_tokens,
        "most seconds short": round(found.short_seconds, 3),
        "ledger verify": "passes" if is_whole else "FAILS",
    }


def aborts(num_streams: int, place: Path) -> dict[str, Any]:
    with upstream() as engine:
        service = serve(place, engine)
        try:
            told = left(service, over_sockets=num_streams * 4 // 5, by_sdks=num_streams - num_streams * 4 // 5)
            books, written = settled(service, engine)
            is_whole = verifies(service)
        finally:
            service.stop()
    wrong = differences(books, told, written)
    for problem in wrong:
        print(problem, file=sys.stderr)
    return {
        "streams left": len(told),
        "billed what the engine wrote": len(told) - len(wrong),
        "before the engine wrote anything": sum(each.number not in written for each in told),
        "tokens billed": sum(row.completion_tokens for row in books.rows),
        "ledger verify": "passes" if is_whole else "FAILS",
    }


def table(title: str, figures: dict[str, Any]) -> str:
    width = max(map(len, figures))
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in figures.items())])


def main() -> int:
    options = arguments()
    num_kills = options.kills or (5 if options.short else 30)
    num_streams = options.aborts or (200 if options.short else 1000)
    with tempfile.TemporaryDirectory(prefix="octoai-bench-") as directory:
        killed = crashes(num_kills, Path(directory) / "crashes")
        print(table("killed under load", killed), flush=True)
        aborted = aborts(num_streams, Path(directory) / "aborts")
        print(table("left by their clients", aborted), flush=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%F")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine, "crashes": killed, "aborts": aborted}, indent=1))
    is_good = not (killed["lost"] or killed["doubled"] or killed["not exact"])
    is_good = is_good and aborted["billed what the engine wrote"] == aborted["streams left"]
    return 0 if is_good and "FAILS" not in (killed["ledger verify"], aborted["ledger verify"]) else 1


if __name__ == "__main__":
    sys.exit(main())
