"""How far the database has each journal."""

from __future__ import annotations

from octoai.server.journal import START, Position
from octoai.server.store.database import Connection, StoreAway

ENDED = Position(2**31 - 1, 0)  # behind the last byte of any journal


def keep_position(db: Connection, journal: str, position: Position) -> None:
    """How far a journal has been applied, in the same transaction as what was."""
    db.execute(
        "INSERT INTO journals (id, segment, byte) VALUES (?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET segment = excluded.segment, byte = excluded.byte",
        (journal, position.segment, position.offset),
    )


def position_of(db: Connection, journal: str) -> Position:
    row = db.row("SELECT segment, byte FROM journals WHERE id = ?", (journal,))
    return START if row is None else Position(int(row[0]), int(row[1]))


def expect(db: Connection, journal: str, position: Position) -> None:
    """In the transaction that goes on from there. Raises StoreAway where the database has gone back to before it."""
    if position_of(db, journal) < position:
        raise StoreAway("the database has gone back in time: it lacks what it had of a journal")


def end(db: Connection, journal: str) -> None:
    """The database has all of it: of its files, which go after that and before it is forgotten, none is read again."""
    keep_position(db, journal, ENDED)


def forget(db: Connection, journal: str) -> None:
    db.execute("DELETE FROM journals WHERE id = ?", (journal,))
