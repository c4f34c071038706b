"""`octoai price …`: what models cost, in USD per million tokens; also while the service runs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from octoai.cli.columns import Figure, aligned
from octoai.cli.database import add_options, with_database
from octoai.cli.words import minute

if TYPE_CHECKING:
    from octoai.server.catalogue import Catalogue
    from octoai.server.settings import Settings
    from octoai.server.store import Connection
    from octoai.server.store.prices import PriceRow


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("price", help="show and set what models cost", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="show the prices in force, and those to come")
    listing.add_argument("model", nargs="?", metavar="MODEL", help="only this model's")
    listing.add_argument("--json", action="store_true", help="for programs")
    setting = actions.add_parser("set", help="set a model's price, from now on or from a moment to come")
    setting.add_argument("model", metavar="MODEL", help="its id or an alias")
    for name, meaning in (("input", "tokens of prompts"), ("output", "generated tokens")):
        setting.add_argument(f"--{name}", required=True, metavar="USD", help=f"per million {meaning}")
    setting.add_argument("--cached-input", metavar="USD", help="per million cached ones (default: as --input)")
    setting.add_argument("--from", dest="start", metavar="DATE", help="a date or moment to come, UTC (default: now)")
    for action, run in {listing: list_, setting: set_}.items():
        action.set_defaults(run=run)
        add_options(action)


def list_(args: argparse.Namespace) -> int:
    def run(db: Connection, settings: Settings) -> int:
        from octoai.server.api import views
        from octoai.server.billing import prices
        from octoai.server.billing.money import PriceBook
        from octoai.server.store import prices as table
        from octoai.server.times import now_us

        catalogue, at_us = _catalogue(settings), now_us()
        wanted = None if args.model is None else catalogue.named(args.model)
        known = table.all_(db)
        # Before the first start the catalogue's prices are not there yet: then they are what will apply.
        first = [row for row in prices.due(known, catalogue, at_us) if row.valid_from_us == 0]
        found = prices.priced(catalogue, PriceBook([*known, *first]))
        chosen = [(model, rows) for model, rows in found if wanted in (None, model)]
        if args.json:
            print(
                json.dumps(
                    [views.model_prices(model, *prices.current_and_upcoming(rows, at_us)) for model, rows in chosen],
                    indent=2,
                )
            )
            return 0
        heads = ("MODEL", "IN $/1M", "CACHED $/1M", "OUT $/1M", "FROM", "SET BY")
        lines = []
        for _, rows in chosen:
            current, upcoming = prices.current_and_upcoming(rows, at_us)
            lines += [_row(row) for row in (current, *upcoming) if row is not None]
        print(aligned(heads, lines), end="")
        return 0

    return with_database(args, run)


def set_(args: argparse.Namespace) -> int:
    def run(db: Connection, settings: Settings) -> int:
        from octoai.server.billing import prices
        from octoai.server.billing.money import Price
        from octoai.server.times import now_us

        model = _catalogue(settings).named(args.model)
        cost, output = _price(args.input, "--input"), _price(args.output, "--output")
        cached = cost if args.cached_input is None else _price(args.cached_input, "--cached-input")
        start_us = None if args.start is None else _moment(args.start)
        with db.transaction():
            row = prices.set_price(db, model, Price(cost, cached, output), start_us, now_us())
        name, *amounts, start, _ = _row(row)
        said = "{} input, {} cached input, {} output".format(*amounts)
        print(f"{name}: {said}, USD per million tokens, from {start} UTC")
        return 0

    return with_database(args, run, creates=True)


def _catalogue(settings: Settings) -> Catalogue:
    """With the models of octoai.toml, where there is one."""
    from octoai.server import app

    return app.catalogue(settings)


def _price(text: str, name: str) -> int:
    from octoai.server.accounts import BadAccount
    from octoai.server.catalogue import price_nanos

    try:
        return price_nanos(text)
    except ValueError as error:
        raise BadAccount(f"{name}: {error}") from None


def _moment(text: str) -> int:
    from octoai.cli.dates import moment
    from octoai.server.accounts import BadAccount

    try:
        return moment(text)
    except ValueError as error:
        raise BadAccount(f"--from: {error}") from None


def _row(row: PriceRow) -> tuple[str, ...]:
    from octoai.server.api import views

    shown = views.listed_price(row)
    start = minute(shown["valid_from"]) if shown["valid_from"] else "the first"
    amounts = (Figure(shown[name]) for name in ("input", "cached_input", "output"))
    return (row.model, *amounts, start, row.origin)
