"""`octoai token …`: API tokens, also while the service runs."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from octoai.cli import limits
from octoai.cli.columns import aligned
from octoai.cli.database import add_options, with_database
from octoai.cli.messages import fail, tell
from octoai.cli.words import minute

if TYPE_CHECKING:
    from octoai.server.settings import Settings
    from octoai.server.store import Connection

SCOPES = ("inference", "usage", "admin")
_DAYS = re.compile(r"([0-9]{1,5})d")


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("token", help="create, change and revoke API tokens", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    creating = actions.add_parser("create", help="make a token and print it, once")
    creating.add_argument("--name", required=True, help="what it is for; shown by `octoai token list`")
    creating.add_argument("--account", default="default", metavar="ID", help="who pays (default: default)")
    listing = actions.add_parser("list", help="show every token, without its secret")
    listing.add_argument("--account", metavar="ID", help="only those of one account")
    listing.add_argument("--json", action="store_true", help="for programs")
    updating = actions.add_parser("update", help="change what is given, and nothing else")
    updating.add_argument("--name", help="what it is for")
    revoking = actions.add_parser("revoke", help="refuse a token from now on")
    for action in (updating, revoking):
        action.add_argument("id", metavar="ID", help="its id, from `octoai token list`")
    for action in (creating, updating):
        _add_settings(action)
    for action, run in {creating: create, listing: list_, updating: update, revoking: revoke}.items():
        action.set_defaults(run=run)
        add_options(action)


def _add_settings(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--scope",
        dest="scopes",
        action="append",
        choices=SCOPES,
        help="what it may do; may be given again (default: inference and usage)",
    )
    action.add_argument(
        "--model", dest="models", action="append", metavar="ID", help='a model it may use ("none": all; the default)'
    )
    action.add_argument("--expires", metavar="DATE", help='a date or moment (UTC), or days from now: "30d", or "none"')
    limits.add_options(action)


def create(args: argparse.Namespace) -> int:
    def run(db: Connection, settings: Settings) -> int:
        from octoai.server import tokens

        chosen, own = limits.given(args), _given(args)
        own.setdefault("scopes", tokens.DEFAULT_SCOPES)
        with db.transaction():
            minted = tokens.mint(db, args.name, args.account, limits=chosen, **own)
        tell(f"token {minted.id} of {args.account}, shown once:")
        print(minted.text, flush=True)  # before all that may fail: nobody is told it again
        _warn_of_unknown(own.get("models"), settings)
        return 0

    return with_database(args, run, creates=True)


def update(args: argparse.Namespace) -> int:
    def run(db: Connection, settings: Settings) -> int:
        from octoai.server import tokens

        changes = {**_given(args), **limits.given(args)}
        if args.name is not None:
            changes["name"] = args.name
        with db.transaction():
            tokens.update(db, args.id, changes)
        _warn_of_unknown(changes.get("models"), settings)
        print(f"updated {args.id}")
        return 0

    return with_database(args, run)


def list_(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        from octoai.server import accounts
        from octoai.server.api import views
        from octoai.server.store import accounts as account_table
        from octoai.server.store import tokens as table

        owner = None if args.account is None else accounts.find(db, args.account).id
        found = [views.token(row) for row in table.all_(db, owner)]
        if args.json:
            print(json.dumps(found, indent=2))
            return 0
        closed = {row.id for row in account_table.all_(db) if row.closed_at is not None}
        heads = ("ID", "ACCOUNT", "TOKEN", "SCOPES", "MODELS", "STATE", "EXPIRES", "LAST USED", "CREATED", "NAME")
        print(aligned(heads, [_row(token, closed) for token in found]), end="")
        return 0

    return with_database(args, run)


def revoke(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        from octoai.server import tokens

        with db.transaction():
            was_active = tokens.revoke(db, args.id)
        if not was_active:
            return fail(f"there is no active token {args.id!r:.80}; `octoai token list` shows them")
        print(f"revoked {args.id}")
        return 0

    return with_database(args, run)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Scopes, models and expiry where they were given. Raises BadAccount."""
    given: dict[str, Any] = {}
    if args.scopes is not None:
        given["scopes"] = args.scopes
    if args.models is not None:
        given["models"] = None if args.models == ["none"] else args.models
    if args.expires is not None:
        given["expires_at"] = None if args.expires == "none" else _moment(args.expires)
    return given


def _warn_of_unknown(models: Sequence[str] | None, settings: Settings) -> None:
    """No more than that: a token may be there before the model."""
    if not models:
        return
    from octoai.server import app
    from octoai.server.catalogue import BadCatalogue

    catalogue = app.catalogue(settings)
    for name in models:
        try:
            catalogue.named(name)
        except BadCatalogue as error:
            tell(f"--model: {error}; the token may use it once it is there")


def _moment(text: str) -> int:
    """Unix seconds of a date, a moment, or so many days from now."""
    days = _DAYS.fullmatch(text)
    if days is not None:
        return int(time.time()) + int(days[1]) * 86400
    from octoai.cli.dates import moment
    from octoai.server.accounts import BadAccount

    try:
        return moment(text) // 1_000_000
    except ValueError as error:
        raise BadAccount(f"--expires: {error}") from None


def _row(token: dict[str, Any], closed: set[str]) -> tuple[str, ...]:
    return (
        token["id"],
        token["account"],
        token["hint"],
        ",".join(token["scopes"]),
        "all" if token["models"] is None else ",".join(token["models"]),
        _state(token, closed),
        minute(token["expires_at"]),
        minute(token["last_used_at"]),
        minute(token["created_at"]),
        token["name"],
    )


def _state(token: dict[str, Any], closed: set[str]) -> str:
    if token["revoked_at"] is not None:
        return "revoked"
    if token["expires_at"] is not None and token["expires_at"] <= time.time():
        return "expired"
    return "account closed" if token["account"] in closed else "active"
