"""Our SDK beside its peers: cold start, CPU per streamed chunk and per request, many streams, memory.

Each SDK has an environment of its own (made on the first run, kept in `bench/.venvs/`) and is measured in processes of
its own against a raw loopback server with fixed bytes. Rounds are interleaved; figures are medians, ratios are taken
within a round. A peer that fails, by a wrong text or by none for minutes, is left out from then on, and that is said;
where ours fails, the script does. Being slow fails nobody.

    python bench/sdk.py [--short] [--rounds N] [--requests N] [--only NAME]… [--json PATH]
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path

from sdk_measure import Plan, measure
from sdk_peers import PEERS, Peer, distributions, prepare
from sdk_report import bars, report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds, less in each: about two minutes")
    parser.add_argument("--rounds", type=int, help="of cold starts and calls (default 9, short 3)")
    parser.add_argument("--requests", type=int, help="over which memory is watched (default 2000, short 500; 0: not)")
    parser.add_argument("--only", action="append", choices=[peer.name for peer in PEERS], help="may be repeated")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "sdk.json", metavar="PATH")
    return parser.parse_args()


def chosen(only: list[str] | None) -> list[Peer]:
    return [peer for peer in PEERS if (peer.name in only if only else not peer.optional)]


def plan(options: argparse.Namespace) -> Plan:
    rounds = options.rounds or (3 if options.short else 9)
    requests = options.requests if options.requests is not None else (500 if options.short else 2000)
    return Plan(cold_rounds=rounds, call_rounds=rounds, requests=requests)


def main() -> None:
    options = arguments()
    peers = chosen(options.only)
    for peer in peers:
        prepare(peer)
    names = [peer.name for peer in peers]
    packages = {peer.name: distributions(peer) for peer in peers}
    samples = measure(peers, plan(options))
    print(report(samples, names, packages))
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%F")}
    must = [dataclasses.asdict(bar) for bar in bars(samples, names, packages)]
    result = {"machine": machine, "packages": packages, "must_show": must, **dataclasses.asdict(samples)}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1))
    if "ours" in samples.failed:
        sys.exit(samples.failed["ours"])


if __name__ == "__main__":
    main()
