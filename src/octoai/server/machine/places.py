"""Where the service keeps things on this machine: models in a cache, accounts and usage in a data directory.

The environment is an argument and nothing is created until `create` is called. What lies inside the directories is
known to those who put it there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from octoai import _credentials

NOWHERE = Path(os.devnull, "octoai")
"""In place of what would be in a home that nobody knows: nothing is there, and nothing can be made there."""
_SPARE_BYTES = 64 << 20  # what a disk should still have afterwards


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Downloaded weights: safe to delete, they are fetched again."""
    return _place(environ, "OCTOAI_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def data_dir(environ: Mapping[str, str]) -> Path:
    """Accounts, tokens and usage: what a backup must hold."""
    return _place(environ, "OCTOAI_DATA_DIR", "XDG_DATA_HOME", ".local/share")


def create(path: Path) -> Path:
    """The directory, made when missing, for its owner alone. One that is there keeps its mode."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def lack_of_space(directory: Path, num_bytes: int) -> str | None:
    """One line that so many bytes do not fit on that disk, and what to do; None where they do. Raises OSError."""
    needed, free = num_bytes + _SPARE_BYTES, shutil.disk_usage(directory).free
    if free >= needed:
        return None
    return (
        f"not enough disk space in {directory}: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; "
        "delete something there, or set OCTOAI_CACHE_DIR to a larger disk"
    )


def expanded(path: str | Path) -> Path:
    """With the home that "~" or "~somebody" stands for; as it is where nobody knows it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def known(path: str | Path) -> Path:
    """As `expanded`, for a place where something is kept: NOWHERE, if nobody knows what "~" stands for."""
    found = expanded(path)
    return NOWHERE if found.parts[:1] == ("~",) else found


def here() -> Path:
    """The directory we are in, also where somebody has deleted it."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path()


def configuration(name: str, environ: Mapping[str, str]) -> Path | None:
    """The file of that name here, or else in the directory of the credentials."""
    for directory in (here(), _credentials.directory(environ)):
        # Unlike Path.is_file it does not raise where we may not enter.
        if directory is not None and os.path.isfile(file := Path(directory, name)):
            return file
    return None


def _place(environ: Mapping[str, str], own: str, xdg: str, fallback: str) -> Path:
    chosen, base, home = environ.get(own), environ.get(xdg, ""), environ.get("HOME")
    # The XDG specification says that a relative path there is invalid and to be ignored.
    if not chosen and base.startswith("/"):
        return Path(base, "octoai")
    path = Path(chosen or f"~/{fallback}/octoai")
    if home and path.parts[:1] == ("~",):
        path = Path(home, *path.parts[1:])
    return known(path).absolute()
