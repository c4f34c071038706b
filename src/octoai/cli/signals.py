"""Signals to commands that run for long: whenever they come, they are heard."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

_AGAIN_SECONDS = 0.05


def hear() -> None:
    """From now on SIGTERM raises SystemExit. The first process of a container would not be ended by it otherwise."""
    signal.signal(signal.SIGTERM, _leave)
    sys.unraisablehook = _say_again


def _say_again(lost: sys.UnraisableHookArgs) -> None:
    """A signal that comes while something is being deleted is an exception that Python ignores: it comes once more."""
    error = lost.exc_value
    if not isinstance(error, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(lost)
        return
    again = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(again))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)
