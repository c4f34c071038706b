"""Records on their way to the disk, and who is told what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from octoai.server.journal.lines import START, JournalError, Position


@dataclass(slots=True)
class Pending:
    """A record that is not durable yet, and where it ends. `on_refused` is called where it does not come to be, whether
    or not anybody waits."""

    payload: bytes
    waiter: asyncio.Future[Position]
    end: Position = START
    on_refused: Callable[[JournalError], None] | None = None


END = attrgetter("end")


def resolve(records: Sequence[Pending], error: JournalError | None) -> None:
    """They are durable, or have been refused. In their loop."""
    for record in records:
        waiter = record.waiter
        if waiter.done():  # it was cancelled
            pass
        elif error is None:
            waiter.set_result(record.end)
        else:
            waiter.set_exception(error)
            waiter.exception()  # it is logged: nobody has to ask for it
        if error is not None and record.on_refused is not None:
            record.on_refused(error)
