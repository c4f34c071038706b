"""`octoai optimize`: find, by measurement, the fastest way to run a model on this machine, and keep it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octoai.cli import quantities, signals
from octoai.cli.messages import fail, shown, tell

if TYPE_CHECKING:
    from octoai.optimizer.optimization import Optimized
    from octoai.optimizer.outcome import Loss, Trial
    from octoai.server.settings import ModelSettings, Settings


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("optimize", help="find the fastest way to run a model here", description=__doc__)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="an id or a GGUF file (default: the first one served)"
    )
    parser.add_argument(
        "--for", dest="goal", choices=("latency", "throughput", "balanced"), default="balanced", help="what counts"
    )
    parser.add_argument(
        "--seconds",
        type=quantities.seconds,
        default=120.0,
        metavar="S",
        help="time to spend (default 120); what is being measured then may end a little later",
    )
    parser.add_argument(
        "--max-loss",
        type=quantities.nats,
        default=0.005,
        metavar="NATS",
        help="mean KL divergence from the file as given that its weights may have (default 0.005)",
    )
    parser.add_argument("--max-memory", type=quantities.num_bytes, metavar="SIZE", help="of the engine, as 900M or 4G")
    parser.add_argument("--json", action="store_true", help="for programs: the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="write the plot here too")
    parser.add_argument("--config", type=Path, metavar="FILE", help="octoai.toml (default: the one here, if any)")
    parser.set_defaults(run=optimize)


def optimize(args: argparse.Namespace) -> int:
    """Search within the time given; `octoai serve` uses what is found."""
    signals.hear()  # SIGTERM keeps nothing; Ctrl-C, which is another matter, the best so far
    from octoai.cli.models import pulled
    from octoai.optimizer.optimization import CannotOptimize, IsOptimized, Wish
    from octoai.optimizer.optimization import optimize as optimized
    from octoai.optimizer.outcome import Bounds
    from octoai.server import app
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.logs import without_password
    from octoai.server.machine import idle
    from octoai.server.settings import BadSettings
    from octoai.server.sources import PullFailed, WeightStore

    if args.plot and not _can_be_written(args.plot):
        return fail(f"--plot: {args.plot} cannot be written: give a file in a directory of yours")
    is_chore = _follow_service()
    try:
        settings, chosen = _chosen(args.model, args.config)
        if chosen.engine_url is not None:
            return fail(
                f"{chosen.id} is served by {without_password(chosen.engine_url)}: optimize it where that server runs"
            )
        model = app.catalogue(settings)[chosen.id]
        store = WeightStore(settings.cache)
        source = store.verified(model, tell) or pulled(store, model)
        if is_chore and _is_searched(settings, source):
            return 0
        wish = Wish(
            context_length=chosen.context_length or model.context_length or app.DEFAULT_CONTEXT_LENGTH,
            goal=args.goal,
            seconds=args.seconds,
            bounds=Bounds(max_loss=args.max_loss, max_memory_bytes=args.max_memory),
        )
        with _bar(chosen.id, args.seconds) as (on_trial, on_step):
            result = optimized(source, settings.cache, wish, on_trial, on_step)
    except IsOptimized as error:
        status = fail(str(error))
        return idle.LATER if is_chore else status
    except (BadCatalogue, BadSettings, CannotOptimize, PullFailed) as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror or error}")
    return _told(result, args, is_chore=is_chore)


def _told(result: Optimized, args: argparse.Namespace, *, is_chore: bool) -> int:
    """What was found, as it was asked for. Returns the status of the command."""
    from octoai.optimizer.plot import plotted

    if result.outcome.is_interrupted:  # it ends anyway, and who is impatient would lose what it says
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if args.json:
        print(json.dumps(_described(result), indent=2, default=str))
    else:
        print(_shown(result), end="")
    if result.no_plot:
        tell(result.no_plot)
    if args.plot and result.profile:
        try:
            args.plot.write_text(plotted(result.outcome), encoding="utf-8")
        except OSError as error:
            return fail(f"--plot: {error.filename}: {error.strerror or error}")
    return _status(result, is_chore=is_chore)


def _status(result: Optimized, *, is_chore: bool) -> int:
    """That of the command; says why nothing is stored, where that is so. A service that had us search knows by 0 that
    it was done."""
    from octoai.server.machine import idle

    outcome = result.outcome
    if result.profile is None:
        nothing = "nothing better was found than what a service does without a profile: nothing is stored"
        if outcome.is_interrupted:
            nothing = "stopped before anything better was found: nothing is stored"
        elif not outcome.pairs:
            nothing = (
                "what was found could not be compared with the defaults: nothing is stored; give it more --seconds"
            )
        tell(nothing)
    if result.older:
        tell(result.older)
    if outcome.is_interrupted:
        return 130
    if is_chore and result.profile is None and not outcome.pairs and outcome.best.tuning.kernels:
        return idle.LATER  # it may be faster: another program spoilt the comparison
    return int(result.profile is None and not is_chore)


def _can_be_written(path: Path) -> bool:
    """Asked before the search: what it takes would be in vain."""
    return os.access(path, os.W_OK) and not path.is_dir() if path.exists() else os.access(path.parent, os.W_OK)


def _follow_service() -> bool:
    """Whether a service has this done while nobody asks. We are asked to end then when it ends, however it does."""
    from octoai.server.machine.idle import PARENT
    from octoai.server.machine.parent import die_with_parent

    service = os.environ.pop(PARENT, None)
    if service is None:
        return False
    die_with_parent(signal.SIGTERM)
    if str(os.getppid()) != service:  # it ended before we asked
        signal.raise_signal(signal.SIGTERM)
    return True


def _is_searched(settings: Settings, source: Path) -> bool:
    """By now: a service has a search made only where there was no profile, and not again where one found nothing."""
    from octoai.optimizer.kernels import RECIPE
    from octoai.optimizer.profile import BadProfile, Profiles

    profiles = Profiles(settings.cache)
    with suppress(BadProfile):  # a search since then may have found nothing
        if profiles.find(source) is not None:
            return True
    return profiles.is_searched_in_vain(source, RECIPE)


def _chosen(name: str | None, config: Path | None) -> tuple[Settings, ModelSettings]:
    """A model of the configuration by its id or alias, or any other by its id or file."""
    from octoai.server.settings import load

    anything = {"stand_in": ""}  # which may name a model that only the service's command line has
    settings = load(path=config, environ=os.environ, overrides=anything)
    if name is None:
        return settings, settings.models[0]
    for model in settings.models:
        if name.lower() in map(str.lower, (model.id, *model.aliases)):
            return settings, model
    settings = load(path=config, environ=os.environ, models=[name], overrides=anything)
    return settings, settings.models[0]


@contextmanager
def _bar(name: str, seconds: float) -> Iterator[tuple[Callable[[Trial], None], Callable[[str], None]]]:
    """What is to be told of trials, and of other steps."""
    from tqdm import tqdm

    began = time.monotonic()
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(desc=name, total=seconds, bar_format=form, **shown()) as bar:

        def on_trial(trial: Trial) -> None:
            bar.set_postfix_str(f"{trial.stage}: {trial.candidate}"[:70], refresh=False)
            bar.update(min(seconds, time.monotonic() - began) - bar.n)

        yield on_trial, bar.set_postfix_str


def _shown(result: Optimized) -> str:
    from octoai.cli.columns import Figure, aligned

    heads = ("STAGE", "SHARE", "600 TOKENS", "ONE", "EIGHT", "MIB", "SCORE", "CANDIDATE", "")
    rows = []
    for trial in result.outcome.trials:
        speed = trial.speed
        figures = (
            f"{trial.share:.3f}" if trial.share else "",
            f"{speed.first_token_seconds:.2f} s" if speed else "",
            f"{speed.stream_rate:.0f}" if speed else "",
            f"{speed.joint_rate:.1f}" if speed else "",
            f"{trial.memory_bytes >> 20}" if speed else "",
            f"{trial.score:.2f}" if trial.score else "",
        )
        rows.append([trial.stage, *map(Figure, figures), str(trial.candidate), trial.note])
    given = "the file as given" if result.is_exact else "the file as given, as llama.cpp computes it"
    lines = [
        aligned(heads, rows),
        *(
            f"{name}: {loss.kl_nats:.5f} nats from {given}; "
            f"the most likely token is the same at {loss.same_top:.1%} of positions\n"
            for name, loss in _losses(result).items()
        ),
    ]
    if result.no_kernels:
        lines.append(f"{result.no_kernels}\n")
    if result.profile is not None:
        lines.append(f"chosen: {result.profile.candidate}\n")
        if result.profile.ratios:
            prompt, stream, joint = result.profile.ratios
            lines.append(
                f"times the engine's defaults: {joint:.2f} for eight requests at once, {stream:.2f} for one stream, "
                f"{prompt:.2f} for a long prompt\n"
            )
        lines.append(
            f"stored in {result.place}{f'; the plot is {result.plot}' if result.plot else ''}\n"
            "a service that runs already uses it from its next start on\n"
        )
    return "".join(lines)


def _described(result: Optimized) -> dict[str, Any]:
    outcome = result.outcome
    return {
        "profile": asdict(result.profile) if result.profile else None,
        "place": str(result.place) if result.place else None,
        "plot": str(result.plot) if result.plot else None,
        "is_interrupted": outcome.is_interrupted,
        "losses": {
            name: {"kl_nats": loss.kl_nats, "same_top": loss.same_top} for name, loss in _losses(result).items()
        },
        "is_exact": result.is_exact,
        "no_kernels": result.no_kernels or None,
        "older": result.older or None,
        "trials": [asdict(trial) for trial in outcome.trials],
    }


def _losses(result: Optimized) -> dict[str, Loss]:
    """By what a reader calls them."""
    losses = result.outcome.losses.items()
    return {f"{weights}, compiled for this CPU" if kernels else weights: loss for (weights, kernels), loss in losses}
