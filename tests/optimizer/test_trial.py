"""Trials with the real model: what is measured, and what becomes of candidates that cannot run."""

from __future__ import annotations

import asyncio
import errno
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from octoai.optimizer import trial
from octoai.optimizer.outcome import TrialFailed
from octoai.optimizer.space import AS_GIVEN, Candidate
from octoai.optimizer.trial import Bench

pytestmark = pytest.mark.model

SHARE = 1 / 16


@pytest.fixture
def bench(embedded_model: Path, tmp_path: Path) -> Iterator[Bench]:
    with Bench(embedded_model, tmp_path, context_length=512, num_threads=2) as opened:
        yield opened


def test_a_candidate_is_measured(bench: Bench) -> None:
    candidate = Candidate(AS_GIVEN, num_slots=8, num_threads=2, batch_tokens=128)
    speed, memory_bytes = bench.speed(candidate, SHARE, 1)
    assert min(speed.prompt_rate, speed.stream_rate, speed.joint_rate) > 0
    assert 50 << 20 < memory_bytes < 2 << 30


@pytest.mark.slow
def test_a_small_context_is_measured_by_what_fits_in_it(embedded_model: Path, tmp_path: Path) -> None:
    candidate = Candidate(AS_GIVEN, num_slots=2, num_threads=2, batch_tokens=128)
    with Bench(embedded_model, tmp_path, context_length=128, num_threads=2) as bench:
        speed, _ = bench.speed(candidate, 1 / 4, 1)
    assert min(speed.prompt_rate, speed.stream_rate, speed.joint_rate) > 0


@pytest.mark.slow
def test_a_model_that_learned_less_context_than_is_asked_for_is_measured_by_what_fits(
    embedded_model: Path, tmp_path: Path
) -> None:
    key = b"llama.context_length" + struct.pack("<I", 4)  # of the type of numbers of 32 bits
    weights = bytearray(embedded_model.read_bytes())
    struct.pack_into("<I", weights, weights.index(key) + len(key), 128)
    (tmp_path / "short.gguf").write_bytes(weights)
    candidate = Candidate(AS_GIVEN, num_slots=2, num_threads=2, batch_tokens=128)
    with Bench(tmp_path / "short.gguf", tmp_path, context_length=8192, num_threads=2) as bench:
        speed, _ = bench.speed(candidate, 1 / 4, 1)
    assert min(speed.prompt_rate, speed.stream_rate, speed.joint_rate) > 0


@pytest.mark.slow
def test_every_option_reaches_an_engine_that_runs(bench: Bench) -> None:
    plain = Candidate(AS_GIVEN, num_slots=2, num_threads=1, batch_tokens=64)
    for changes in (
        {"flash_attention": "off", "cache_type": "f32", "spin_count": None, "num_batch_threads": 2},
        {"flash_attention": "on", "cache_type": "q8_0", "is_unified": True, "micro_batch_tokens": 32},
        {"speculation": "ngram_simple", "spin_count": 300},
        {"spin_count": None, "gives_way": True, "num_batch_threads": 2},
    ):
        speed, _ = bench.speed(plain.tuned(**changes), SHARE, 1)
        assert speed.joint_rate > 0


@pytest.mark.slow
def test_another_format_is_made_measured_and_loses_what_it_loses(bench: Bench, tmp_path: Path) -> None:
    assert "Q8_0" in bench.recipe_names
    speed, _ = bench.speed(Candidate("Q8_0", num_threads=2), SHARE, 1)
    assert speed.joint_rate > 0
    assert 0 < bench.loss(Candidate("Q8_0")).kl_nats < 0.005
    assert bench.is_exact
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"exact.gguf", "0.gguf"}


@pytest.mark.slow
def test_steadiness_is_a_share(bench: Bench) -> None:
    assert 0 < bench.steadiness(Candidate(AS_GIVEN, num_slots=8, num_threads=1)) < 3


def test_weights_that_cannot_be_loaded_are_a_failed_candidate(bench: Bench, tmp_path: Path) -> None:
    candidate = Candidate(bench.recipe_names[1])
    (tmp_path / "1.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(TrialFailed):
        bench.speed(candidate, SHARE, 1)


LACKING = {
    "Resource temporarily unavailable": BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    "can't start new thread": RuntimeError("can't start new thread"),
    "MemoryError": MemoryError(),
}


def test_no_process_thread_or_memory_for_a_moment_is_a_failed_trial_and_is_not_remembered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a service under a limit; what was found by then would be lost."""
    name, lacking = bench.recipe_names[1], list(LACKING.values())

    def failing(*_: object, **__: object) -> None:
        raise lacking[0]

    monkeypatch.setattr(trial, "requantize", failing)
    monkeypatch.setattr(trial, "exact", lambda *_, **__: None)
    monkeypatch.setattr(subprocess, "run", failing)
    monkeypatch.setattr(asyncio, "run", lambda measuring: failing(measuring.close()))
    for said in LACKING:
        for measure in (
            lambda: bench.weights(name),
            lambda: bench.loss(Candidate(AS_GIVEN)),
            lambda: bench.speed(Candidate(AS_GIVEN), SHARE, 1),
            lambda: bench.steadiness(Candidate(AS_GIVEN)),
        ):
            with pytest.raises(TrialFailed, match=f"^{said}$"):
                measure()
        del lacking[0]
    monkeypatch.setattr(trial, "requantize", lambda _source, path, *_, **__: path.touch())
    assert bench.weights(name).is_file()


def test_a_candidate_that_takes_too_long_is_a_failed_one(embedded_model: Path, tmp_path: Path) -> None:
    options = {"context_length": 512, "num_threads": 2, "trial_seconds": 0.2}
    with Bench(embedded_model, tmp_path, **options) as bench, pytest.raises(TrialFailed, match="not done"):
        bench.speed(replace(Candidate(), num_threads=1), 1, 1)


def test_a_trial_is_not_much_longer_than_the_search(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LATE_SECONDS", 0.2)
    options = {"context_length": 512, "num_threads": 2, "ends_at": time.monotonic() + 0.1}
    with Bench(embedded_model, tmp_path, **options) as bench:
        for measured in (lambda: bench.speed(Candidate(), 1, 1), lambda: bench.steadiness(Candidate())):
            with pytest.raises(TrialFailed, match="not done in 0 s"):
                measured()
