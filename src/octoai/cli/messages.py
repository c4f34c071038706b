"""What a person at the command line is told when something cannot be done."""

from __future__ import annotations

import sys


def fail(message: str) -> int:
    """One line on standard error; returns the exit status."""
    print(f"octoai: {message}", file=sys.stderr)
    return 1
