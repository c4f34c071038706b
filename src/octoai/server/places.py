"""Where the service keeps things on this machine: models in a cache, accounts and usage in a data directory.

Pure: the environment is an argument and nothing is created until `create` is called. What lies inside the
directories is known to those who put it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


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


def expanded(path: str | Path) -> Path:
    """With the home that "~" or "~somebody" stands for; as it is where nobody knows it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _place(environ: Mapping[str, str], own: str, xdg: str, fallback: str) -> Path:
    chosen = environ.get(own)
    if chosen:
        return _expanded(chosen, environ).absolute()
    base = environ.get(xdg, "")
    # The XDG specification says that a relative path there is invalid and to be ignored.
    if base.startswith("/"):
        return Path(base, "octoai")
    return _home(environ) / fallback / "octoai"


def _expanded(text: str, environ: Mapping[str, str]) -> Path:
    path = Path(text)
    return _home(environ).joinpath(*path.parts[1:]) if path.parts[:1] == ("~",) else path


def _home(environ: Mapping[str, str]) -> Path:
    home = environ.get("HOME")
    return Path(home) if home else Path.home()
