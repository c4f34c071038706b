"""One candidate, measured in a child engine of its own on the real model.

The requantized files are made here too, in a directory of the search's own, when a candidate first needs one. A child
that crashes, hangs or cannot load its weights is a `TrialFailed`, never more.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

from octoai.optimizer.outcome import TrialFailed
from octoai.optimizer.quality import MAX_POSITIONS, READ_SECONDS, Quality, Reference, exact
from octoai.optimizer.space import AS_GIVEN, Candidate
from octoai.optimizer.weights import UnusableWeights, num_bytes, recipes, requantize
from octoai.optimizer.workload import NotMeasured, Passages, Speed, Workload, joint_rate, measure
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.errors import Refusal

TRIAL_SECONDS = 60.0
LATE_SECONDS = 10.0  # that a trial may always take: an engine has to start first
COMPANY_SHARE = 1 / 8
_GLANCE_POSITIONS = 48  # enough to see that a format loses ten times what it may
_COLLAPSED = 4.0  # as long as alone: no need to wait for more
# It ends by itself when we are gone: its input is closed then.
_BUSY = "import select, sys\nwhile not select.select([sys.stdin], [], [], 0)[0]:\n    sum(range(100000))"


@contextmanager
def _for_this_time() -> Iterator[None]:
    """No process, thread or memory, as beside a service under a limit, is a failed trial: there may be one again."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        raise TrialFailed(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


class Bench:
    """Measures candidates for one file of weights. `directory` is empty and the search's own. Use it as a context
    manager: what quality is compared with lies on disk meanwhile. A trial may take `trial_seconds`, but not longer than
    until `ends_at`, by the monotonic clock, or `LATE_SECONDS` where that is near or over. To measure a loss may take
    until `ends_at`, and as long as a trial in any case."""

    def __init__(
        self,
        source: Path,
        directory: Path,
        *,
        context_length: int,
        num_threads: int,
        trial_seconds: float = TRIAL_SECONDS,
        ends_at: float = math.inf,
    ) -> None:
        self.source = source
        self._directory = directory
        self._context_length = context_length
        self._num_threads = num_threads
        self._trial_seconds = trial_seconds
        self._ends_at = ends_at
        made = sorted(recipes(source), key=lambda recipe: -num_bytes(source, recipe))
        self._recipes = {each.name: each for each in made}
        self._exact: Path | None = None
        self._references: dict[int, Reference] = {}
        self._stack = ExitStack()
        self._unusable: dict[str, str] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def recipe_names(self) -> list[str]:
        """From the largest to the smallest."""
        return list(self._recipes)

    @property
    def is_exact(self) -> bool:
        """Whether losses were measured from what the weights as given say exactly."""
        return self._exact is not None

    @_for_this_time()
    def weights(self, name: str) -> Path:
        """The file of the recipe of that name, made first if need be. Raises TrialFailed."""
        if name == AS_GIVEN:
            return self.source
        path = self._directory / f"{list(self._recipes).index(name)}.gguf"
        if name in self._unusable:
            raise TrialFailed(self._unusable[name])
        if not path.is_file():
            try:
                requantize(self.source, path, self._recipes[name], num_threads=self._num_threads)
            except UnusableWeights as error:
                self._unusable[name] = str(error)
                raise TrialFailed(str(error)) from None
        return path

    @_for_this_time()
    def speed(
        self, candidate: Candidate, share: float, turn: int, max_seconds: float | None = None
    ) -> tuple[Speed, int]:
        weights = self.weights(candidate.weights)
        seconds = self._limit(max_seconds)
        return asyncio.run(self._measured(candidate, weights, share, turn, seconds))

    @_for_this_time()
    def loss(self, candidate: Candidate, bound: float | None = None) -> Quality:
        path, kernels = self.weights(candidate.weights), candidate.tuning.kernels
        try:
            if bound is not None:
                glance = self._compared_to(_GLANCE_POSITIONS).measure(path, kernels, self._patience)
                if abs(glance.kl_nats - bound) > 3 * glance.kl_error:
                    return glance
            return self._compared_to(MAX_POSITIONS).measure(path, kernels, self._patience)
        except UnusableWeights as error:
            raise TrialFailed(str(error)) from None

    def _limit(self, max_seconds: float | None) -> float:
        """What a trial that begins now may take."""
        left = max(LATE_SECONDS, self._ends_at - time.monotonic())
        return min(max_seconds or self._trial_seconds, self._trial_seconds, left)

    @property
    def _patience(self) -> float | None:
        left = max(self._trial_seconds, self._ends_at - time.monotonic())
        return left if math.isfinite(left) else None

    def _compared_to(self, num_positions: int) -> Reference:
        """What the weights as given say, read once: exactly, or where that is too much, as llama.cpp computes it."""
        if not self._references:
            self._exact = exact(self.source, self._directory, num_threads=self._num_threads)
        if num_positions not in self._references:
            given = self._exact or self.source
            made = Reference(
                given,
                max_positions=num_positions,
                num_threads=self._num_threads,
                directory=self._directory,
                # It ends its reading by itself; this is for loading, and for what hangs.
                patience=None if self._patience is None else READ_SECONDS + self._patience,
            )
            self._references[num_positions] = self._stack.enter_context(made)
        return self._references[num_positions]

    @_for_this_time()
    def steadiness(self, candidate: Candidate, max_seconds: float | None = None) -> float:
        weights = self.weights(candidate.weights)
        seconds = self._limit(max_seconds)
        return asyncio.run(self._beside_another(candidate, weights, seconds))

    async def _measured(
        self, candidate: Candidate, weights: Path, share: float, turn: int, seconds: float
    ) -> tuple[Speed, int]:
        async with self._engine(candidate, weights, seconds) as engine:
            speed = await measure(engine, self._part(share, engine), Passages(turn))
            return speed, _peak_memory_bytes(engine.pid)

    async def _beside_another(self, candidate: Candidate, weights: Path, seconds: float) -> float:
        async with self._engine(candidate, weights, seconds) as engine:
            workload, passages = self._part(COMPANY_SHARE, engine), Passages(0)
            prompts = [await passages.take(engine, workload.prompt) for _ in range(3 * workload.num_requests)]
            groups = [prompts[first::3] for first in range(3)]
            await joint_rate(engine, groups[0], workload.completion)  # a first run is slower
            alone = await joint_rate(engine, groups[1], workload.completion)
            seconds = workload.num_requests * workload.completion / alone
            with busy_process():
                try:
                    async with asyncio.timeout(seconds * _COLLAPSED):
                        return await joint_rate(engine, groups[2], workload.completion) / alone
                except TimeoutError:
                    return 1 / _COLLAPSED

    def _part(self, share: float, engine: LlamaEngine) -> Workload:
        """A model may have learned less context than the service would give it: the engine has no more then."""
        return Workload().part(share).within(self._context_length).within(engine.context_length)

    @asynccontextmanager
    async def _engine(self, candidate: Candidate, weights: Path, seconds: float) -> AsyncIterator[LlamaEngine]:
        """Running, for as long as a trial may take. Raises TrialFailed for what goes wrong in it."""
        options = replace(candidate.options, context_length=self._context_length, stall_seconds=2 * seconds)
        engine = LlamaEngine(weights, model="trial", options=options)
        try:
            async with AsyncExitStack() as stack, asyncio.timeout(seconds):
                stack.push_async_callback(engine.close)
                await engine.start()
                if engine.options != options:
                    raise TrialFailed("the kernels compiled for this CPU do not run on it")
                yield engine
        except TimeoutError:
            raise TrialFailed(f"not done in {seconds:.0f} s") from None
        except (Refusal, NotMeasured, OSError) as error:
            raise TrialFailed(getattr(error, "message", str(error))) from None


@contextmanager
def busy_process() -> Iterator[None]:
    """Another program that computes all the time."""
    command = [sys.executable, "-P", "-c", _BUSY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:  # noqa: S603  # our own text
        try:
            yield
        finally:
            process.kill()


def _peak_memory_bytes(pid: int | None) -> int:
    """Of a running process; 0 where the kernel does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return 0
    peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), "0")
    return int(peak) * 1024
