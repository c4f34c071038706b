"""Our service beside other gateways over one mock engine: what each adds to a request, and what it costs.

`direct` asks the engine itself; `ours` is `octoai serve` with its ledger on; smg and vllm-router (Rust, without
accounts or metering) and LiteLLM's proxy (Python) are pinned, each in an environment of its own. Rounds are
interleaved; figures are medians, what is added and ratios are taken within a round. A wrong answer of ours fails the
script, and so does a ledger that does not have exactly what clients were answered; being slow does not.

    python bench/gateway.py [--short] [--only NAME]… [--part NAME]… [--rounds N] [--requests N] [--ours CHECKOUT]
                            [--workers N]
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gateway_candidates import PEERS, Failed, Running, Upstream, ledger_problems, start_ours
from gateway_measure import PARTS, Asked, Bench, Plan, Samples
from gateway_plot import plot
from gateway_report import bars, report

HERE = Path(__file__).parent
NAMES = ("direct", "ours", "ours-alone", "ours-unix", *PEERS)
ONLY_NAMED = ("ours-alone", "ours-unix")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds, less in each: about a minute and a half")
    parser.add_argument("--rounds", type=int, help="of speeds (default 7, short 3)")
    parser.add_argument("--requests", type=int, help="over which memory is watched (default 50000, short 2000)")
    words = "may be repeated; only where named: ours-unix (its engine on a unix socket), ours-alone (without --workers)"
    parser.add_argument("--only", action="append", choices=NAMES, help=words)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default all")
    parser.add_argument("--ours", type=Path, default=HERE.parent, metavar="CHECKOUT", help="whose .venv serves")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes of ours (default 1)")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "gateway.json", metavar="PATH")
    return parser.parse_args()


def plan(options: argparse.Namespace) -> Plan:
    parts = tuple(part for part in PARTS if part in (options.part or PARTS))
    if options.short:
        rounds, requests = options.rounds or 3, options.requests or 2000
        return Plan(parts, rounds, 0.4, (64, 256, 512), 75, requests, memory_seconds=5)
    rounds, requests = options.rounds or 7, options.requests or 50_000
    return Plan(parts, rounds, 0.5, (16, 32, 64, 128, 256, 512, 1024), 100, requests, memory_seconds=20)


def start(name: str, upstream: Upstream, place: Path, ours: Path, workers: int) -> Running:
    if name == "direct":
        return Running(name, "", upstream.port)
    if name.startswith("ours"):
        url = f"unix:{upstream.socket}" if name == "ours-unix" else f"{upstream.url}/v1"
        return start_ours(name, url, ours.absolute(), place / name, 1 if name == "ours-alone" else workers)
    return PEERS[name].start(upstream, place / name)


def started(names: list[str], ours: Path, workers: int, stack: contextlib.ExitStack) -> list[Running]:
    """Those that can be; of the others it is said why not."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    upstream = Upstream(place)
    stack.callback(upstream.close)
    gateways = []
    for name in names:
        try:
            gateway = start(name, upstream, place, ours, workers)
        except Failed as failed:
            if name.startswith("ours"):
                raise
            print(f"skipped: {failed}", file=sys.stderr)
            continue
        stack.callback(gateway.stop)
        gateways.append(gateway)
    return gateways


def problems(gateway: Running, asked: Asked) -> list[str]:
    """What is wrong with ours, in sentences. It is stopped for that: only then is everything in its ledger."""
    assert gateway.service is not None
    gateway.stop()
    found = [f"{asked.num_wrong} wrong answers: {asked.wrong}"] if asked.num_wrong else []
    if not asked.is_counted:
        found.append("answers with a usage that is not the engine's")
    return [
        f"{gateway.name}: {each}" for each in found + ledger_problems(gateway.service, asked.answers, asked.unanswered)
    ]


def measured(options: argparse.Namespace) -> tuple[Samples, dict[str, str], list[str]]:
    """What was measured, of which versions, and what was wrong with ours."""
    names = [name for name in NAMES if (name in options.only if options.only else name not in ONLY_NAMED)]
    wrong: list[str] = []
    with contextlib.ExitStack() as stack:
        gateways = started(names, options.ours, options.workers, stack)
        bench = Bench(gateways, plan(options))
        stack.callback(bench.close)
        samples = bench.measure()
        for gateway in gateways:
            asked = bench.asked[gateway.name]
            if gateway.service is not None:
                wrong += problems(gateway, asked)
                print(f"{gateway.name}: {asked.answers:,} answers, {asked.unanswered} without one", file=sys.stderr)
            elif asked.num_wrong:
                print(f"{gateway.name}: {asked.num_wrong} wrong answers: {asked.wrong}", file=sys.stderr)
        return samples, {gateway.name: gateway.version for gateway in gateways}, wrong


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was started is stopped as well
    try:
        samples, versions, wrong = measured(options)
    except Failed as failed:
        sys.exit(f"not measured: {failed}")
    names = list(versions)
    print(report(samples, names, versions))
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%F")}
    must = [{**dataclasses.asdict(bar), "line": bar.line.strip()} for bar in bars(samples, names)]
    result: dict[str, Any] = {"machine": machine, "versions": versions, "must_show": must, "wrong": wrong}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**result, **dataclasses.asdict(samples)}, indent=1))
    options.json.with_suffix(".svg").write_text(plot(samples, names))
    if wrong:
        sys.exit("\n".join(wrong))
    if any(name.startswith("ours") for name in names):
        print("ours: every answer was right, `octoai ledger verify` passes, and the ledger has each answer once")


if __name__ == "__main__":
    main()
