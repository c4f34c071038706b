"""A search as a whole: what it leaves behind, and when it is stopped."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octoai.optimizer import kernels, optimization
from octoai.optimizer.optimization import CannotOptimize, IsOptimized, Optimized, Wish, optimize
from octoai.optimizer.outcome import Bounds, Outcome, Trial
from octoai.optimizer.profile import Profiles, sha256
from octoai.optimizer.quality import Quality
from octoai.optimizer.space import Candidate, first_guesses
from octoai.optimizer.workload import Speed
from octoai.server.machine.cores import num_cores
from octoai.server.machine.places import create

FOUND = Outcome(best=Candidate(num_slots=2), is_usable=True)


class Benchless:
    """Measures nothing."""

    recipe_names = ()
    is_exact = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Benchless:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def finds(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next search does."""

    class Searchless:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, *_: object) -> Outcome:
            return outcome

    monkeypatch.setattr(optimization, "Search", Searchless)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights for which a search finds something at once."""

    monkeypatch.setattr(optimization, "Bench", Benchless)
    finds(FOUND, monkeypatch)
    (tmp_path / "model.gguf").write_bytes(b"weights")
    return tmp_path / "model.gguf"


def test_who_interrupts_while_what_was_found_is_stored_does_not_lose_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(*_: Any) -> Optimized:
        signal.raise_signal(signal.SIGINT)
        return Optimized(FOUND, place=tmp_path)

    monkeypatch.setattr(optimization, "_stored", stored)
    found = optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=30))
    assert found.place == tmp_path
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


NOTED = Outcome(best=Candidate(), trials=[Trial("defaults", Candidate(), 0.1, note="failed: not done in 9 s")])


@pytest.mark.parametrize(
    ("outcome", "seconds", "said"),
    [
        (Outcome(best=Candidate()), 30, "there was not enough time to measure model.gguf here: give it more --seconds"),
        (
            NOTED,
            0,
            "there was not enough time to measure model.gguf here (failed: not done in 9 s): give it more --sec",
        ),
        (NOTED, 30, "no trial of model.gguf went well here: failed: not done in 9 s"),
    ],
)
def test_a_search_without_time_says_what_to_give_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, seconds: float, said: str
) -> None:
    finds(outcome, monkeypatch)
    with pytest.raises(CannotOptimize, match=f"^{re.escape(said)}"):
        optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=seconds))


def test_a_search_too_short_to_compile_kernels_says_how_long_would_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finds(Outcome(best=first_guesses(num_cores())[0], is_usable=True), monkeypatch)
    found = optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=30))
    assert found.no_kernels == (
        "no kernels for this CPU are here, and only a search of 60 seconds or more compiles them"
    )


@pytest.mark.parametrize("how", ["by another file", "in its place"])
@pytest.mark.parametrize("best", [FOUND.best, first_guesses(num_cores())[0]])
def test_nothing_is_kept_of_a_search_whose_model_was_replaced_by_one_of_the_same_size(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: Candidate, how: str
) -> None:
    """The hash is that of the first file; what was measured, and weights in other formats, may be of the second."""
    trials = [Trial("start", best, 1 / 8, Speed(100, 10, 10))]
    outcome = Outcome(best, is_usable=True, start=best, trials=trials, pairs=compared(1.0))

    class Replacing:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, *_: object) -> Outcome:
            written = source if how == "in its place" else tmp_path / "new.gguf"
            written.write_bytes(b"WEIGHTS")
            written.replace(source)
            return outcome

    os.utime(source, ns=(1, 1))
    monkeypatch.setattr(optimization, "Search", Replacing)
    monkeypatch.setattr(optimization, "_kernels", lambda *_: (None, None))
    said = f"{source} was replaced while it was optimized: optimize it again"
    with pytest.raises(CannotOptimize, match=f"^{re.escape(said)}$"):
        optimize(source, tmp_path / "cache", Wish(context_length=512))
    source.write_bytes(b"weights")
    profiles = Profiles(tmp_path / "cache")
    assert profiles.find(source) is None
    assert not profiles.is_searched_in_vain(source, kernels.RECIPE)


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """With kernels that are there already, and without."""
    made = Profiles(tmp_path / "cache").kernels_path(kernels.RECIPE)
    create(create(tmp_path / "cache") / "kernels")
    made.write_bytes(b"kernels")
    monkeypatch.setattr(kernels, "can_be_loaded", lambda _: True)
    return first_guesses(num_cores(), made, is_unified=kernels.shares_cache())


def compared(times: float | None) -> list[tuple[Speed, Speed]]:
    """In the end the best was so many times as fast as the defaults."""
    return [] if times is None else [(Speed(100, 10, 10), Speed(100 * times, 10 * times, 10 * times))]


@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize(
    ("has_kernels", "times", "is_kept"),
    [(True, 1.5, True), (True, None, False), (True, 0.9, False), (False, 1.5, False), (False, None, False)],
)
def test_where_a_search_began_is_kept_only_with_kernels_that_are_no_slower(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: list[Candidate],
    has_kernels: bool,
    times: float | None,
    is_kept: bool,
    is_stopped: bool,
) -> None:
    best = starts[0 if has_kernels else 1]
    trials = [Trial("start", best, 1 / 8, Speed(100, 10, 10))]
    finds(Outcome(best, True, best, is_stopped, trials, pairs=compared(times)), monkeypatch)
    found = optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=30))
    assert (found.profile is not None) == is_kept
    assert (Profiles(tmp_path / "cache").find(source) is not None) == is_kept


@pytest.mark.parametrize(("score", "is_kept"), [(1.5, True), (1.2, False), (1.0, False), (None, False)])
def test_a_start_with_kernels_that_could_not_be_compared_at_the_end_is_kept_where_it_was_clearly_faster_at_first(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: list[Candidate],
    score: float | None,
    is_kept: bool,
) -> None:
    trials = [Trial("start", starts[0], 1 / 8, Speed(100, 10, 10), score=score), Trial("chosen", starts[0], 1 / 4)]
    finds(Outcome(starts[0], True, start=starts[0], trials=trials), monkeypatch)
    found = optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=30))
    assert (found.profile is not None) == is_kept


NO_TIME, NO_HOPE = kernels.NoKernelsNow("there was no time"), kernels.NoKernels("on Linux only")


@pytest.mark.parametrize(
    ("wish", "times", "missing", "is_in_vain"),
    [
        (Wish(512), 0.9, None, True),
        (Wish(512, seconds=600), 0.9, None, True),
        (Wish(512), 0.9, NO_HOPE, True),
        (Wish(512), 0.9, NO_TIME, False),
        (Wish(512), None, None, False),
        (Wish(512, seconds=8), 0.9, None, False),
        (Wish(512, "latency"), 0.9, None, False),
        (Wish(512, bounds=Bounds(max_memory_bytes=1 << 30)), 0.9, None, False),
    ],
)
def test_a_search_is_in_vain_where_that_of_a_service_would_find_nothing_either(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wish: Wish,
    times: float | None,
    missing: kernels.NoKernels | None,
    is_in_vain: bool,
) -> None:
    starts, profiles = first_guesses(num_cores()), Profiles(tmp_path / "cache")
    monkeypatch.setattr(optimization, "_kernels", lambda *_: (None, missing))
    trials = [Trial("start", starts[0], 1 / 8, Speed(100, 10, 10))]
    found = Outcome(starts[0], True, start=starts[0], trials=trials, pairs=compared(times))
    finds(replace(found, is_interrupted=True), monkeypatch)
    optimize(source, tmp_path / "cache", wish)
    assert not profiles.is_searched_in_vain(source, kernels.RECIPE)
    finds(found, monkeypatch)
    optimize(source, tmp_path / "cache", wish)
    assert profiles.is_searched_in_vain(source, kernels.RECIPE) == is_in_vain
    assert not profiles.is_searched_in_vain(source, "another recipe")


STRICT, SMALL = Wish(512, bounds=Bounds(max_loss=0.001)), Wish(512, bounds=Bounds(max_memory_bytes=200 << 20))
REMOVED = "the profile that was stored before is removed: "


@pytest.mark.parametrize(
    ("wish", "times", "is_stopped", "said"),
    [
        (STRICT, 0.9, False, f"{REMOVED}it loses 0.0030 nats, more than 0.001 (--max-loss)"),
        (SMALL, 0.9, False, f"{REMOVED}it takes 300 MiB, more than --max-memory allows"),
        (Wish(512), 0.9, False, ""),
        (STRICT, 0.9, True, ""),
        (SMALL, None, False, ""),
    ],
)
def test_a_profile_stays_where_no_other_is_found_unless_it_is_outside_the_bounds(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wish: Wish,
    times: float | None,
    is_stopped: bool,
    said: str,
) -> None:
    """Who tightens a bound is told that nothing is stored, and would be served with what the bound forbids."""
    best, start = replace(FOUND.best, num_threads=1), first_guesses(num_cores())[0]
    trials = [Trial("slots", best, 1 / 8, Speed(100, 10, 10), memory_bytes=300 << 20)]
    finds(Outcome(best, True, trials=trials, losses={best.arithmetic: Quality(0.003, 0.0, 0.99, 400)}), monkeypatch)
    monkeypatch.setattr(optimization, "_kernels", lambda *_: (None, None))
    first = optimize(source, tmp_path / "cache", Wish(512))
    assert (first.profile is not None, first.older) == (True, "")
    trials = [Trial("start", start, 1 / 8, Speed(100, 10, 10))]
    finds(Outcome(start, True, start, is_stopped, trials, pairs=compared(times)), monkeypatch)
    assert optimize(source, tmp_path / "cache", wish).older == (
        said or f"the profile that was stored before stays: {first.place}"
    )
    assert (Profiles(tmp_path / "cache").find(source) is None) == bool(said)
    assert not optimize(source, tmp_path / "elsewhere", wish).older


def test_a_profile_that_cannot_be_used_does_not_outlive_a_search_that_finds_nothing_better(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each start would say that it is damaged, and to optimize again."""
    place, start = optimize(source, tmp_path / "cache", Wish(512, seconds=30)).place, first_guesses(num_cores())[0]
    assert place is not None
    (place / "profile.json").write_text("{")
    trials = [Trial("start", start, 1 / 8, Speed(100, 10, 10))]
    finds(Outcome(start, True, start=start, trials=trials, pairs=compared(0.9)), monkeypatch)
    found = optimize(source, tmp_path / "cache", Wish(512, seconds=30))
    assert (found.older, place.exists()) == (f"{REMOVED}it cannot be used", False)


def test_a_profile_that_cannot_be_read_for_now_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, start = optimize(source, tmp_path / "cache", Wish(512, seconds=30)).place, first_guesses(num_cores())[0]
    assert place is not None
    profile = place / "profile.json"
    profile.rename(place / "kept")
    profile.mkdir()  # as a disk or a table of files that is full, it is an OSError
    trials = [Trial("start", start, 1 / 8, Speed(100, 10, 10))]
    finds(Outcome(start, True, start=start, trials=trials, pairs=compared(0.9)), monkeypatch)
    assert optimize(source, tmp_path / "cache", Wish(512, seconds=30)).older.endswith(f"stays: {place}")
    assert (place / "kept").exists()


def test_a_profile_keeps_the_memory_of_the_trials_that_its_bound_allowed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "_kernels", lambda *_: (None, None))
    best = first_guesses(num_cores())[0].tuned(flash_attention="on")
    trials = [Trial("attention", best, 1 / 8, Speed(100, 10, 10), memory_bytes=size) for size in (80, 100, 120)]
    finds(Outcome(best, True, trials=trials), monkeypatch)
    profile = optimize(source, tmp_path / "cache", Wish(512, bounds=Bounds(max_memory_bytes=110))).profile
    assert profile is not None
    assert profile.memory_bytes == 100


SLOW, LARGE, FAILED = (Speed(100, 10, 10), 100), (Speed(900, 10, 10), 900), (None, 0)


@pytest.mark.parametrize(
    ("usual", "has_kernels", "times", "is_kept"),
    [
        (SLOW, False, 1.5, False),
        (SLOW, False, None, False),
        (SLOW, True, 1.5, True),
        (SLOW, True, None, False),
        (LARGE, False, None, True),
        (FAILED, False, None, True),
    ],
)
def test_a_smaller_start_is_kept_for_its_kernels_or_where_the_usual_one_cannot_be_run(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: list[Candidate],
    usual: tuple[Speed | None, int],
    has_kernels: bool,
    times: float | None,
    is_kept: bool,
) -> None:
    """A usual one that is slow may be faster all the same: nothing compared them."""
    smaller = replace(starts[0 if has_kernels else 1], num_slots=4, batch_tokens=64)
    trials = [Trial("start", start, 1 / 8, *usual) for start in starts]
    trials.append(Trial("start", smaller, 1 / 8, Speed(100, 10, 10), 100))
    finds(Outcome(smaller, True, start=smaller, trials=trials, pairs=compared(times)), monkeypatch)
    wish = Wish(context_length=512, seconds=30, bounds=Bounds(max_memory_bytes=500))
    assert (optimize(source, tmp_path / "cache", wish).profile is not None) == is_kept


def test_what_killed_searches_left_is_cleared_away_and_what_others_use_is_not(tmp_path: Path) -> None:
    base = create(create(tmp_path / "cache") / "optimizing")
    for name in ("killed", "running"):
        (create(base / name) / "0.gguf").write_bytes(b"weights")
    (base / "killed.lock").touch()
    with (base / "running.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with optimization._workplace(tmp_path / "cache", "a" * 64) as directory:
            assert {path.name for path in base.iterdir() if path.is_dir()} == {"running", directory.name}
            with pytest.raises(IsOptimized), optimization._workplace(tmp_path / "cache", "a" * 64):
                pass
            assert directory.is_dir()
    assert (base / "running" / "0.gguf").is_file()


def test_while_another_search_clears_away_what_was_killed_one_for_that_model_can_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, killed, begun = create(create(tmp_path / "cache") / "optimizing"), "b" * 64, []
    (create(base / killed[:16]) / "0.gguf").write_bytes(b"weights")
    rmtree = shutil.rmtree

    def slow(path: Path, **options: Any) -> None:
        if path.name == killed[:16] and not begun:
            begun.append(path)
            with optimization._workplace(tmp_path / "cache", killed) as directory:
                assert list(directory.iterdir()) == []
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    with optimization._workplace(tmp_path / "cache", "a" * 64) as directory:
        assert begun
        assert list(directory.iterdir()) == []
    assert not [path for path in base.iterdir() if path.is_dir()]


def test_a_plot_that_cannot_be_written_costs_a_line_and_no_profile(source: Path, tmp_path: Path) -> None:
    profiles = Profiles(tmp_path / "cache")
    plot = profiles.place(source, sha256(source)) / "profile.svg"
    plot.mkdir(parents=True)
    found = optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=30))
    assert found.no_plot == f"the plot could not be written: {plot}: Is a directory"
    assert (found.profile, found.plot) == ((profiles.find(source) or [None])[0], None)
    plot.rmdir()
    found = optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=30))
    assert (found.plot, found.no_plot) == (plot, "")
    assert plot.read_text().startswith("<svg")
