"""A search as a whole: what it leaves behind, and when it is stopped."""

from __future__ import annotations

import fcntl
import signal
from pathlib import Path
from typing import Any

import pytest

from octoai.optimizer import optimization
from octoai.optimizer.optimization import CannotOptimize, IsOptimized, Optimized, Wish, optimize
from octoai.optimizer.outcome import Outcome
from octoai.optimizer.space import Candidate
from octoai.server.places import create

FOUND = Outcome(best=Candidate(num_slots=2))


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


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights for which a search finds something at once."""

    class Searchless:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, *_: object) -> Outcome:
            return FOUND

    monkeypatch.setattr(optimization, "Bench", Benchless)
    monkeypatch.setattr(optimization, "Search", Searchless)
    monkeypatch.setattr(Outcome, "is_usable", property(lambda _: True))
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


def test_a_search_without_time_says_what_to_give_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outcome, "is_usable", property(lambda _: False))
    with pytest.raises(CannotOptimize, match=r"model\.gguf could not be run here: there was no time: give it more"):
        optimize(source, tmp_path / "cache", Wish(context_length=512, seconds=30))


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
