"""`octoai serve`: run the service in the foreground."""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octoai.cli import signals

if TYPE_CHECKING:
    from octoai.server.engines.llama.options import LlamaOptions
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
    signals.hear()
    try:
        return _serve(args)
    except SystemExit:  # once it serves, signals are heard by its loop
        _fail("stopped before it served")
        raise


def _serve(args: argparse.Namespace) -> int:
    import os

    from octoai.cli.models import pulled
    from octoai.errors import ConfigurationError
    from octoai.server import app, logs, run
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.engines.llama.header import is_gguf
    from octoai.server.journal import JournalError, JournalGap
    from octoai.server.settings import BadSettings, load
    from octoai.server.sources import PullFailed, WeightStore
    from octoai.server.store import StoreError
    from octoai.server.workers import shares

    given = {key: getattr(args, key) for key in ("host", "port", "data_dir", "drain_seconds", "workers")}
    try:
        settings = load(path=args.config, environ=os.environ, models=args.model, overrides=given)
        shares.check(settings)
        logs.set_up(settings.log_level)
        catalogue = app.catalogue(settings)
        weights, tuned, searches = {}, {}, []
        if own := [catalogue[model.id] for model in settings.models if model.engine_url is None]:
            store = WeightStore(settings.cache)
            weights = {model.id: store.verified(model, logs.tell) or pulled(store, model) for model in own}
        for source in weights.values():
            if not is_gguf(source):
                return _fail(f"{source} is not a GGUF file, or cannot be read: give another")
        for model, source in list(weights.items()):
            if (known := _profile(settings, model, source)) is not None:
                weights[model], tuned[model] = known
            else:
                command = _optimization(settings, model, args)
                searches.append(run.Search(model, command, partial(_profile, settings, model, source)))
                _say_unknown(model, command, settings)
        return run.serve(settings, weights, tuned, searches if settings.optimize_when_idle == "on" else ())
    except (BadCatalogue, BadSettings, ConfigurationError, JournalGap, PullFailed, StoreError) as error:
        return _fail(str(error))
    except (run.CannotListen, run.CannotServe) as error:
        return _fail(str(error))
    except JournalError as error:
        return _fail(f"{error} To start without what is there, move that journal's files to another directory.")


def _fail(message: str) -> int:
    """As every command has it; but where nobody reads it, a service that ends would wait for them for ever."""
    from octoai.server import logs

    logs.tell(message)
    return 1


def _profile(settings: Settings, model: str, source: Path) -> tuple[Path, LlamaOptions] | None:
    """How a profile says to run the model in that file, and the file to run then. One line about it."""
    from octoai.optimizer.profile import BadProfile, Profiles
    from octoai.server import logs
    from octoai.server.run import say

    try:
        known = Profiles(settings.cache).find(source)
    except BadProfile as error:
        logs.tell(str(error))
        return None
    if known is None:
        return None
    profile, weights = known
    say(f"octoai: profile of {model}: {profile}")
    return weights, profile.candidate.options


def _say_unknown(model: str, command: list[str], settings: Settings) -> None:
    from octoai.server.run import say

    asked = shlex.join(["octoai", *command[4:]])  # what is before it is Python's
    what = "is run while nobody asks" if settings.optimize_when_idle == "on" else "finds what is fastest here"
    say(f"octoai: {model} runs with the defaults; `{asked}` {what}")


def _optimization(settings: Settings, model: str, args: argparse.Namespace) -> list[str]:
    """The command that makes a profile."""
    # A file of the command line has an id that only this service knows.
    path = next((each.path for each in settings.models if each.id == model and args.model), None)
    given = ["--config", str(args.config)] if args.config else []
    return [sys.executable, "-P", "-m", "octoai", "optimize", str(path or model), *given]
