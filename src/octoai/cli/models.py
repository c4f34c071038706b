"""`octoai pull` and `octoai models`: bring weights to this machine, and show which models there are.

Light to import: the catalogue and the sources are loaded when a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octoai.cli.messages import fail, shown, tell

if TYPE_CHECKING:
    from octoai.server.catalogue import Catalogue, Model
    from octoai.server.sources import Progress, WeightStore


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pulling = subparsers.add_parser("pull", help="download the weights of models", description=pull.__doc__)
    pulling.add_argument("ids", nargs="+", metavar="ID", help="a model's id or alias; `octoai models` lists them")
    pulling.set_defaults(run=pull)
    listing = subparsers.add_parser("models", help="list the models there are", description=models.__doc__)
    listing.add_argument("--json", action="store_true", help="for programs: a JSON list")
    listing.set_defaults(run=models)
    for parser in (pulling, listing):
        parser.add_argument("--config", type=Path, metavar="FILE", help="octoai.toml (default: the one here, if any)")


def pull(args: argparse.Namespace) -> int:
    """Download the weights of models and print where they lie."""
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.settings import BadSettings
    from octoai.server.sources import PullFailed

    try:
        catalogue, store = _catalogue_and_store(args.config)
        for model in [catalogue.named(name) for name in args.ids]:
            print(pulled(store, model), flush=True)
    except (BadCatalogue, BadSettings, PullFailed) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        tell("stopped; nothing half-done was left in place")
        return 130
    return 0


def models(args: argparse.Namespace) -> int:
    """Show the models there are: context, price per million tokens, licence, where the weights are."""
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.settings import BadSettings

    try:
        catalogue, store = _catalogue_and_store(args.config)
    except (BadCatalogue, BadSettings) as error:
        return fail(str(error))
    if args.json:
        print(json.dumps([_described(model, store.path(model)) for model in catalogue.values()], indent=2))
    else:
        heads = ("ID", "CONTEXT", "IN $/1M", "OUT $/1M", "LICENCE", "WEIGHTS")
        print(*_aligned([heads, *(_row(model, store.path(model)) for model in catalogue.values())]), sep="\n")
    return 0


def _catalogue_and_store(config: Path | None) -> tuple[Catalogue, WeightStore]:
    """With the models of octoai.toml, where there is one."""
    from octoai.server import app
    from octoai.server.settings import load
    from octoai.server.sources import WeightStore

    settings = load(path=config, environ=os.environ)
    return app.catalogue(settings), WeightStore(settings.cache)


def pulled(store: WeightStore, model: Model) -> Path:
    if present := store.verified(model, tell):
        tell(f"{model.id} is already here")
        return present
    if model.source is None or model.source.kind == "file":
        return store.pull(model)  # nothing is downloaded
    with _bar(model) as progress:
        return store.pull(model, progress)


@contextmanager
def _bar(model: Model) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(
        desc=model.id,
        total=model.size_bytes,
        unit="B",
        unit_scale=True,
        miniters=1,
        **shown(),
    ) as bar:

        def progress(done_bytes: int, total_bytes: int | None) -> None:
            bar.total = total_bytes or bar.total
            bar.update(done_bytes - bar.n)

        yield progress


def _row(model: Model, path: Path | None) -> tuple[str, ...]:
    context = "-" if model.context_length is None else str(model.context_length)
    return (
        model.id,
        context,
        _price(model.input_price_nanos) or "-",
        _price(model.output_price_nanos) or "-",
        model.licence or "-",
        _where(model, path),
    )


def _where(model: Model, path: Path | None) -> str:
    if path:
        return f"{path} ({path.stat().st_size / 1e6:,.0f} MB)"
    return "available to pull" if model.source else "no weights"


def _described(model: Model, path: Path | None) -> dict[str, Any]:
    state = "on_disk" if path else "available" if model.source else "none"
    return {
        "id": model.id,
        "aliases": model.aliases,
        "kind": model.kind,
        "context_length": model.context_length,
        "licence": model.licence,
        "usd_per_million_tokens": {
            "input": _price(model.input_price_nanos),
            "cached_input": _price(model.cached_input_price_nanos),
            "output": _price(model.output_price_nanos),
        },
        "weights": {
            "state": state,
            "path": str(path) if path else None,
            "size_bytes": path.stat().st_size if path else model.size_bytes,
        },
    }


def _price(nanos: int | None) -> str | None:
    from octoai.server.catalogue import price_usd_per_million

    return None if nanos is None else price_usd_per_million(nanos)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = {1, 2, 3}  # the numbers
    for row in rows:
        cells = [
            cell.rjust(width) if column in to_the_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
