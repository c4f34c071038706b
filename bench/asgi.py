"""Which HTTP server and framework carry a request cheapest, and how each behaves at the edges of a stream.

Every candidate serves the same routes from a process of its own on a loopback port; the load comes from
another process (raw asyncio protocols that count bytes). Rounds are interleaved, after one that is not
counted; figures are medians, ratios are taken within a round. Knows nothing of the project: it measures what
the project stands on.

    python bench/asgi.py [--rounds 5] [--seconds 1] [--only NAME]…
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asgi_load import behaviour, connect, run_load, whole_answer
from asgi_servers import CANDIDATES, EVENT, HOST, NUM_EVENTS


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def wait_until_answering(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            connect(port).close()
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"server did not start: {process.args}")


@contextlib.contextmanager
def server(name: str) -> Iterator[tuple[int, int]]:
    """The candidate in a process group of its own: port and group."""
    port = free_port()
    command = [sys.executable, __file__, "--serve", name, str(port)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True)
    try:
        wait_until_answering(process, port)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(group: int) -> float:
    """User and system time of every process in the group."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(port: int, group: int, path: str, clients: int, seconds: float) -> dict[str, float]:
    whole = whole_answer(port, path)
    size = len(whole) if path == "/plain" else 0
    if b" 200 " not in whole[:20] or (path == "/stream" and whole.count(EVENT) != NUM_EVENTS):
        raise RuntimeError(f"wrong answer at {path}: {whole[:300]!r}")
    before = cpu_seconds(group)
    command = [sys.executable, __file__, "--load", str(port), path, str(size), str(clients), str(seconds)]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=seconds + 30).stdout)
    # The load also runs 0.1 s of warm-up, whose CPU time is in the difference.
    figures["cpu_us"] = (cpu_seconds(group) - before) * 1e6 / (figures["rate"] * (seconds + 0.1))
    return figures


def measure_all(port: int, group: int, seconds: float) -> dict[str, float]:
    one = measure(port, group, "/plain", 1, seconds)
    many = measure(port, group, "/plain", 16, seconds)
    streams = measure(port, group, "/stream", 16, seconds)
    return {
        "p50 ms, 1 client": one["p50_ms"],
        "requests/s, 16": many["rate"],
        "CPU us/request": many["cpu_us"],
        "events/s, 16": streams["rate"] * NUM_EVENTS,
        "CPU us/event": streams["cpu_us"] / NUM_EVENTS,
    }


def run(names: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    edges = {}
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(server(name)) for name in names}
        for name in names:  # a warm-up
            measure_all(*running[name], min(seconds, 0.2))
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                samples[name].append(measure_all(*running[name], seconds))
            print(f"round {number + 1}/{rounds}", file=sys.stderr)
        for name, (port, _) in running.items():
            edges[name] = behaviour(port)
    return {"samples": samples, "behaviour": edges}


def medians(samples: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Per candidate and figure: the median, and that of its ratio to the first candidate in a round."""
    base = next(iter(samples.values()))
    return {
        name: {
            key: (
                statistics.median(each[key] for each in rounds),
                statistics.median(each[key] / first[key] for each, first in zip(rounds, base, strict=True)),
            )
            for key in rounds[0]
        }
        for name, rounds in samples.items()
    }


def show(result: dict[str, Any]) -> None:
    table = result["medians"]
    width = max(map(len, table)) + 2
    print(" " * width + "".join(f"{key:>24}" for key in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{name:<{width}}" + "".join(f"{value:>15,.2f} ({ratio:4.2f}x)" for value, ratio in row.values()))
    print("\nratios: to the first row, within a round\n")
    for question in next(iter(result["behaviour"].values())):
        print(question)
        for name, answers in result["behaviour"].items():
            print(f"    {name:<{width}}{answers[question]}")


def installed(names: list[str]) -> list[str]:
    present = []
    for name in names:
        missing = [need for need in CANDIDATES[name].needs if importlib.util.find_spec(need) is None]
        if missing:
            print(f"skipped: {name} (not installed: {', '.join(missing)})")
        else:
            present.append(name)
    return present


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per workload, candidate and round")
    parser.add_argument("--only", action="append", choices=list(CANDIDATES), help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "asgi.json")
    options = parser.parse_args()
    names = installed(options.only or list(CANDIDATES))
    if not names:
        parser.error("no candidate is installed")
    result = run(names, options.rounds, options.seconds)
    result["medians"] = medians(result["samples"])
    result["machine"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%F"),
    }
    show(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", name, port]:
            logging.disable(logging.CRITICAL)
            CANDIDATES[name].serve(CANDIDATES[name].app, int(port))
        case ["--load", *arguments]:
            run_load(arguments)
        case _:
            main()
