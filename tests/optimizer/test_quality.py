"""How far a candidate's next-token distributions are from those of the weights as given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as whenever
from hypothesis.extra.numpy import arrays
from hypothesis.strategies import floats, just

from octoai.optimizer import quality
from octoai.optimizer.quality import MAX_POSITIONS, Quality, Reference, compared, exact, shipped_text
from octoai.optimizer.weights import Recipe, UnusableWeights, num_bytes, requantize


@dataclass
class Usage:
    free: int


def logs(*rows: list[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.log(np.array(rows)).astype(np.float32)


def test_the_divergence_is_the_mean_over_positions_of_kl_from_the_given_to_the_found() -> None:
    given, found = logs([0.5, 0.5], [0.9, 0.1]), logs([0.25, 0.75], [0.9, 0.1])
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    quality = compared(given, found)
    assert quality.kl_nats == pytest.approx(first / 2, rel=1e-5)
    assert quality.kl_error == pytest.approx(first / 2, rel=1e-5)  # of two values, one of them zero
    assert compared(found, given).kl_nats != pytest.approx(quality.kl_nats, rel=0.01)


def test_what_stays_on_top_is_counted() -> None:
    given = logs([0.6, 0.4], [0.6, 0.4], [0.2, 0.8], [0.2, 0.8])
    found = logs([0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.3, 0.7])
    assert compared(given, found).same_top == 0.75
    assert compared(given, found).num_positions == 4


def test_many_positions_are_compared_in_steps_as_well_as_at_once() -> None:
    random = np.random.default_rng(5)
    given, found = (random.dirichlet(np.ones(50), 100) for _ in range(2))
    expected = (given * np.log(given / found)).sum(axis=1)
    quality = compared(logs(*given), logs(*found))
    assert quality.kl_nats == pytest.approx(expected.mean(), rel=1e-4)
    assert quality.kl_error == pytest.approx(expected.std(ddof=1) / 10, rel=1e-4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("is_given", [False, True])
def test_where_probabilities_are_not_numbers_nothing_is_said_of_what_is_lost(wrong: float, is_given: bool) -> None:
    both = logs([0.5, 0.5], [0.9, 0.1]), logs([0.5, 0.5], [0.9, 0.1])
    both[0 if is_given else 1][1, 0] = wrong
    with pytest.raises(UnusableWeights, match="not numbers"):
        compared(*both)


def test_what_is_never_said_counts_only_where_it_should_be() -> None:
    never, rarely = logs([0.5, 0.5]), logs([0.5, 0.5])
    never = np.append(never, np.float32([[-np.inf]]), axis=1)
    rarely = np.append(rarely, np.float32([[-20.0]]), axis=1)
    assert compared(never, rarely).kl_nats == pytest.approx(0, abs=1e-6)
    assert compared(never, never).kl_nats == pytest.approx(0, abs=1e-6)
    with pytest.raises(UnusableWeights, match="0 where they were not"):
        compared(rarely, never)


ROWS = arrays(np.float32, (3, 4), elements=floats(max_value=0, width=32) | just(np.nan))


@whenever(ROWS, ROWS)
def test_whatever_is_compared_a_loss_is_a_number_and_known_to_be_one(
    ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]
) -> None:
    try:
        quality = compared(ours, theirs)
    except UnusableWeights:
        return
    assert 0 <= quality.kl_nats < np.inf
    assert not np.isnan(ours).any()
    assert np.isfinite(theirs[np.exp(ours.astype(np.float64)) > 0]).all()


def test_the_shipped_text_has_several_kinds_of_text() -> None:
    text = shipped_text()
    assert len(text.split()) > 350
    kinds = ("the sea has no opinion", '"I thought you had it."', "def ", '{"name"', "1,620.00", "Question:", "2. Lift")
    assert all(each in text for each in kinds)


def test_nothing_stays_open_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is deleted takes its room on the disk until then."""

    def say(options: dict[str, Any], *_: object) -> dict[str, Any]:
        logs([0.5, 0.5], [0.9, 0.1]).tofile(options["output"])
        return {"num_positions": 2, "num_tokens": 2}

    monkeypatch.setattr(quality, "_run_child", say)
    with Reference(Path("given.gguf")) as opened:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert opened.measure(Path("candidate.gguf")) == Quality(0.0, 0.0, 1.0, 2)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(scope="module")
def reference(embedded_model: Path) -> Iterator[Reference]:
    with Reference(embedded_model, num_threads=2) as opened:
        yield opened


@pytest.mark.model
def test_weights_do_not_differ_from_themselves(reference: Reference, embedded_model: Path) -> None:
    assert reference.measure(embedded_model) == Quality(0.0, 0.0, 1.0, MAX_POSITIONS)


@pytest.mark.slow
@pytest.mark.model
def test_the_more_a_format_rounds_the_further_it_is(reference: Reference, embedded_model: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("Q8_0", "Q4_0", "Q2_0"):
        requantize(embedded_model, tmp_path / "made.gguf", Recipe(name, (("blk.*", name),)))
        found[name] = reference.measure(tmp_path / "made.gguf")
    assert 0 < found["Q8_0"].kl_nats < 0.005
    assert 0.1 < found["Q4_0"].kl_nats < found["Q2_0"].kl_nats
    assert found["Q8_0"].kl_error < 0.0005
    assert found["Q8_0"].same_top > 0.9 > found["Q4_0"].same_top > found["Q2_0"].same_top


@pytest.mark.model
def test_a_budget_of_time_makes_it_fewer_positions(embedded_model: Path) -> None:
    with Reference(embedded_model, max_seconds=0) as hurried:
        assert 2 <= hurried.num_positions < 32
        assert hurried.measure(embedded_model).num_positions == hurried.num_positions


@pytest.mark.model
def test_a_reference_leaves_nothing_behind(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Reference(embedded_model, max_positions=16) as opened:
        opened.measure(embedded_model)
        assert len(list(tmp_path.rglob("*"))) == 2  # its folder, and what the weights as given say
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_a_reference_is_where_it_is_wanted(embedded_model: Path, tmp_path: Path) -> None:
    """Where temporary files are there may be no room for it, and nobody who clears it away."""
    with Reference(embedded_model, max_positions=16, directory=tmp_path) as opened:
        assert opened.num_positions == 16
        assert [path.suffix for path in tmp_path.glob("*/*")] == [".f32"]


@pytest.mark.model
def test_nobody_waits_for_weights_that_are_read_for_ever(embedded_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableWeights, match=r"what .*\.gguf says was not read in 0 s"):
        Reference(embedded_model, directory=tmp_path, patience=0.1)
    assert list(tmp_path.iterdir()) == []
    with (
        Reference(embedded_model, max_positions=16, directory=tmp_path) as opened,
        pytest.raises(UnusableWeights, match="was not read in"),
    ):
        opened.measure(embedded_model, patience=0.1)


def test_weights_that_do_not_load_are_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UnusableWeights, match=r"cannot load .*missing\.gguf") as raised:
        Reference(tmp_path / "missing.gguf")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.model
def test_a_finer_format_of_coarse_weights_is_as_near_to_them_as_they_are_themselves(
    embedded_model: Path, tmp_path: Path
) -> None:
    coarse, finer = tmp_path / "coarse.gguf", tmp_path / "finer.gguf"
    requantize(embedded_model, coarse, Recipe("Q4_K", (("*", "Q4_K"), ("*", "Q8_0"))))
    requantize(coarse, finer, Recipe("Q8_0", (("*", "Q8_0"),)))
    made = exact(coarse, tmp_path)
    assert made is not None
    assert exact(made, tmp_path) == made
    with Reference(made, num_threads=2) as opened:
        assert 0 < opened.measure(finer).kl_nats < opened.measure(coarse).kl_nats < 0.005
    with Reference(coarse, num_threads=2) as opened:  # what both round, in other ways, adds up
        assert opened.measure(finer).kl_nats > 0.005


def test_weights_too_large_for_the_memory_are_not_made_exact(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = num_bytes(embedded_model, quality.EXACT)
    monkeypatch.setattr(quality, "memory_bytes", lambda: 2 * large - 1)
    assert exact(embedded_model, tmp_path) is None
    monkeypatch.setattr(quality, "memory_bytes", lambda: 2 * large)
    assert exact(embedded_model, tmp_path) == tmp_path / "exact.gguf"


def test_a_disk_too_small_for_exact_weights_is_not_an_error(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octoai.server.machine.places.shutil.disk_usage", lambda _: Usage(free=1000))
    assert exact(embedded_model, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
