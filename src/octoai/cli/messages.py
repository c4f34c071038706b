"""What a person at the command line is told beside a command's result."""

from __future__ import annotations

import sys


def fail(message: str) -> int:
    """What cannot be done; returns the exit status."""
    tell(message)
    return 1


def tell(message: str) -> None:
    """One line on standard error."""
    print(f"octoai: {message}", file=sys.stderr)
