"""What the service keeps, in SQLite in the data directory or in PostgreSQL. SQL is nowhere else.

Functions take a `Connection` first and do one thing; who calls them decides what is one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from octoai.server.store.database import Conflict, Connection, StoreAway, StoreError, StoreFull
from octoai.server.store.sqlite import FILENAME, SqliteConnection

__all__ = ["FILENAME", "Conflict", "Connection", "Place", "StoreAway", "StoreError", "StoreFull", "connect"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the database is: a file in the data directory, or, with `url`, PostgreSQL. The URL may hold a password."""

    data_dir: Path
    url: str | None = field(default=None, repr=False)


def connect(place: Place, *, migrate: bool = True) -> Connection:
    """Open the database, creating or migrating it where needed. Raises StoreError with one line for the operator."""
    connection: SqliteConnection | PostgresConnection
    if place.url is None:
        connection = SqliteConnection(place.data_dir / FILENAME)
    else:
        from octoai.server.store.postgres import PostgresConnection

        connection = PostgresConnection(place.url)
    try:
        if migrate:
            connection.migrate()
    except BaseException:
        connection.close()
        raise
    return connection
