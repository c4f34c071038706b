"""`octoai token create|list|revoke`: API tokens, also while the service runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from octoai.cli.messages import fail

if TYPE_CHECKING:
    from octoai.server.tokens import Tokens


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("token", help="create, list and revoke API tokens")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    creating = actions.add_parser("create", help="make a token and print it, once")
    creating.add_argument("--name", required=True, help="what it is for; shown by `octoai token list`")
    creating.set_defaults(run=create)
    listing = actions.add_parser("list", help="show every token, without its secret")
    listing.set_defaults(run=list_)
    revoking = actions.add_parser("revoke", help="refuse a token from now on")
    revoking.add_argument("id", help="its id, from `octoai token list`")
    revoking.set_defaults(run=revoke)
    for action in (creating, listing, revoking):
        action.add_argument("--data-dir", type=Path, metavar="DIR", help="the service's data directory")


def create(args: argparse.Namespace) -> int:
    return _with_tokens(args, lambda tokens: _create(tokens, args.name))


def list_(args: argparse.Namespace) -> int:
    return _with_tokens(args, _list)


def revoke(args: argparse.Namespace) -> int:
    return _with_tokens(args, lambda tokens: _revoke(tokens, args.id))


def _with_tokens(args: argparse.Namespace, action: Callable[[Tokens], int]) -> int:
    from octoai.server.settings import BadSettings, load
    from octoai.server.store import StoreError, connect
    from octoai.server.store.tokens import TokenTable
    from octoai.server.tokens import Tokens

    try:
        settings = load(path=None, environ=os.environ, overrides={"data_dir": args.data_dir})
        with closing(connect(settings.data_dir)) as connection:
            return action(Tokens(TokenTable(connection)))
    except (BadSettings, StoreError) as error:
        return fail(str(error))


def _create(tokens: Tokens, name: str) -> int:
    minted = tokens.mint(name)
    print(f"octoai: token {minted.id}, shown once:", file=sys.stderr)
    print(minted.text)
    return 0


def _list(tokens: Tokens) -> int:
    for row in tokens.all():
        created = datetime.fromtimestamp(row.created_at, UTC).strftime("%Y-%m-%d %H:%M")
        print(f"{row.id}  {row.hint}  {created}  {'revoked' if row.revoked_at else 'active '}  {row.name}")
    return 0


def _revoke(tokens: Tokens, token_id: str) -> int:
    if not tokens.revoke(token_id):
        return fail(f"there is no active token {token_id!r}; `octoai token list` shows them")
    print(f"revoked {token_id}")
    return 0
