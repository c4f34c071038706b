"""What the service keeps: one SQLite database in the data directory. SQL is nowhere else.

Migrations are numbered and run once each, in order, in one transaction; `PRAGMA user_version` says how far a
database is. Readers are never blocked by a writer (WAL).
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

FILENAME = "octoai.db"
BUSY_SECONDS = 10.0

_MIGRATIONS = (
    """
    CREATE TABLE tokens (
        id          TEXT PRIMARY KEY,
        account     TEXT NOT NULL,
        name        TEXT NOT NULL,
        hash        BLOB NOT NULL UNIQUE,
        hint        TEXT NOT NULL,
        created_at  INTEGER NOT NULL,
        revoked_at  INTEGER
    ) STRICT;
    """,
)


class StoreError(Exception):
    """The database cannot be used; the text is one line for the operator."""


def connect(data_dir: Path) -> sqlite3.Connection:
    """Open the database, creating or migrating it where needed. Only its owner can read it."""
    path = data_dir / FILENAME
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot use the database {path}: {error}") from error
    try:
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection)
    except sqlite3.Error as error:
        connection.close()
        raise StoreError(f"cannot use the database {path}: {error}") from error
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Where two processes make a new database at once, one finds it locked here: SQLite itself does not wait then."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _migrate(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise sqlite3.DatabaseError(f"it was written by a newer version of octoai (schema {version})")
    for number in range(version, len(_MIGRATIONS)):
        # Another process may be doing the same: the version is looked at again under the write lock.
        connection.execute("BEGIN IMMEDIATE")
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] == number:
                for statement in filter(str.strip, _MIGRATIONS[number].split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number + 1}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
