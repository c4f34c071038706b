"""What `octoai optimize` finds, beside llama.cpp's own server with its own defaults on the file as shipped.

Kernels for this CPU are compiled where there is a compiler; then two searches, within 0.005 nats and within 0.5, kept
in `--cache` and not repeated while the engine is the same; then all three engines run side by side and are asked the
same in turn: a prompt of 600 tokens, one stream, 8 requests at once (180 + 64 tokens). Figures are medians, ratios are
taken within a round. At the end of each round 8 requests at once are measured again while another process takes a core.

    python bench/optimizer.py [--short] [--rounds N] [--share X] [--seconds S] [--search-only] [--cache DIR] [--json F]
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

from llama_servers import CONTEXT, defaults, weights
from octoai.optimizer import kernels
from octoai.optimizer.optimization import Wish, optimize
from octoai.optimizer.outcome import Bounds
from octoai.optimizer.profile import Profile, Profiles
from octoai.optimizer.trial import busy_process
from octoai.optimizer.workload import Passages, Workload, first_token_seconds, joint_rate, stream_rate
from octoai.server.engines.base import Engine
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.openai import engine as openai_http

LOSSES = {"ours": 0.005, "ours, 0.5 nats": 0.5}
NUM_STREAMS = 3  # a round: a stream is short
MUST = (  # figure, engine, at least (or, for times, at most)
    ("8 at once, x the defaults", "joint", "ours", 1.8),
    ("8 at once, x the defaults, 0.5 nats", "joint", "ours, 0.5 nats", 2.3),
    ("one stream, x the defaults", "stream", "ours", 1.2),
    ("one stream, x the defaults, 0.5 nats", "stream", "ours, 0.5 nats", 1.5),
    ("first token of 600, x the defaults", "first", "ours", 0.55),
    ("8 at once while a core is taken, x idle", "company", "ours", 0.45),
)

Samples = dict[str, dict[str, list[float]]]


def arguments() -> argparse.Namespace:
    here = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="one search of 40 seconds, a part of each length: 2 minutes"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, help="of the lengths above that is measured (default 1, short 1/4)")
    parser.add_argument("--seconds", type=float, help="for each search (default 120, short 40)")
    parser.add_argument("--search-only", action="store_true", help="only the searches, whose results are kept")
    parser.add_argument("--cache", type=Path, default=here / "optimizer", metavar="DIR")
    parser.add_argument("--json", type=Path, default=here / "optimizer.json", metavar="PATH")
    return parser.parse_args()


def with_kernels(place: Path) -> None:
    """Compile them before the search, whose time is then the same whether they were there or not."""
    profiles = Profiles(place)
    path = profiles.kernels_path(kernels.RECIPE)
    if not path.is_file():
        try:
            work, num_cores = place / "making", os.cpu_count() or 1
            kernels.make(path, profiles.engine, work=work, num_threads=num_cores, environ=os.environ)
        except kernels.NoKernels as error:
            print(error, file=sys.stderr)


def has_others(path: Path) -> bool:
    """Kernels that were made in another way, and none as these are made."""
    return not path.is_file() and any(path.parent.glob("*.so"))


def searched(source: Path, cache: Path, seconds: float, names: list[str]) -> None:
    for name in names:
        place = cache / str(LOSSES[name])
        if Profiles(place).find(source) is None or has_others(Profiles(place).kernels_path(kernels.RECIPE)):
            with_kernels(place)
            wish = Wish(CONTEXT, seconds=seconds, bounds=Bounds(max_loss=LOSSES[name]))
            optimize(source, place, wish, lambda trial: print(".", end="", file=sys.stderr, flush=True))


async def measured(source: Path, found: dict[str, tuple[Profile, Path]], rounds: int, workload: Workload) -> Samples:
    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {"defaults": await stack.enter_async_context(defaults())}
        for name, (profile, file) in found.items():
            options = replace(profile.candidate.options, context_length=CONTEXT, stall_seconds=120)
            engine = LlamaEngine(file, model="m", options=options)
            stack.push_async_callback(engine.close)
            await engine.start()
            engines[name] = engine
        samples: Samples = {
            figure: {name: [] for name in engines} for figure in ("first", "stream", "joint", "company")
        }
        for number in range(rounds + 1):
            one = {figure: {name: [] for name in engines} for figure in samples}
            await one_round(engines, number, one, workload if number else workload.part(1 / 8))
            if number:  # the first warms up
                for figure, by_name in one.items():
                    for name, values in by_name.items():
                        samples[figure][name] += values
        return samples


async def one_round(engines: dict[str, Engine], number: int, samples: Samples, workload: Workload) -> None:
    passages = Passages(1000 + number)
    counter = engines["defaults"]
    long_prompt = await passages.take(counter, workload.long_prompt)
    for name, engine in engines.items():
        samples["first"][name].append(await first_token_seconds(engine, long_prompt))
    for _ in range(NUM_STREAMS):
        short = await passages.take(counter, 16)
        for name, engine in engines.items():
            samples["stream"][name].append(await stream_rate(engine, short, workload.stream))
    prompts = [await passages.take(counter, workload.prompt) for _ in range(workload.num_requests)]
    for name, engine in engines.items():
        samples["joint"][name].append(await joint_rate(engine, prompts, workload.completion))
    again = [await passages.take(counter, workload.prompt) for _ in range(workload.num_requests)]
    with busy_process():
        beside = await joint_rate(engines["ours"], again, workload.completion)
    samples["company"]["ours"].append(beside / samples["joint"]["ours"][-1])


def ratios(samples: Samples, figure: str, name: str) -> list[float]:
    if figure == "company":
        return samples[figure][name]
    pairs = zip(samples[figure][name], samples[figure]["defaults"], strict=True)
    return [ours / defaults for ours, defaults in pairs]


def report(samples: Samples, found: dict[str, tuple[Profile, Path]]) -> tuple[str, list[dict[str, object]]]:
    lines = [f"{name}: {profile.candidate}; {loss(profile)}" for name, (profile, _) in found.items()]
    lines.append(f"\n{'':18}{'first token':>20}{'one stream':>16}{'8 at once':>16}")
    for name in ("defaults", *found):
        first, stream, joint = (median(samples[figure][name]) for figure in ("first", "stream", "joint"))
        lines.append(f"{name:18}{first:>18.2f} s{stream:>10.1f} tok/s{joint:>10.1f} tok/s")
    lines.append("\nmust show")
    bars: list[dict[str, object]] = []
    for text, figure, name, bound in MUST:
        if name not in found:
            continue
        values = ratios(samples, figure, name)
        value = median(values)
        holds = value <= bound if figure == "first" else value >= bound
        word = "at most" if figure == "first" else "at least"
        lines.append(
            f"  {'ok  ' if holds else 'MISS'} {value:6.2f}  ({word} {bound:g}; "
            f"rounds {min(values):.2f} to {max(values):.2f}, {len(values)})  {text}"
        )
        bars.append({"text": text, "value": value, "bound": bound, "holds": holds})
    return "\n".join(lines), bars


def loss(profile: Profile) -> str:
    if profile.kl_nats is None:
        return "nothing lost"
    return f"{profile.kl_nats:.5f} nats, the most likely token the same at {profile.same_top or 0:.1%} of positions"


def main() -> None:
    openai_http.STREAM_GATHER_SECONDS = 0.0  # anybody else's client reads what comes when it comes
    options = arguments()
    source = weights()
    names = ["ours"] if options.short else list(LOSSES)
    cache = options.cache.with_name("optimizer-short") if options.short else options.cache
    searched(source, cache, options.seconds or (40 if options.short else 120), names)
    found = {name: profile for name in names if (profile := Profiles(cache / str(LOSSES[name])).find(source))}
    if options.search_only:
        print("\n".join(f"{name}: {profile}; {loss(profile)}" for name, (profile, _) in found.items()))
        return
    if "ours" not in found:
        print("nothing better was found than what a service does without a profile: there is nothing to compare")
        return
    workload = Workload().part(options.share or (1 / 4 if options.short else 1))
    samples = asyncio.run(measured(source, found, options.rounds, workload))
    text, bars = report(samples, found)
    print(text)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%F")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine, "must_show": bars, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()
