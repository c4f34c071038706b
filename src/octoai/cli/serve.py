"""`octoai serve`: run the service in the foreground."""

from __future__ import annotations

import argparse
from pathlib import Path

from octoai.cli.messages import fail


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
    parser.set_defaults(run=serve)


def serve(args: argparse.Namespace) -> int:
    """Run the service until a signal ends it."""
    import os

    from octoai.cli.models import pulled
    from octoai.server import app, logs, run
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.settings import BadSettings, load
    from octoai.server.sources import PullFailed, WeightStore
    from octoai.server.store import StoreError

    given = {key: getattr(args, key) for key in ("host", "port", "data_dir", "drain_seconds")}
    try:
        settings = load(path=args.config, environ=os.environ, models=args.model, overrides=given)
        logs.set_up(settings.log_level)
        catalogue = app.catalogue(settings)
        store = WeightStore(settings.cache_dir)
        own = [catalogue[model.id] for model in settings.models if model.engine_url is None]
        return run.serve(settings, {model.id: store.path(model) or pulled(store, model) for model in own})
    except (BadCatalogue, BadSettings, PullFailed, StoreError, run.CannotServe) as error:
        return fail(str(error))
