"""What others ask of the writer's thread: one thing to do in its transaction, and what became of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from octoai.server.store.database import Connection, StoreAway, StoreFull, Undone

T = TypeVar("T")
Action = Callable[[Connection], Any]


@dataclass(slots=True)
class Work:
    """`is_kept`: where the database is away it is done when that is back."""

    action: Action
    is_durable: bool
    is_kept: bool = False
    done: Future[Any] = field(default_factory=Future)


def done(db: Connection, work: Work) -> tuple[Any, BaseException | None]:
    """Its result or what it raised (no room for it alone: away). A database that fails as a whole is raised here."""
    try:
        with db.savepoint():
            return work.action(db), None
    except (StoreAway, Undone):
        raise
    except Exception as error:  # told to the one who asked
        if not isinstance(error, StoreFull):
            return None, error
        if work.is_kept:  # it has to be done some time
            raise
        return None, StoreAway(str(error))


def resolve(asked: Future[T], result: Any, error: BaseException | None) -> None:
    with contextlib.suppress(Exception):  # whoever waited has left
        if error is not None:
            asked.set_exception(error)
        else:
            asked.set_result(result)
