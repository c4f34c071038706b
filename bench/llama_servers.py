"""llama.cpp as our engine runs it, and its server with its own defaults, behind the same interface and client.

Run as a program it is the child of the latter: CommonParams untouched but for the model's path, the unix socket, the
key, and `n_parallel = -1`, which is what `llama-server` itself has (four slots). CommonParams has 1, with which
nobody's prompt is ever read while somebody else streams: there is nothing to share, and nothing to be fair about.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from octoai.optimizer.profile import Profiles
from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue
from octoai.server.engines.base import Engine, Finished, Generation, Started, Usage
from octoai.server.engines.llama.cache_size import num_slots
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.options import LlamaOptions
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.machine.places import cache_dir
from octoai.server.sources import WeightStore

KEY = "bench"
CONTEXT = 8192
PREFIX_BYTES = 2**30


@dataclass(frozen=True)
class Answer:
    """Seconds from the request to its first token, and what the engine counted."""

    first: float
    usage: Usage


def weights() -> Path:
    return WeightStore(cache_dir(os.environ)).pull(Catalogue.load()[EMBEDDED_MODEL_ID])


@asynccontextmanager
async def ours(place: Path, profiles: Path | None = None) -> AsyncIterator[Engine]:
    """As the service runs it, with the profile that `octoai optimize` kept in the cache `profiles`, if there is one;
    `place` keeps what is saved of prompts."""
    file = weights()
    options = LlamaOptions(CONTEXT, num_slots=num_slots(file, CONTEXT))
    if profiles is not None:
        found = Profiles(profiles).find(file)
        if found is None:
            sys.exit(f"{profiles} has no profile for {file.name} on this machine: it is the cache of `octoai optimize`")
        options, file = found[0].candidate.options, found[1]
    options = replace(
        options, context_length=CONTEXT, prefix_dir=place / "prefixes", prefix_bytes=PREFIX_BYTES, stall_seconds=300
    )
    engine = LlamaEngine(file, model="m", options=options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def defaults() -> AsyncIterator[Engine]:
    with tempfile.TemporaryDirectory() as directory:
        socket = f"{directory}/engine.sock"
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, str(weights()), socket),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        engine = OpenAIEngine(f"unix:{socket}", model="m", dialect="llama.cpp", key=KEY)
        try:
            assert child.stdout is not None
            if await child.stdout.readline() != b"listening\n":
                raise RuntimeError("llama.cpp's server did not start")
            await engine.connect()
            yield engine
        finally:
            await engine.close()
            child.kill()
            await child.wait()


async def answered(engine: Engine, generation: Generation) -> Answer:
    began, first, usage = time.perf_counter(), 0.0, Usage()
    async with aclosing(engine.generate(generation)) as batches:
        async for batch in batches:
            for event in batch:
                if isinstance(event, Started):
                    first = time.perf_counter() - began
                elif isinstance(event, Finished):
                    usage = event.usage
    return Answer(first, usage)


def num_computed(answers: Sequence[Answer]) -> int:
    return sum(answer.usage.prompt_tokens - answer.usage.cached_tokens for answer in answers)


def _serve(path: str, socket: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.hostnames = [socket]
    params.api_keys = [KEY]
    params.n_parallel = -1
    server = xllamacpp.Server(params)
    print("listening", flush=True)
    os.dup2(2, 1)
    sys.stdin.read()
    del server
    os._exit(0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
