"""What has changed of accounts, tokens and prices since a version: for copies in memory that stay fresh."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from octoai.server.store import accounts, prices, tokens
from octoai.server.store.accounts import AccountRow
from octoai.server.store.database import Connection, Row
from octoai.server.store.prices import PriceRow
from octoai.server.store.tokens import TokenRow

PORTION, REST_SECONDS = 300, 0.0005
_TOKENS = tokens.COLUMNS.replace("last_used_at", "NULL")  # it changes all the time, and copies need it for nothing

Named = TypeVar("Named", AccountRow, TokenRow)
Key = TypeVar("Key", str, bytes)


@dataclass(frozen=True, slots=True)
class Changes:
    """Accounts by their ids, tokens by their hashes. `is_all`: what is not among them is not there any more."""

    version: int
    is_all: bool = False
    accounts: dict[str, AccountRow] = field(default_factory=dict)
    tokens: dict[bytes, TokenRow] = field(default_factory=dict)
    prices: tuple[PriceRow, ...] = ()


def version_of(db: Connection) -> int:
    """Of the newest change."""
    row = db.row("SELECT value FROM versions WHERE name = 'directory'")
    assert row is not None
    return int(row[0])


def changes_since(
    db: Connection, version: int, known_accounts: Mapping[str, AccountRow], known_tokens: Mapping[bytes, TokenRow]
) -> Changes:
    """Every row with a higher version. `version` 0 is everything there is, and so is one that the database has not come
    to, having gone back in time: a standby that was behind has taken its place, or a copy was restored."""
    with db.snapshot():
        latest = version_of(db)
        if latest < version:
            version = 0
        return Changes(
            latest,
            version == 0,
            _by(_account_id, map(accounts.row_of, _newer(db, "accounts", accounts.COLUMNS, version)), known_accounts),
            _by(_token_hash, map(tokens.row_of, _newer(db, "tokens", _TOKENS, version)), known_tokens),
            tuple(map(prices.row_of, _newer(db, "prices", prices.COLUMNS, version))),
        )


def _account_id(row: AccountRow) -> str:
    return row.id


def _token_hash(row: TokenRow) -> bytes:
    return row.hash


def _by(key: Callable[[Named], Key], rows: Iterator[Named], known: Mapping[Key, Named]) -> dict[Key, Named]:
    """Rows by their keys; those that are as they are `known` are those. When all of 200,000 are read again, the service
    goes on beside it: it is given rests, and no new objects, which would have all that it has looked at for garbage."""
    found: dict[Key, Named] = {}
    for number, row in enumerate(rows, 1):
        name = key(row)
        before = known.get(name)
        found[name] = before if before is not None and before == row else row
        if known and number % PORTION == 0:
            time.sleep(REST_SECONDS)
    return found


def _newer(db: Connection, table: str, columns: str, version: int) -> Iterator[Row]:
    return db.stream(f"SELECT {columns} FROM {table} WHERE version > ?", (version,))  # noqa: S608  # constants only
