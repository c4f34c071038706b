"""What a person at the command line is told beside a command's result."""

from __future__ import annotations

import sys
from typing import Any, TextIO


def fail(message: str) -> int:
    """What cannot be done; returns the exit status."""
    tell(message)
    return 1


def output() -> TextIO:
    """Standard output, for what is nothing without it. Whoever started us may have closed it: that ends the command."""
    if sys.stdout is None:
        raise SystemExit(fail("there is no standard output to write to"))
    return sys.stdout


def tell(message: str) -> None:
    """One line on standard error, unless whoever started us has closed it: `print` would take the other one then."""
    if sys.stderr is not None:
        print(f"octoai: {message}", file=sys.stderr)


def shown() -> dict[str, Any]:
    """How tqdm shows a bar on standard error: a log gets a line every ten seconds, a terminal ten a second, what is
    closed nothing."""
    if sys.stderr is None:
        return {"disable": True}
    return {"mininterval": 0.1 if sys.stderr.isatty() else 10.0}
