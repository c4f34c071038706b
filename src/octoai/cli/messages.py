"""What a person at the command line is told beside a command's result."""

from __future__ import annotations

import sys
from typing import TextIO


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
    """One line on standard error."""
    print(f"octoai: {message}", file=sys.stderr)
