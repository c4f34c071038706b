"""What commands have in common that read or change the service's database, also while the service runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from octoai.cli.messages import fail

if TYPE_CHECKING:
    from octoai.server.settings import Settings
    from octoai.server.store import Connection, Place


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the service's data directory")
    parser.add_argument("--config", type=Path, metavar="FILE", help="octoai.toml (default: the one here, if any)")


def with_database(
    args: argparse.Namespace, action: Callable[[Connection, Settings], int], *, creates: bool = False
) -> int:
    """Run a command on the database; what is wrong is told in one line. The action makes its own transactions. Where
    there is no database yet, only a command that `creates` something makes one."""
    from octoai.server.accounts import BadAccount
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.settings import BadSettings, load
    from octoai.server.store import StoreError, connect

    try:
        settings = load(path=args.config, environ=os.environ, overrides={"data_dir": args.data_dir})
        if not creates:
            _check_it_is_there(settings.place)
        with closing(connect(settings.place)) as db:
            return action(db, settings)
    except (BadAccount, BadCatalogue, BadSettings, StoreError) as error:
        return fail(str(error))


def _check_it_is_there(place: Place) -> None:
    """A mistyped directory would be made, and its new books found whole. PostgreSQL makes no database by itself."""
    from octoai.server.store import FILENAME, StoreError

    if place.url is not None:
        return
    try:
        os.stat(place.data_dir / FILENAME)
    except FileNotFoundError:
        raise StoreError(
            f"there is no database in {str(place.data_dir)!r}: give the service's --data-dir, or make one with "
            "`octoai serve`"
        ) from None
    except (OSError, ValueError):
        pass  # why it cannot be used is told by who opens it
