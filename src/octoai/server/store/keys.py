"""Idempotency-Keys: which request was made under one, and the answer it was given."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from octoai.server.store.database import Connection

MAX_REFUNDS = 3
PRUNED_AT_ONCE, PRUNED_BYTES = 200, 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class KeyRow:
    """`request` is our id of the one that stands under the key, made by the process whose journal is named, at
    `claimed_us`, which moves on while it waits for its turn; `answer` what it was given, once it has ended; `replaces`
    the one before, which ended without an answer, until `request` runs. `num_attempts` counts it and those that it
    replaced, of which MAX_REFUNDS are given back. `answered_us` is when a text was generated, in which case its answer
    may be kept for less time than others."""

    body_hash: bytes
    request: str
    request_id: str
    journal: str
    claimed_us: int
    num_attempts: int = 1
    answer: bytes | None = None
    replaces: str | None = None
    answered_us: int | None = None

    @property
    def refunds(self) -> str | None:
        """The request that is given back what it was charged when `request` runs: not any number of times."""
        return self.replaces if self.num_attempts <= MAX_REFUNDS + 1 else None


def find(db: Connection, account: str, key: str) -> KeyRow | None:
    row = db.row(
        "SELECT body_hash, request, request_id, journal, claimed_us, num_attempts, answer, replaces, answered_us "
        "FROM keys WHERE account = ? AND key = ?",
        (account, key),
    )
    if row is None:
        return None
    body_hash, request, request_id, journal, claimed_us, num_attempts, answer, replaces, answered_us = row
    kept = None if answer is None else bytes(answer)
    return KeyRow(bytes(body_hash), request, request_id, journal, claimed_us, num_attempts, kept, replaces, answered_us)


def claim(db: Connection, account: str, key: str, claimed: KeyRow) -> KeyRow | None:
    """None when the key is ours now, otherwise what stands under it."""
    inserted = db.execute(
        "INSERT INTO keys (account, key, body_hash, request, request_id, num_attempts, journal, claimed_us) "
        "VALUES (?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT (account, key) DO NOTHING",
        (
            *(account, key, claimed.body_hash),
            *(claimed.request, claimed.request_id, claimed.journal, claimed.claimed_us),
        ),
    )
    return None if inserted else find(db, account, key)


def claim_again(db: Connection, account: str, key: str, before: KeyRow, claimed: KeyRow, replaces: str | None) -> bool:
    """Take over a key whose request has no answer; it is one attempt more where it `replaces` one that the other did
    not. False where another was quicker."""
    changed = db.execute(
        "UPDATE keys SET request = ?, request_id = ?, journal = ?, claimed_us = ?, replaces = ?, "
        "num_attempts = num_attempts + ? WHERE account = ? AND key = ? AND request = ? AND answer IS NULL",
        (
            *(claimed.request, claimed.request_id, claimed.journal, claimed.claimed_us, replaces),
            0 if replaces in (None, before.replaces) else 1,
            *(account, key, before.request),
        ),
    )
    return changed == 1


def renew(db: Connection, claims: Sequence[tuple[int, str, str, str]]) -> None:
    """(now, account, key, request) of requests that wait for their turns: nobody else takes their keys over."""
    db.execute_many(
        "UPDATE keys SET claimed_us = ? WHERE account = ? AND key = ? AND request = ? AND answer IS NULL", claims
    )


_AS_BEFORE = (
    "UPDATE keys SET request = replaces, replaces = NULL, num_attempts = num_attempts - 1, "
    "request_id = COALESCE((SELECT r.request_id FROM requests r WHERE r.id = keys.replaces), request_id) "
    "WHERE answer IS NULL AND replaces IS NOT NULL AND "
)


def release(db: Connection, account: str, key: str, request: str) -> None:
    """Of a request that never ran: the key is as if it had not been used for it."""
    db.execute(f"{_AS_BEFORE} account = ? AND key = ? AND request = ?", (account, key, request))
    db.execute(
        "DELETE FROM keys WHERE account = ? AND key = ? AND request = ? AND answer IS NULL", (account, key, request)
    )


def release_of_journal(db: Connection, journal: str) -> None:
    """Of a process that is no more: those of its requests that never ran."""
    never_ran = "NOT EXISTS (SELECT 1 FROM requests ran WHERE ran.id = keys.request)"
    db.execute(f"{_AS_BEFORE} journal = ? AND {never_ran}", (journal,))
    db.execute(
        "DELETE FROM keys WHERE journal = ? AND answer IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM requests WHERE requests.id = keys.request)",
        (journal,),
    )


def note(db: Connection, record: dict[str, Any]) -> str | None:
    """Keep the key of a request that runs or has run, and its answer once there is one. Returns whose charge is to be
    given back for it, if anybody's; that is not told again.

    Of those that were made of one request, one stands under the key and is billed: one that was answered, or else one
    that runs, or waits for its turn, or else one that ended; of two alike the one that we heard of first. Each other is
    given back when it has ended. So it does not matter in which order we hear of those that began without the database,
    but for one that never ends, because its process died: it is given back only where we hear of it before the other.
    """
    account, key, request = record["account"], record["key"], record["id"]
    claimed = KeyRow(
        *(bytes.fromhex(record["key_body"]), request, record["request_id"]),
        *(record["journal"], record["opened_us"]),
    )
    standing = claim(db, account, key, claimed)
    if standing is not None and standing.request != request:
        if standing.body_hash != claimed.body_hash:
            return None
        of_standing = _status(db, standing.request)
        if not _comes_before(db, standing, of_standing, record):
            return _given_back(db, standing, of_standing, record)
        if of_standing is None:  # it may never run; when it does, it finds this one here
            release(db, account, key, standing.request)
            return note(db, record)
        claim_again(db, account, key, standing, claimed, None if of_standing == "open" else standing.request)
        standing = find(db, account, key)
    if record.get("answer") is not None:
        keep(db, account, key, request, base64.b64decode(record["answer"]), record["settled_us"])
    if standing is None or standing.replaces is None:
        return None
    db.execute("UPDATE keys SET replaces = NULL WHERE account = ? AND key = ?", (account, key))
    return standing.refunds


def _comes_before(db: Connection, standing: KeyRow, of_standing: str | None, record: dict[str, Any]) -> bool:
    """Whether a request takes the place of the one that stands. One that was given back never does, however late it
    turns out to have been answered."""
    status = _status(db, record["id"])
    if standing.answer is not None or status == "refunded":
        return False
    return record.get("answer") is not None or (status == "open" and of_standing != "open")


def _given_back(db: Connection, standing: KeyRow, of_standing: str | None, record: dict[str, Any]) -> str | None:
    """The request, where it ends while another stands. One without an answer counts as an attempt; where the other may
    never run, the first of them is given back when that does."""
    if record["kind"] != "settlement" or standing.replaces == record["id"]:
        return None
    if record.get("answer") is not None:
        return str(record["id"])
    costs = db.row("SELECT 1 FROM requests WHERE id = ? AND cost_nanos > 0", (record["id"],))
    if costs is None or standing.num_attempts > MAX_REFUNDS:
        return None
    waits = of_standing is None and standing.replaces is None
    db.execute(
        "UPDATE keys SET num_attempts = num_attempts + 1, replaces = ? WHERE account = ? AND key = ?",
        (record["id"] if waits else standing.replaces, record["account"], record["key"]),
    )
    return None if waits else str(record["id"])


def _status(db: Connection, request: str) -> str | None:
    row = db.row("SELECT status FROM requests WHERE id = ?", (request,))
    return None if row is None else str(row[0])


def keep(db: Connection, account: str, key: str, request: str, answer: bytes, answered_us: int | None = None) -> None:
    """The answer that this request was given; of generated text with when that was."""
    sql = "UPDATE keys SET answer = ?, answered_us = ? WHERE account = ? AND key = ? AND request = ?"
    db.execute(sql, (answer, answered_us, account, key, request))


def prune(db: Connection, answered_before_us: int, before_us: int) -> bool:
    """Some of those whose text was generated, or which were claimed, too long ago; whether there may be more. After a
    rest of days there are so many that to delete all would keep everybody else from writing for seconds."""
    text = _oldest(db, "answered_us", "", answered_before_us)
    others = [] if text else _oldest(db, "claimed_us", "AND answered_us IS NULL", before_us)
    db.execute_many("DELETE FROM keys WHERE account = ? AND key = ?", text or others)
    return bool(text or others)


def _oldest(db: Connection, column: str, condition: str, before_us: int) -> list[tuple[str, str]]:
    """A few, with no more than a few megabytes of answers."""
    rows = db.rows(
        f"SELECT account, key, COALESCE(LENGTH(answer), 0) FROM keys WHERE {column} < ? {condition} "  # noqa: S608
        f"ORDER BY {column} LIMIT ?",
        (before_us, PRUNED_AT_ONCE),
    )
    sizes = accumulate(size for _, _, size in rows)
    return [
        (account, key) for (account, key, size), sum_ in zip(rows, sizes, strict=True) if sum_ - size < PRUNED_BYTES
    ]
