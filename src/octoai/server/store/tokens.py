"""API tokens as rows: only a hash is kept, with a hint by which a person recognises one."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRow:
    """`created_at` and `revoked_at` are Unix seconds. `hint` is the token's first and last characters."""

    id: str
    account: str
    name: str
    hash: bytes
    hint: str
    created_at: int
    revoked_at: int | None


_COLUMNS = "id, account, name, hash, hint, created_at, revoked_at"


class TokenTable:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, row: TokenRow) -> None:
        self._connection.execute(
            f"INSERT INTO tokens ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  # constants only
            (row.id, row.account, row.name, row.hash, row.hint, row.created_at, row.revoked_at),
        )

    def by_hash(self, digest: bytes) -> TokenRow | None:
        row = self._connection.execute(
            f"SELECT {_COLUMNS} FROM tokens WHERE hash = ?",  # noqa: S608
            (digest,),
        ).fetchone()
        return None if row is None else TokenRow(*row)

    def all(self) -> list[TokenRow]:
        query = f"SELECT {_COLUMNS} FROM tokens ORDER BY created_at, id"  # noqa: S608
        return [TokenRow(*row) for row in self._connection.execute(query)]

    def revoke(self, token_id: str, at: int) -> bool:
        """False where there is no such token, or it was revoked before."""
        changed = self._connection.execute(
            "UPDATE tokens SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (at, token_id)
        )
        return changed.rowcount == 1

    def is_empty(self) -> bool:
        return self._connection.execute("SELECT 1 FROM tokens LIMIT 1").fetchone() is None
