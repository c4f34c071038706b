"""What has changed of accounts, tokens and prices since a version: for copies in memory that stay fresh."""

from __future__ import annotations

from dataclasses import dataclass

from octoai.server.store import accounts, prices, tokens
from octoai.server.store.accounts import AccountRow
from octoai.server.store.database import Connection
from octoai.server.store.prices import PriceRow
from octoai.server.store.tokens import TokenRow


@dataclass(frozen=True, slots=True)
class Changes:
    """`is_all`: what is not among them is not there any more."""

    version: int
    is_all: bool = False
    accounts: tuple[AccountRow, ...] = ()
    tokens: tuple[TokenRow, ...] = ()
    prices: tuple[PriceRow, ...] = ()


def version_of(db: Connection) -> int:
    """Of the newest change."""
    row = db.row("SELECT value FROM versions WHERE name = 'directory'")
    assert row is not None
    return int(row[0])


def changes_since(db: Connection, version: int) -> Changes:
    """Every row with a higher version. `version` 0 is everything there is, and so is one that the database has not come
    to, having gone back in time: a standby that was behind has taken its place, or a copy was restored."""
    with db.snapshot():
        latest = version_of(db)
        if latest < version:
            version = 0
        return Changes(
            latest,
            version == 0,
            tuple(map(accounts.row_of, _newer(db, "accounts", accounts.COLUMNS, version))),
            tuple(map(tokens.row_of, _newer(db, "tokens", tokens.COLUMNS, version))),
            tuple(map(prices.row_of, _newer(db, "prices", prices.COLUMNS, version))),
        )


def _newer(db: Connection, table: str, columns: str, version: int) -> list[tuple[object, ...]]:
    return db.rows(f"SELECT {columns} FROM {table} WHERE version > ?", (version,))  # noqa: S608  # constants only
