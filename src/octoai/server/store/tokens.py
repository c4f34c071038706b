"""API tokens as rows: only a hash is kept, with a hint by which a person recognises one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from octoai.server.store.accounts import LIMIT_NAMES, Limits, next_version, update_row
from octoai.server.store.database import Connection, Row


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Times are Unix seconds. `hint` is the token's first and last characters; `models` None allows every model."""

    id: str
    account: str
    name: str
    hash: bytes = field(repr=False)
    hint: str
    scopes: frozenset[str]
    models: tuple[str, ...] | None
    limits: Limits
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None


COLUMNS = (
    f"id, account, name, hash, hint, scopes, models, {', '.join(LIMIT_NAMES)}, "
    "created_at, expires_at, revoked_at, last_used_at"
)


def row_of(row: Row) -> TokenRow:
    id_, account, name, digest, hint, scopes, models, *limits, created_at, expires_at, revoked_at, last_used_at = row
    return TokenRow(
        id_,
        account,
        name,
        bytes(digest),
        hint,
        frozenset(scopes.split()),
        None if models is None else tuple(json.loads(models)),
        Limits(*limits),
        created_at,
        expires_at,
        revoked_at,
        last_used_at,
    )


def add(db: Connection, token: TokenRow) -> None:
    values = (
        *(token.id, token.account, token.name, token.hash, token.hint),
        *(_scopes(token.scopes), _models(token.models)),
        *astuple(token.limits),
        *(token.created_at, token.expires_at, token.revoked_at, token.last_used_at),
        next_version(db),
    )
    marks = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO tokens ({COLUMNS}, version) VALUES ({marks})", values)  # noqa: S608  # constants only


def find(db: Connection, token_id: str) -> TokenRow | None:
    row = db.row(f"SELECT {COLUMNS} FROM tokens WHERE id = ?", (token_id,))  # noqa: S608
    return None if row is None else row_of(row)


def by_hash(db: Connection, digest: bytes) -> TokenRow | None:
    row = db.row(f"SELECT {COLUMNS} FROM tokens WHERE hash = ?", (digest,))  # noqa: S608
    return None if row is None else row_of(row)


def all_(db: Connection, account: str | None = None) -> list[TokenRow]:
    where, values = ("", ()) if account is None else ("WHERE account = ?", (account,))
    query = f"SELECT {COLUMNS} FROM tokens {where} ORDER BY created_at, id"  # noqa: S608
    return [row_of(row) for row in db.rows(query, values)]


def num_active(db: Connection, now_us: int, account: str | None = None) -> dict[str, int]:
    """How many tokens of each account are neither revoked nor expired; accounts without any are left out."""
    where, values = ("", ()) if account is None else ("AND account = ?", (account,))
    query = (
        "SELECT account, COUNT(*) FROM tokens WHERE revoked_at IS NULL "  # noqa: S608  # constants only
        f"AND (expires_at IS NULL OR expires_at > ?) {where} GROUP BY account"
    )
    return dict(db.rows(query, (now_us // 1_000_000, *values)))


def update(db: Connection, token_id: str, changes: Mapping[str, Any]) -> bool:
    """`changes` by the names of columns, `scopes` and `models` as in `TokenRow`. False where there is no such token."""
    written = dict(changes)
    if "scopes" in written:
        written["scopes"] = _scopes(written["scopes"])
    if "models" in written:
        written["models"] = _models(written["models"])
    return update_row(db, "tokens", token_id, written)


def revoke(db: Connection, token_id: str, at: int) -> bool:
    """False where there is no such token, or it was revoked before."""
    sql = "UPDATE tokens SET revoked_at = ?, version = ? WHERE id = ? AND revoked_at IS NULL"
    return db.execute(sql, (at, next_version(db), token_id)) == 1


def used(db: Connection, times: Mapping[str, int]) -> None:
    """When tokens were last used, by their id. Not a change that copies need to hear of."""
    later: Iterable[tuple[int, str, int]] = ((at, token_id, at) for token_id, at in sorted(times.items()))
    db.execute_many(
        "UPDATE tokens SET last_used_at = ? WHERE id = ? AND (last_used_at IS NULL OR last_used_at < ?)", later
    )


def _scopes(scopes: Iterable[str]) -> str:
    return " ".join(sorted(scopes))


def _models(models: Iterable[str] | None) -> str | None:
    return None if models is None else json.dumps(list(models))


def is_empty(db: Connection) -> bool:
    return db.row("SELECT 1 FROM tokens LIMIT 1") is None
