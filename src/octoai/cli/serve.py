"""`octoai serve`: run the service in the foreground."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from octoai.cli.messages import fail

if TYPE_CHECKING:
    from octoai.server.engines.llama import LlamaOptions
    from octoai.server.settings import Settings


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("serve", help="run the service", description=serve.__doc__)
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8000; 0: any free one)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="octoai.toml (default: the one here, if any)")
    parser.add_argument(
        "--model", action="append", default=[], metavar="ID_OR_GGUF", help="a model to serve; may be given again"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where tokens and usage are kept")
    parser.add_argument(
        "--drain-seconds", type=float, metavar="S", help="time for running requests to end (default 30)"
    )
    parser.add_argument(
        "--workers", metavar="N", help="processes that serve, for models with an engine_url (default 1)"
    )
    parser.set_defaults(run=serve)


def serve(args: argparse.Namespace) -> int:
    """Run the service until a signal ends it."""
    import os

    from octoai.cli.models import pulled
    from octoai.server import app, logs, run, shares
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.settings import BadSettings, load
    from octoai.server.sources import PullFailed, WeightStore
    from octoai.server.store import StoreError

    given = {key: getattr(args, key) for key in ("host", "port", "data_dir", "drain_seconds", "workers")}
    try:
        settings = load(path=args.config, environ=os.environ, models=args.model, overrides=given)
        shares.check(settings)
        logs.set_up(settings.log_level)
        catalogue = app.catalogue(settings)
        store = WeightStore(settings.cache_dir)
        own = [catalogue[model.id] for model in settings.models if model.engine_url is None]
        weights = {model.id: store.path(model) or pulled(store, model) for model in own}
        tuned = _tuned(settings, weights)
        # A file of the command line has an id that only this service knows.
        names = {model.id: str(model.path) if args.model and model.path else model.id for model in settings.models}
        idle = [_optimization(names[each], args.config) for each in weights if each not in tuned]
        return run.serve(settings, weights, tuned, idle if settings.optimize_when_idle == "on" else ())
    except (BadCatalogue, BadSettings, PullFailed, StoreError, run.CannotListen, run.CannotServe) as error:
        return fail(str(error))


def _tuned(settings: Settings, weights: dict[str, Path]) -> dict[str, LlamaOptions]:
    """How profiles say to run these models, whose files become those of the profiles. One line about each."""
    if not weights:
        return {}
    from octoai.optimizer.profile import BadProfile, Profiles

    profiles, found = Profiles(settings.cache_dir), {}
    for model_id, source in list(weights.items()):
        try:
            known = profiles.find(source)
        except BadProfile as error:
            fail(str(error))
            continue
        if known is not None:
            profile, weights[model_id] = known
            found[model_id] = profile.candidate.options
            print(f"octoai: profile of {model_id}: {profile}", flush=True)
    return found


def _optimization(model: str, config: Path | None) -> list[str]:
    """The command that makes a profile."""
    given = ["--config", str(config)] if config else []
    return [sys.executable, "-m", "octoai", "optimize", model, *given]
