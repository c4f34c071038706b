"""What a change of format does to what a model says, measured: how far its next-token distributions move.

A text that is shipped for it is read once through the weights as given and once through the candidate, and at every
position the whole distributions are compared: nothing is sampled or cut off. Knows nothing of speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from octoai.optimizer.weights import Recipe, UnusableWeights, is_changed, num_bytes, requantize
from octoai.server.engines.llama.cache_size import memory_bytes

MAX_POSITIONS = 400
READ_SECONDS = 60.0
EXACT = Recipe("exact", (("*", "F16"),))
_MEMORY_PARTS = 2  # of one of which exact weights must not take more
_ROWS_A_STEP = 16


@dataclass(frozen=True, slots=True)
class Quality:
    """How a candidate differs from the weights as given.

    `kl_nats` is the mean over positions of KL(as given || candidate) of the next-token distribution, `kl_error` the
    standard error of that mean, `same_top` the share of positions whose most likely token stays the same.
    """

    kl_nats: float
    kl_error: float
    same_top: float
    num_positions: int


def exact(source: Path, directory: Path, *, num_threads: int = 0) -> Path | None:
    """The weights as given in F16, made in `directory` if they are not: quantized ones are multiplied with activations
    that are rounded to 8 bits, which moves distributions as far as a good format does, these are not. None where that
    takes too much memory or disk, or llama.cpp cannot read a format. Raises UnusableWeights for what is no model."""
    if not is_changed(source, EXACT):
        return source
    if num_bytes(source, EXACT) > memory_bytes() // _MEMORY_PARTS:
        return None
    try:
        requantize(source, directory / "exact.gguf", EXACT, num_threads=num_threads)
    except UnusableWeights:
        return None
    return directory / "exact.gguf"


class Reference:
    """What the weights as given say, kept on disk to compare candidates with. Use it as a context manager.

    `directory` is where; it has to exist as long. The text is read up to `max_positions`, or until `max_seconds` have
    passed, in which case all candidates are compared over the fewer positions read by then. Raises UnusableWeights,
    also where this takes longer than `patience` seconds.
    """

    def __init__(
        self,
        weights: Path,
        *,
        max_positions: int = MAX_POSITIONS,
        max_seconds: float = READ_SECONDS,
        num_threads: int = 1,
        text: str | None = None,
        directory: Path | None = None,
        patience: float | None = None,
    ) -> None:
        self._text = shipped_text() if text is None else text
        self._num_threads = num_threads
        self._num_read = 0
        self._directory = tempfile.TemporaryDirectory(prefix="octoai-", dir=directory)
        try:
            self._given = self._distributions(weights, max_positions, max_seconds, patience=patience)
        except BaseException:
            self._directory.cleanup()
            raise

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._directory.cleanup()

    @property
    def num_positions(self) -> int:
        return len(self._given)

    def measure(self, candidate: Path, kernels: Path | None = None, patience: float | None = None) -> Quality:
        """Takes about as long as the candidate takes to read the text, with the kernels of the wheel or others. Raises
        UnusableWeights."""
        found = self._distributions(candidate, self.num_positions, float("inf"), kernels, patience)
        try:
            if found.shape != self._given.shape:
                raise UnusableWeights(f"{candidate} has another vocabulary than the weights as given")
            return compared(self._given, found)
        finally:
            _path_of(found).unlink()

    def _distributions(
        self,
        weights: Path,
        max_positions: int,
        max_seconds: float,
        kernels: Path | None = None,
        patience: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Log probabilities, (positions, tokens), mapped from a file."""
        self._num_read += 1
        output = Path(self._directory.name, f"{self._num_read}.f32")
        options = {
            "weights": str(weights),
            "text": self._text,
            "output": str(output),
            "max_positions": max_positions,
            "max_seconds": max_seconds,
            "num_threads": self._num_threads,
            "kernels": str(kernels or ""),
        }
        said = _run_child(options, weights, patience)
        shape = (said["num_positions"], said["num_tokens"])
        return np.memmap(output, np.float32, mode="r", shape=shape)


def compared(given: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> Quality:
    """Both are log probabilities, (positions, tokens). Raises UnusableWeights where some are not numbers, in either:
    nothing is known of what is lost then."""
    divergences: list[float] = []
    same = 0
    for first in range(0, len(given), _ROWS_A_STEP):
        ours = given[first : first + _ROWS_A_STEP].astype(np.float64)
        theirs = found[first : first + _ROWS_A_STEP].astype(np.float64)
        divergences += _divergences(ours, theirs).tolist()
        same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    count = len(divergences)
    if not np.isfinite(divergences).all():
        raise UnusableWeights(
            "what is lost cannot be told: some probabilities are not numbers, or 0 where they were not"
        )
    error = float(np.std(divergences, ddof=1)) / count**0.5 if count > 1 else float("inf")
    return Quality(max(0.0, float(np.mean(divergences))), error, same / count, count)


def _divergences(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of each row. What is never said in the one counts nothing, however likely it is in the other."""
    likely = np.exp(ours)
    with np.errstate(invalid="ignore"):  # a difference of two infinities
        answer: npt.NDArray[np.float64] = np.where(likely == 0, 0.0, likely * (ours - theirs)).sum(axis=1)
    return answer


def shipped_text() -> str:
    """Prose, dialogue, code, numbers and instructions: a little of what models are asked for."""
    return files("octoai.optimizer").joinpath("passages.txt").read_text("utf-8")


def _run_child(options: dict[str, Any], weights: Path, patience: float | None) -> dict[str, Any]:
    try:
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "octoai.optimizer.logits"],
            input=json.dumps(options) + "\n",
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")},
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        raise UnusableWeights(f"what {weights.name} says was not read in {patience:.0f} s") from None
    if ran.returncode != 0:
        words = ran.stderr.strip().splitlines()
        raise UnusableWeights(words[-1] if words else f"llama.cpp crashed on {weights} (exit {ran.returncode})")
    said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    if said["num_positions"] < 2:
        raise UnusableWeights(f"{weights}: not even two positions could be read in the time given")
    return said


def _path_of(mapped: npt.NDArray[np.float32]) -> Path:
    name = getattr(mapped, "filename", None)
    assert name is not None
    return Path(name)
