"""What is left of the engine's own speed when it is asked through the service: `octoai serve` over its llama.cpp child,
beside that same child asked directly over its own HTTP server.

Both are asked the same in turn, by one client in a process of its own: 8 requests at once (180 + 64 tokens), and one
stream. It is one child under one set of settings, so that nothing differs but the way there. A ratio is that of two
turns that follow each other, each of a second or a few: neighbours of the machine change its speed within minutes by
more than what is looked for. The order changes from turn to turn; figures are medians. Steadier than the ratio is the
processor time of the service's own threads for a token (Linux); what they take while the child is asked directly is
what they take anyway.

    python bench/engine_share.py [--short] [--rounds N] [--json PATH]
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles

from octoai.optimizer.workload import Passages, Workload, joint_rate, stream_rate
from octoai.server.catalogue import EMBEDDED_MODEL_ID
from octoai.server.engines.base import Engine
from octoai.server.engines.openai import engine as openai_http
from octoai.server.engines.openai.engine import OpenAIEngine

HERE = Path(__file__).parent
LEAST = 0.98
NUM_STREAMS = 5  # one after the other, in a round
Samples = dict[str, dict[str, list[float]]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="11 rounds of a quarter of the lengths: about half a minute"
    )
    parser.add_argument("--rounds", type=int, help="default 9, short 11")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "engine_share.json", metavar="PATH")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def serve() -> None:
    """`octoai serve`, which also says where its child listens and with which key: nobody else is to know."""
    from octoai.cli import main
    from octoai.server.engines.llama.engine import LlamaEngine

    start = LlamaEngine.start

    async def started(engine: LlamaEngine) -> None:
        await start(engine)
        http = engine._http
        assert http is not None
        key = http._pool._headers.partition("Bearer ")[2].strip()
        print(json.dumps({"url": http.url, "key": key}), flush=True)

    LlamaEngine.start = started  # type: ignore[method-assign]
    sys.exit(main(["serve", "--port", "0"]))


@contextmanager
def served() -> Iterator[tuple[int, dict[str, Engine]]]:
    """The service's process, and both ways to its one child."""
    with tempfile.TemporaryDirectory() as place:
        environ = {
            **os.environ,
            "OCTOAI_CONFIG_DIR": place,
            "OCTOAI_DATA_DIR": f"{place}/data",
            "OCTOAI_LOG_LEVEL": "warning",
        }
        command = [sys.executable, __file__, "--serve"]
        process = subprocess.Popen(command, cwd=place, env=environ, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            token, child, url = "", {}, ""
            for line in process.stdout:
                if line.startswith("{"):
                    child = json.loads(line)
                elif "shown once:" in line:
                    token = line.rsplit(" ", 1)[1].strip()
                elif "ready on" in line:
                    url = line.rsplit(" ", 1)[1].strip()
                    break
            direct = OpenAIEngine(child["url"], model=EMBEDDED_MODEL_ID, dialect="llama.cpp", key=child["key"])
            ours = OpenAIEngine(f"{url}/v1", model=EMBEDDED_MODEL_ID, dialect="vllm", key=token)
            yield process.pid, {"direct": direct, "ours": ours}
        finally:
            process.terminate()
            process.wait(30)


def cpu_us(pid: int) -> float:
    """Of all threads of a process so far; 0 where the kernel does not say."""
    ran = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # it has ended
            ran += int(thread.read_text().split()[0])
    return ran / 1000


async def measured(pid: int, engines: dict[str, Engine], rounds: int, workload: Workload) -> tuple[Samples, Samples]:
    """Tokens a second, and microseconds of the service's processor time for a token."""
    figures = {"8 at once": workload.num_requests * workload.completion, "one stream": workload.stream}
    rates: Samples = {figure: {name: [] for name in engines} for figure in figures}
    times: Samples = {figure: {name: [] for name in engines} for figure in figures}
    passages, counter = Passages(2000), engines["direct"]

    async def joint(engine: Engine) -> float:
        prompts = [await passages.take(counter, workload.prompt) for _ in range(workload.num_requests)]
        return await joint_rate(engine, prompts, workload.completion)

    async def stream(engine: Engine) -> float:
        return await stream_rate(engine, await passages.take(counter, 16), workload.stream)

    turns = [("8 at once", joint), *[("one stream", stream)] * NUM_STREAMS]
    for number in range(rounds + 1):
        for turn, (figure, rate) in enumerate(turns):
            for name in sorted(engines, reverse=(number + turn) % 2 == 1):
                before, measured = cpu_us(pid), await rate(engines[name])
                if number:  # the first warms up
                    rates[figure][name].append(measured)
                    times[figure][name].append((cpu_us(pid) - before) / figures[figure])
    for engine in engines.values():
        await engine.close()
    return rates, times


def ratios(samples: Samples, figure: str) -> list[float]:
    pairs = zip(samples[figure]["ours"], samples[figure]["direct"], strict=True)
    return [ours / direct for ours, direct in pairs]


def report(samples: Samples, times: Samples) -> str:
    lines = [f"{'tokens/s':14}{'direct':>10}{'ours':>10}{'service, us a token':>22}{'at rest':>10}"]
    for figure, by_name in samples.items():
        rates = f"{median(by_name['direct']):>10.1f}{median(by_name['ours']):>10.1f}"
        spent = f"{median(times[figure]['ours']):>22.0f}{median(times[figure]['direct']):>10.0f}"
        lines.append(f"{figure:14}{rates}{spent}")
    lines.append("\nmust show")
    for figure in samples:
        found = ratios(samples, figure)
        verdict = "ok  " if median(found) >= LEAST else "MISS"
        quarters = quantiles(found, n=4)
        spread = f"half of {len(found)} within {quarters[0]:.3f} to {quarters[2]:.3f}"
        lines.append(f"  {verdict} {median(found):6.3f}  (at least {LEAST:g}; {spread})  {figure}, ours over direct")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    if options.serve:
        serve()
    openai_http.STREAM_GATHER_SECONDS = 0.0  # anybody else's client reads what comes when it comes
    workload = Workload().part(1 / 4) if options.short else Workload()
    with served() as (pid, engines):
        rounds = options.rounds or (11 if options.short else 9)
        samples, times = asyncio.run(measured(pid, engines, rounds, workload))
    print(report(samples, times))
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%F")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine, "samples": samples, "service_us": times}, indent=1))


if __name__ == "__main__":
    main()
