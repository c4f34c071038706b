"""`octoai optimize`, from a file of weights to a stored profile. Knows no command line and no service."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from octoai.optimizer import kernels
from octoai.optimizer.outcome import Bounds, Goal, Outcome, Trial, TrialFailed
from octoai.optimizer.plot import plotted
from octoai.optimizer.profile import (
    OTHERS_CODE,
    BadProfile,
    DamagedProfile,
    Profile,
    Profiles,
    is_ours_alone,
    sha256,
    sha256_of_model,
)
from octoai.optimizer.search import CLEARLY_FASTER, Search
from octoai.optimizer.space import AS_GIVEN, Candidate, engine_defaults, first_guesses, stages
from octoai.optimizer.trial import TRIAL_SECONDS, Bench
from octoai.optimizer.weights import UnusableWeights
from octoai.server.engines.llama.prefixes import parts
from octoai.server.machine.cores import num_cores
from octoai.server.machine.places import create

_PLOT_FILENAME = "profile.svg"
_COMPILING_SECONDS = 60.0  # of a search that is at least as long, a part may be spent on kernels
_COMPILING_PART = 1 / 2


class CannotOptimize(Exception):
    """The text is one line that says why and what to do next."""


class IsOptimized(CannotOptimize):
    """Another search for the model runs now."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the result should be good for, and what it may cost. Times are seconds."""

    context_length: int
    goal: Goal = "balanced"
    seconds: float = 120.0
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True)
class Optimized:
    """`profile` is None where nothing better was found than how a service runs without one, `place` is the directory
    it is in. `no_kernels` says why there were none for this CPU to try, "" where there were, `no_plot` why that is not
    beside the profile. `older` says what becomes of a profile that was stored before, where none is now. `is_exact`: as
    of `Bench`."""

    outcome: Outcome
    profile: Profile | None = None
    place: Path | None = None
    no_kernels: str = ""
    no_plot: str = ""
    older: str = ""
    is_exact: bool = False

    @property
    def plot(self) -> Path | None:
        return self.place / _PLOT_FILENAME if self.place and not self.no_plot else None


def optimize(
    source: Path,
    cache_dir: Path,
    wish: Wish,
    on_trial: Callable[[Trial], None] = lambda _trial: None,
    on_step: Callable[[str], None] = lambda _step: None,
) -> Optimized:
    """Search, and store what was found. Stopped by the keyboard it stores the best so far, and what is being stored is
    not stopped any more. `on_step` is told what takes long and is no trial. Raises CannotOptimize."""
    began = time.monotonic()
    num_threads = num_cores()
    profiles = Profiles(cache_dir)
    try:
        given = _files(source)
        model_sha256 = sha256_of_model(source)
        with _interrupts() as ignore_them, _workplace(cache_dir, model_sha256) as directory:
            kernels_path, missing = _kernels(profiles, wish, num_threads, directory / "kernels", on_step)
            starts = first_guesses(num_threads, kernels_path, is_unified=kernels.shares_cache())
            with Bench(
                source,
                directory,
                context_length=wish.context_length,
                num_threads=num_threads,
                trial_seconds=max(TRIAL_SECONDS, wish.seconds / 4),
                ends_at=began + wish.seconds,
            ) as bench:
                search = Search(
                    bench,
                    stages(bench.recipe_names, num_threads),
                    starts=starts,
                    defaults=engine_defaults(num_threads),
                    goal=wish.goal,
                    bounds=wish.bounds,
                    on_trial=on_trial,
                )
                outcome = search.run(wish.seconds - (time.monotonic() - began), time.monotonic)
                ignore_them()
                if _files(source) != given:  # part of what was measured and made may be the other model's
                    raise CannotOptimize(f"{source} was replaced while it was optimized: optimize it again")
                if not outcome.is_usable and not outcome.is_interrupted:
                    raise CannotOptimize(_why_not(source, outcome, is_late=time.monotonic() >= began + wish.seconds))
                if _is_gain(outcome, starts, wish):
                    found = _stored(profiles, source, model_sha256, outcome, wish, bench)
                else:
                    found = Optimized(outcome, older=_older(profiles, source, model_sha256, outcome, wish.bounds))
                    if _is_in_vain(outcome, wish, missing):
                        profiles.note_in_vain(source, model_sha256, kernels.RECIPE)
                return replace(found, no_kernels=str(missing or ""), is_exact=bench.is_exact)
    except KeyboardInterrupt:  # before the search began
        return Optimized(Outcome(best=first_guesses(num_threads)[0], is_interrupted=True))
    except (TrialFailed, UnusableWeights) as error:
        raise CannotOptimize(str(error)) from None
    except OSError as error:
        raise CannotOptimize(f"{error.filename or cache_dir}: {error.strerror or error}") from None


def _files(source: Path) -> list[tuple[int, ...]]:
    """What tells that the files of the model are others by now, or were written to."""
    found = map(os.stat, parts(source))
    return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def _kernels(
    profiles: Profiles, wish: Wish, num_threads: int, work: Path, on_step: Callable[[str], None]
) -> tuple[Path | None, kernels.NoKernels | None]:
    """Those for this CPU, made now if need be, or why there are none."""
    path = profiles.kernels_path(kernels.RECIPE)
    if path.is_file() and not is_ours_alone(path):
        return None, kernels.NoKernelsNow(f"{path} {OTHERS_CODE}")
    try:
        if path.is_file() and kernels.can_be_loaded(path):
            return path, None
        if wish.seconds < _COMPILING_SECONDS:
            least = f"only a search of {_COMPILING_SECONDS:.0f} seconds or more compiles them"
            return None, kernels.NoKernelsNow(f"no kernels for this CPU are here, and {least}")
        on_step("compiling kernels for this CPU")
        seconds = wish.seconds * _COMPILING_PART
        kernels.make(path, profiles.engine, work=work, num_threads=num_threads, environ=os.environ, seconds=seconds)
    except kernels.NoKernels as error:
        return None, error
    return path, None


def _stored(
    profiles: Profiles, source: Path, model_sha256: str, outcome: Outcome, wish: Wish, bench: Bench
) -> Optimized:
    best = outcome.best
    made = None if best.weights == AS_GIVEN else bench.weights(best.weights)
    weights_sha256 = sha256(made) if made else None
    loss = outcome.losses.get(best.arithmetic)
    own = best.tuning.kernels
    profile = Profile(
        model_sha256=model_sha256,
        cpu=profiles.cpu,
        engine=profiles.engine,
        candidate=best,
        goal=wish.goal,
        max_loss=wish.bounds.max_loss,
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        kl_nats=loss.kl_nats if loss else None,
        same_top=loss.same_top if loss else None,
        ratios=outcome.ratios,
        weights_file=f"{weights_sha256[:12]}.gguf" if weights_sha256 else None,
        weights_bytes=made.stat().st_size if made else None,
        weights_sha256=weights_sha256,
        kernels_file=own.name if own else None,
        kernels_sha256=sha256(own) if own else None,
        memory_bytes=_memory_bytes(outcome, wish.bounds),
    )
    place = profiles.store(source, profile, made)
    found = Optimized(outcome, profile, place)
    try:
        (place / _PLOT_FILENAME).write_text(plotted(outcome), encoding="utf-8")
    except OSError as error:  # a service does without it
        return replace(found, no_plot=f"the plot could not be written: {error.filename}: {error.strerror or error}")
    return found


def _memory_bytes(outcome: Outcome, bounds: Bounds) -> int:
    """The most that the best took in a trial that counted."""
    taken = [each.memory_bytes for each in outcome.trials if each.candidate == outcome.best]
    return max(filter(bounds.allow, taken), default=0)


def _is_gain(outcome: Outcome, starts: Sequence[Candidate], wish: Wish) -> bool:
    """Whether it is better than what a service does without a profile: that is how a search starts, apart from kernels
    for this CPU, where it can be run at all. What was no faster than another in any round is that only if it was no
    slower than the defaults at the end, or, where that could not be seen, clearly faster at the beginning."""
    best = outcome.best
    if (best not in starts and best != outcome.start) or not _could_start(outcome, starts, wish.bounds):
        return outcome.is_usable
    if best.tuning.kernels is None:
        return False
    if outcome.pairs:
        return outcome.gain(wish.goal) >= 1
    first = (each for each in outcome.trials if each.stage == "start" and each.candidate == best)
    return any(each.score is not None and each.score >= CLEARLY_FASTER for each in first)  # beside the defaults


def _is_in_vain(outcome: Outcome, wish: Wish, missing: kernels.NoKernels | None) -> bool:
    """Whether the search that a service has made would find nothing either: it was as long, for the same, and came to
    its end, with kernels for this CPU or without any hope of them."""
    usual = Wish(wish.context_length)
    is_usual = wish.seconds >= usual.seconds and replace(wish, seconds=usual.seconds) == usual
    return is_usual and _is_whole(outcome) and not isinstance(missing, kernels.NoKernelsNow)


def _is_whole(outcome: Outcome) -> bool:
    return bool(outcome.pairs) and not outcome.is_interrupted


def _older(profiles: Profiles, source: Path, model_sha256: str, outcome: Outcome, bounds: Bounds) -> str:
    """What becomes of the profile there was, where nothing is stored. A service goes on with it; not with one that is
    damaged, or outside the bounds of a whole search that has found nothing else."""
    place = profiles.place(source, model_sha256)
    if not place.is_dir():
        return ""
    if not _is_whole(outcome) or not (why := _unfit(profiles, source, model_sha256, bounds)):
        return f"the profile that was stored before stays: {place}"
    shutil.rmtree(place)
    return f"the profile that was stored before is removed: {why}"


def _unfit(profiles: Profiles, source: Path, model_sha256: str, bounds: Bounds) -> str:
    try:
        found = profiles.find(source, model_sha256)
    except DamagedProfile:
        return "it cannot be used"
    except BadProfile:  # it may be as soon as somebody has done what it says
        return ""
    profile = found and found[0]
    if profile and (profile.kl_nats or 0.0) > bounds.max_loss:
        return f"it loses {profile.kl_nats:.4f} nats, more than {bounds.max_loss:g} (--max-loss)"
    if profile and not bounds.allow(profile.memory_bytes):
        return f"it takes {profile.memory_bytes >> 20} MiB, more than --max-memory allows"
    return ""


def _could_start(outcome: Outcome, starts: Sequence[Candidate], bounds: Bounds) -> bool:
    """Whether any of these ran in the memory there is, be it slowly."""
    return any(each.candidate in starts and each.speed and bounds.allow(each.memory_bytes) for each in outcome.trials)


def _why_not(source: Path, outcome: Outcome, *, is_late: bool) -> str:
    note = next((trial.note for trial in reversed(outcome.trials) if trial.note), "")
    if note and not is_late:
        return f"no trial of {source.name} went well here: {note}"
    last = f" ({note})" if note else ""
    return f"there was not enough time to measure {source.name} here{last}: give it more --seconds"


@contextmanager
def _interrupts() -> Iterator[Callable[[], object]]:
    """The keyboard's are ignored from when what this gives is called: to hash a large file takes long, and what was
    found would be lost."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _workplace(cache_dir: Path, model_sha256: str) -> Iterator[Path]:
    """An empty directory for the files that a search makes, gone afterwards; one search at a time for a model."""
    create(cache_dir)
    base = create(cache_dir / "optimizing")
    with (base / f"{model_sha256[:16]}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IsOptimized("this model is being optimized already: wait for that to end") from None
        directory = base / model_sha256[:16]
        shutil.rmtree(directory, ignore_errors=True)
        try:
            _clear(base, create(directory))
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _clear(base: Path, own: Path) -> None:
    """Of what searches that were killed have left, for whatever model. To delete that takes long: it is moved first,
    or who begins a search for that model meanwhile would be refused."""
    for path in filter(Path.is_dir, base.iterdir()):
        with path.with_suffix(".lock").open("a") as lock, suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.rename(own / path.name)
    for path in own.iterdir():
        shutil.rmtree(path, ignore_errors=True)
