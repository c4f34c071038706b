"""The `octoai` command. Each subcommand is a thin function: it reads arguments, calls, prints, returns a status.

Exit statuses: 0 done, 1 it could not be done (one line on standard error says why and what to do), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from octoai.cli import account, ledger, models, optimize, price, serve, statement, token, usage
from octoai.cli.messages import fail
from octoai.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    _take_every_character()
    parser = argparse.ArgumentParser(prog="octoai", description="Text generation on your own machine.")
    parser.add_argument("--version", action="version", version=f"octoai {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (serve, optimize, account, token, price, usage, statement, ledger, models):
        command.add_parsers(subparsers)
    try:
        args = parser.parse_args(arguments)
        status = int(args.run(args))
        _flush()
        return status
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("octoai"):
            raise
        return fail(missing(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read it has seen enough
        _drop_output()
        return 1
    except OSError as error:  # no room for what is printed, for one
        try:
            _flush()
        except OSError:
            _drop_output()
        said = error.strerror or str(error) or type(error).__name__
        return fail(said + (f": {error.filename}" if error.filename else ""))


def _take_every_character() -> None:
    """One that the output's encoding does not have is shown by its number, as on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush() -> None:
    if sys.stdout is not None:  # it may have been closed by who started us
        sys.stdout.flush()


def _drop_output() -> None:
    """Python would complain once more when it flushes at its end."""
    if sys.stdout is not None:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def missing(error: ModuleNotFoundError) -> str:
    """What to install, on one line."""
    package = (error.name or "a package").partition(".")[0]
    if package == "psycopg":
        return "psycopg is not installed; a database in PostgreSQL needs: pip install 'octoai[server,postgres]>=1.12'"
    return f"{package} is not installed; the service needs: pip install 'octoai[server]>=1.12'"
