"""What every source of weights shares: how progress is told, what is handed back, how a pull fails.

It knows no source.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octoai.server.machine.places import lack_of_space

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and, where known, the bytes in all."""


class PullFailed(Exception):
    """Weights that could not be had; the text is one line that says why and what to do next."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is complete but neither verified nor in its place."""

    path: Path
    published_sha256: str | None = None
    """What the source itself says the file's checksum is, where it does."""


def said(error: Exception) -> str:
    """What it says, on one line. What is before an `@` in a word, as in an address, may be a password."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"(\w+://)?\S*@", r"\1", line)


def require_space(directory: Path, num_bytes: int) -> None:
    """Raises PullFailed."""
    if (lack := lack_of_space(directory, num_bytes)) is not None:
        raise PullFailed(lack)
