"""What limits and Idempotency-Keys cost a request: one service, asked in turn by callers of different kinds.

They differ in what is asked of the database before the engine, and what is waited for at the end:

    plain     an account without limits; nothing
    key       the same, each request with an Idempotency-Key of its own, as our SDK sends them
    budget    a token with a monthly budget: its money is reserved, the prompt counted by the engine
    prepaid   an account that spends its credit and no more: as budget
    rates     a token with a limit of requests a minute: those of the last minute are counted
    tokens    a token with limits of prompt and generated tokens a minute, and of requests at once

The mock engine answers at once, where all of it is on the path. The last part lets 16 clients with a limit of requests
a minute go on for over a minute, so that each request is counted among those of a whole minute.

    python bench/limits.py [--rounds 9] [--seconds 0.5] [--minute 75] [--short]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ledger import NUM_TOKENS, Served, keep, load, mock_engine

RESULTS = Path(__file__).parent / "results" / "limits.json"
MANY = "1000000000"
LIMITS = {
    "budget": ("--hard-budget", "1000000"),
    "rates": ("--requests-per-minute", MANY),
    "tokens": (
        *("--prompt-tokens-per-minute", MANY, "--completion-tokens-per-minute", MANY),
        *("--concurrent-requests", "1000"),
    ),
}
KINDS = ("plain", "key", "budget", "prepaid", "rates", "tokens")


# ---- the load: a process of its own ----


def asks(token: str, kind: str) -> Iterator[bytes]:
    messages = [{"role": "user", "content": "word " * 30}]
    text = json.dumps({"model": "mock", "messages": messages, "max_tokens": NUM_TOKENS}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {token}\r\n"
    rest = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)
    for number in itertools.count():
        key = f"idempotency-key: {os.getpid()}-{time.time_ns()}-{number}\r\n" if kind == "key" else ""
        yield (head + key).encode() + rest


# ---- in turn ----


def tokens(served: Served) -> dict[str, str]:
    """One of each kind."""
    served.run("account", "create", "prepaid", "--plan", "unlimited", "--prepaid")
    served.run("account", "credit", "prepaid", "1000000")
    made = {
        kind: served.run("token", "create", "--name", kind, *LIMITS.get(kind, ()))
        if kind != "prepaid"
        else served.run("token", "create", "--name", kind, "--account", "prepaid")
        for kind in KINDS
    }
    return {kind: said.split()[-1] for kind, said in made.items()}


def measured(served: Served, token: str, kind: str, clients: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", served.port, token, kind, str(clients), str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compared(served: Served, callers: dict[str, str], rounds: int, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for clients in (1, 16):
        seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            for kind in KINDS if number % 2 else reversed(KINDS):
                seen[kind].append(measured(served, callers[kind], kind, clients, seconds))
        for kind, turns in seen.items():
            plain = seen["plain"]
            found[f"{kind}, {clients}"] = figures = {
                **{name: statistics.median(turn[name] for turn in turns) for name in turns[0]},
                "added_p50_ms": statistics.median(a["p50_ms"] - b["p50_ms"] for a, b in zip(turns, plain, strict=True)),
                "share_of_rate": statistics.median(a["rate"] / b["rate"] for a, b in zip(turns, plain, strict=True)),
            }
            print(
                f"{kind:8} {clients:3} clients  p50 {figures['p50_ms']:6.2f} ms ({figures['added_p50_ms']:+.2f})  "
                f"p99 {figures['p99_ms']:6.2f}  requests/s {figures['rate']:5.0f} ({figures['share_of_rate']:.2f})",
                flush=True,
            )
    return found


def sustained(served: Served, token: str, kind: str, seconds: float) -> dict[str, float]:
    """With as many requests in the last minute as there can be."""
    began, turns = time.monotonic(), [measured(served, token, kind, 16, 2.0)]
    while time.monotonic() - began < seconds:
        turns.append(measured(served, token, kind, 16, 2.0))
    ends = turns[:5], turns[-5:]  # ten seconds each
    first, last = ({name: statistics.median(turn[name] for turn in some) for name in turns[0]} for some in ends)
    print(
        f"{kind}, 16 clients for {seconds:.0f} s: requests/s {first['rate']:.0f} at first, {last['rate']:.0f} at last; "
        f"p50 {first['p50_ms']:.2f} and {last['p50_ms']:.2f} ms"
    )
    return {"first_rate": first["rate"], "last_rate": last["rate"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--minute", type=float, default=75.0, help="seconds of the last part; 0 leaves it out")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--load", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        import uvloop

        port, token, kind, clients, seconds = args.load
        print(json.dumps(uvloop.run(load(int(port), asks(token, kind), int(clients), float(seconds)))))
        return
    rounds, minute = (3, 0.0) if args.short else (args.rounds, args.minute)
    with tempfile.TemporaryDirectory() as directory, mock_engine() as url:
        served = Served(Path(directory, "on"), url, "on")
        try:
            callers = tokens(served)
            found = compared(served, callers, rounds, args.seconds)
            if minute:
                for kind in ("prepaid", "rates"):
                    found[f"sustained, {kind}"] = sustained(served, callers[kind], kind, minute)
            print(served.run("ledger", "verify"))
        finally:
            served.stop()
    if not args.short:
        keep(found, RESULTS)


if __name__ == "__main__":
    main()
