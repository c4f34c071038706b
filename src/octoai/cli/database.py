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
    from octoai.server.store import Connection


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the service's data directory")
    parser.add_argument("--config", type=Path, metavar="FILE", help="octoai.toml (default: the one here, if any)")


def with_database(args: argparse.Namespace, action: Callable[[Connection, Settings], int]) -> int:
    """Run a command on the database; what is wrong is told in one line. The action makes its own transactions."""
    from octoai.server.accounts import BadAccount
    from octoai.server.catalogue import BadCatalogue
    from octoai.server.settings import BadSettings, load
    from octoai.server.store import StoreError, connect

    try:
        settings = load(path=args.config, environ=os.environ, overrides={"data_dir": args.data_dir})
        with closing(connect(settings.place)) as db:
            return action(db, settings)
    except (BadAccount, BadCatalogue, BadSettings, StoreError) as error:
        return fail(str(error))
