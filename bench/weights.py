"""Weight formats and settings of llama.cpp on this CPU: how fast, and what is lost.

Every row is a server of its own, started and measured in turn, `--rounds` times, so that all of a round's figures are
taken within minutes of each other; the first row is the file as shipped under llama.cpp's own defaults, and ratios to
it are taken within a round. Figures are medians.

    .venv/bin/python bench/weights.py formats     # one setting, every recipe
    .venv/bin/python bench/weights.py settings    # one recipe, every setting
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from octoai.optimizer.quality import Quality, Reference, exact, shipped_text
from octoai.optimizer.weights import UNCHANGED, Recipe, recipes, requantize
from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue
from octoai.server.machine.places import cache_dir
from octoai.server.sources import WeightStore

RESULTS = Path(__file__).parent / "results"
NUM_AT_ONCE, PROMPT_TOKENS, OUTPUT_TOKENS, LONG_PROMPT = 8, 180, 64, 600
MEASURES = ("first token", "decode", "at once")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how threads wait for each other: spinning, asleep, or first one
OURS = {
    "n_parallel": 8,
    "n_ctx": 8192,
    "kv_unified": True,
    "cpuparams.n_threads": 2,
    "cpuparams_batch.n_threads": 2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as libgomp waits": {},
    "asleep": {"OMP_WAIT_POLICY": "passive"},
    "spinning 10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "1 thread to decode": {"cpuparams.n_threads": 1},
    "1 thread": {"cpuparams.n_threads": 1, "cpuparams_batch.n_threads": 1},
    "no flash attention": {"flash_attn_type": 0},
    "flash attention": {"flash_attn_type": 1},
    "n_ubatch 64": {"n_ubatch": 64},
    "n_ubatch 128": {"n_ubatch": 128},
    "n_ubatch 1024": {"n_ubatch": 1024},
    "n-grams": {"speculative.types": [6], "speculative.ngram_simple.size_n": 4, "speculative.ngram_simple.size_m": 8},
    "split KV": {"kv_unified": False},
    "1 slot": {"n_parallel": 1},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """`params` are fields of CommonParams and, in capitals, variables of the environment."""

    name: str
    weights: Path
    params: Mapping[str, Any]
    quality: Quality | None = None


def child() -> None:
    """A llama.cpp server with its defaults, but for what it is told."""
    import xllamacpp

    told = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = told["weights"]
    params.hostnames = [told["socket"]]
    params.api_keys = [told["key"]]
    converters: dict[str, Any] = {
        "flash_attn_type": xllamacpp.llama_flash_attn_type,
        "types": lambda given: [xllamacpp.common_speculative_type(each) for each in given],
    }
    for name, value in told["params"].items():
        *path, last = name.split(".")
        place = params
        for each in path:
            place = getattr(place, each)
        setattr(place, last, converters.get(last, lambda given: given)(value))
    params.verbosity = told["verbosity"]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


@contextlib.asynccontextmanager
async def serving(row: Row) -> AsyncIterator[tuple[aiohttp.ClientSession, int]]:
    params = {name: value for name, value in row.params.items() if not name.isupper()}
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment = inherited | {name: value for name, value in row.params.items() if name.isupper()}
    with tempfile.TemporaryDirectory() as directory:
        socket, key = f"{directory}/engine.sock", secrets.token_hex()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        told = {"weights": str(row.weights), "socket": socket, "key": key, "params": params, "verbosity": 0}
        process.stdin.write(json.dumps(told).encode() + b"\n")
        assert await process.stdout.readline(), f"{row.name} does not start"
        connector = aiohttp.UnixConnector(socket, limit=32)
        headers = {"Authorization": f"Bearer {key}"}
        try:
            async with aiohttp.ClientSession("http://engine", connector=connector, headers=headers) as session:
                yield session, process.pid
        finally:
            process.stdin.close()
            await process.wait()


async def complete(session: aiohttp.ClientSession, prompt: list[int], num_tokens: int) -> dict[str, Any]:
    asked = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    async with session.post("/completion", json=asked) as answer:
        assert answer.status == 200, await answer.text()
        told: dict[str, Any] = await answer.json()
    assert told["tokens_predicted"] == num_tokens, told
    assert told["tokens_evaluated"] == len(prompt), told
    return told


async def measured(row: Row) -> dict[str, float]:
    """Seconds to the first token of a long prompt, tokens/s of one stream and of eight requests at once, CPU seconds
    of the eight."""
    async with serving(row) as (session, pid):
        async with session.post("/tokenize", json={"content": shipped_text() * 8}) as answer:
            tokens = (await answer.json())["tokens"]
        await complete(session, tokens[-32:], 4)
        began = time.perf_counter()
        await complete(session, tokens[:LONG_PROMPT], 1)
        first_token = time.perf_counter() - began
        told = await complete(session, tokens[100:116], OUTPUT_TOKENS + 1)
        prompts = [tokens[at : at + PROMPT_TOKENS] for at in range(200, 200 + 90 * NUM_AT_ONCE, 90)]
        cpu, began = cpu_seconds(pid), time.perf_counter()
        await asyncio.gather(*(complete(session, each, OUTPUT_TOKENS) for each in prompts))
        at_once, cpu = time.perf_counter() - began, cpu_seconds(pid) - cpu
    return {
        "first token": first_token,
        "decode": told["timings"]["predicted_per_second"],
        "at once": NUM_AT_ONCE * OUTPUT_TOKENS / at_once,
        "at once, CPU": cpu,
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rows_of(what: str, shipped: Path, place: Path, only: list[str]) -> list[Row]:
    """The shipped file under the defaults first."""
    baseline = Row("as given, defaults", shipped, {})
    found: list[Row] = []
    if what == "formats":
        with Reference(exact(shipped, place) or shipped, num_threads=2) as reference:
            for recipe in recipes(shipped):
                if recipe is UNCHANGED or not only or recipe.name in only:
                    weights = made(shipped, recipe, place)
                    found.append(Row(recipe.name, weights, OURS, reference.measure(weights)))
    else:
        best = next(each for each in recipes(shipped) if each.name == "Q8_0")
        weights = made(shipped, best, place)
        found = [Row(name, weights, OURS | params) for name, params in SETTINGS.items() if not only or name in only]
    return [baseline, *found]


def made(shipped: Path, recipe: Recipe, place: Path) -> Path:
    if recipe is UNCHANGED:
        return shipped
    target = place / f"{recipe.name.replace(' ', '_')}.gguf"
    requantize(shipped, target, recipe)
    return target


def report(rows: list[Row], figures: dict[str, list[dict[str, float]]]) -> str:
    """One line a row. Ratios are medians of ratios within a round; of the first token, the smaller the better."""
    baseline = figures[rows[0].name]
    lines = [f"{'':28}{'MB':>6}{'KL, nats':>18}{'same top':>9}" + "".join(f"{each:>22}" for each in MEASURES)]
    for row in rows:
        mine = figures[row.name]
        cells = []
        for measure, unit in zip(MEASURES, ("s", "t/s", "t/s"), strict=True):
            middle = statistics.median(each[measure] for each in mine)
            ratio = statistics.median(each[measure] / base[measure] for each, base in zip(mine, baseline, strict=True))
            cells.append(f"{middle:>9.2f} {unit:<4}({ratio:4.2f} x)")
        quality = row.quality
        lost = f"{quality.kl_nats:>9.4f} ± {quality.kl_error:.4f}" if quality else ""
        same = f"{quality.same_top:.1%}" if quality else ""
        size = row.weights.stat().st_size / 1e6
        lines.append(f"{row.name:<28}{size:>6.0f}{lost:>18}{same:>9}" + "".join(f"{each:>22}" for each in cells))
    return "\n".join(lines)


async def rounds(rows: list[Row], number: int) -> dict[str, list[dict[str, float]]]:
    """What there is so far is printed after every round."""
    figures: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    for each in range(number):
        for row in rows if each % 2 == 0 else reversed(rows):
            figures[row.name].append(await measured(row))
        print(f"rounds: {each + 1}\n{report(rows, figures)}", flush=True)
    return figures


def main() -> None:
    if sys.argv[1:] == ["--child"]:
        child()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("formats", "settings"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows to measure")
    asked = parser.parse_args()
    shipped = WeightStore(cache_dir(os.environ)).pull(Catalogue.load()[EMBEDDED_MODEL_ID])
    with tempfile.TemporaryDirectory() as place:
        rows = rows_of(asked.what, shipped, Path(place), asked.only)
        figures = asyncio.run(rounds(rows, asked.rounds))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"weights-{asked.what}.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
