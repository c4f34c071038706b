"""What both databases have in common: a connection, its errors, and one dialect of SQL.

Statements are written once, with `?` for parameters and types that both know. What differs is behind `Connection`:
how a transaction begins, how a row is locked, how an error is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Row = tuple[Any, ...]
Parameters = Sequence[Any]
CHUNK = 400  # parameters of one IN (…): SQLite's older limit is 999


def chunks(values: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """For `IN (…)`, in order: the marks between the brackets, and what they stand for."""
    ordered = sorted(values)
    for start in range(0, len(ordered), CHUNK):
        chunk = ordered[start : start + CHUNK]
        yield ", ".join("?" * len(chunk)), chunk


class StoreError(Exception):
    """The database cannot be used; the text is one line for the operator.

    StoreError
    ├── StoreAway   it does not answer, or is locked: the same may work later
    │   └── NotAsked    and it will not do later what it was to do now
    ├── StoreFull   it has no room for more
    │   └── Undone      and nothing is left of the transaction, whoever else is in it
    └── Conflict    a row with that key is there already
    """


class StoreAway(StoreError):
    pass


class NotAsked(StoreAway):
    pass


class StoreFull(StoreError):
    pass


class Undone(StoreFull):
    pass


class Conflict(StoreError):
    pass


class Connection(Protocol):
    """One connection, used by one thread at a time.

    `portion` is how many of the journal's records are brought in before others may have the core."""

    portion: int

    def row(self, sql: str, parameters: Parameters = ()) -> Row | None: ...

    def rows(self, sql: str, parameters: Parameters = ()) -> list[Row]: ...

    def stream(self, sql: str, parameters: Parameters = ()) -> Iterator[Row]:
        """Rows as they are read, in bounded memory; inside a transaction."""

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """The number of rows changed."""

    def execute_many(self, sql: str, rows: Iterable[Parameters]) -> None: ...

    def transaction(self) -> AbstractContextManager[None]:
        """Everything inside is written, or nothing; no other writer in between."""

    def snapshot(self) -> AbstractContextManager[None]:
        """Everything read inside is of one moment; writers are not held up."""

    def savepoint(self) -> AbstractContextManager[None]:
        """Inside a transaction: what fails in here is undone, the rest is not. Raises Undone where it is, too."""

    def set_durable(self, is_durable: bool) -> None:
        """Whether a commit waits for the disk from now on. It does at first."""

    def interrupt(self) -> None:
        """From another thread: the statement that runs now, if one does, fails soon. Not for who writes."""

    def close(self) -> None: ...
