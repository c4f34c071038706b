"""Idempotency-Keys: which request was made under one, and the answer it was given."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from octoai.server.store.database import Connection


@dataclass(frozen=True, slots=True)
class KeyRow:
    """`request` is our id of the newest request made under the key; `answer` what it was given, once it has ended."""

    body_hash: bytes
    request: str
    request_id: str
    num_attempts: int
    answer: bytes | None


def find(db: Connection, account: str, key: str) -> KeyRow | None:
    row = db.row(
        "SELECT body_hash, request, request_id, num_attempts, answer FROM keys WHERE account = ? AND key = ?",
        (account, key),
    )
    if row is None:
        return None
    return KeyRow(bytes(row[0]), row[1], row[2], row[3], None if row[4] is None else bytes(row[4]))


def claim(db: Connection, account: str, key: str, claimed: KeyRow, now_us: int) -> KeyRow | None:
    """None when the key is ours now, otherwise what stands under it."""
    inserted = db.execute(
        "INSERT INTO keys (account, key, body_hash, request, request_id, num_attempts, created_us) "
        "VALUES (?, ?, ?, ?, ?, 1, ?) ON CONFLICT (account, key) DO NOTHING",
        (account, key, claimed.body_hash, claimed.request, claimed.request_id, now_us),
    )
    return None if inserted else find(db, account, key)


def claim_again(db: Connection, account: str, key: str, before: KeyRow, claimed: KeyRow) -> bool:
    """Take over a key whose request ended without an answer. False where another was quicker."""
    changed = db.execute(
        "UPDATE keys SET request = ?, request_id = ?, num_attempts = num_attempts + 1 "
        "WHERE account = ? AND key = ? AND request = ? AND answer IS NULL",
        (claimed.request, claimed.request_id, account, key, before.request),
    )
    return changed == 1


def note(db: Connection, records: Iterable[dict[str, Any]]) -> None:
    """Keep the answers of settled requests that had a key. The key stands already where the database was there when
    the request came; where it was away, it is written now."""
    for record in records:
        if record.get("key") is None:
            continue
        answer = record.get("answer")
        claimed = KeyRow(bytes.fromhex(record["key_body"]), record["id"], record["request_id"], 1, None)
        claim(db, record["account"], record["key"], claimed, record["opened_us"])
        if answer is not None:
            db.execute(
                "UPDATE keys SET answer = ? WHERE account = ? AND key = ? AND request = ?",
                (base64.b64decode(answer), record["account"], record["key"], record["id"]),
            )


def prune(db: Connection, before_us: int) -> None:
    db.execute("DELETE FROM keys WHERE created_us < ?", (before_us,))
