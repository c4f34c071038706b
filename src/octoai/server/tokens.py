"""API tokens: minted, recognised, revoked.

A token is `octoai_`, 32 random characters, and six that are a checksum of the rest. The checksum turns away typing
errors and made-up tokens without a look anywhere, and lets scanners of leaked secrets tell real ones. What is stored
is a SHA-256 of the token: it has 190 random bits, so a slow hash would protect nothing.

Functions that change tokens take a database connection and run inside the caller's transaction; whether a request's
token is good is asked of the `Directory`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octoai.server import accounts
from octoai.server.accounts import DEFAULT_ACCOUNT, BadAccount, UnknownToken, checked_limits, checked_name
from octoai.server.store import tokens as table
from octoai.server.store.accounts import Limits
from octoai.server.store.database import Connection
from octoai.server.store.tokens import TokenRow
from octoai.server.times import MAX_TIME

PREFIX = "octoai_"
SCOPES = ("inference", "usage", "admin")
DEFAULT_SCOPES = ("inference", "usage")
MAX_MODELS = 1000
_ALPHABET = string.digits + string.ascii_letters
_RANDOM_LENGTH = 32
_CHECKSUM_LENGTH = 6
_LENGTH = len(PREFIX) + _RANDOM_LENGTH + _CHECKSUM_LENGTH


@dataclass(frozen=True, slots=True)
class Minted:
    """A new token. The text is shown once and kept nowhere."""

    id: str
    text: str = field(repr=False)


def new_token() -> str:
    body = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))
    return body + _checksum(body)


def is_well_formed(token: str) -> bool:
    """Whether the checksum fits. Costs a microsecond, and says nothing about whether the token is valid."""
    if len(token) != _LENGTH or not token.startswith(PREFIX) or not token.isascii():
        return False
    return hmac.compare_digest(_checksum(token[:-_CHECKSUM_LENGTH]), token[-_CHECKSUM_LENGTH:])


def digest(token: str) -> bytes:
    """What is stored of it."""
    return hashlib.sha256(token.encode()).digest()


def mint(
    db: Connection,
    name: str,
    account: str = DEFAULT_ACCOUNT,
    *,
    scopes: Iterable[str] = DEFAULT_SCOPES,
    models: Sequence[str] | None = None,
    expires_at: int | None = None,
    limits: Mapping[str, int | None] | None = None,
) -> Minted:
    """A new token of an account. `models` None allows all; `expires_at` is in Unix seconds."""
    owner = accounts.ensure_default(db) if account == DEFAULT_ACCOUNT else accounts.find(db, account)
    if owner.closed_at is not None:
        raise BadAccount(f"the account {account!r} is closed", param="account")
    minted = Minted("tok_" + secrets.token_hex(8), new_token())
    row = TokenRow(
        id=minted.id,
        account=account,
        name=checked_name(name),
        hash=digest(minted.text),
        hint=f"{minted.text[: len(PREFIX) + 4]}…{minted.text[-4:]}",
        scopes=_scopes(scopes),
        models=_models(models),
        limits=Limits(**checked_limits(limits or {})),
        created_at=int(time.time()),
        expires_at=_expiry(expires_at),
    )
    table.add(db, row)
    return minted


def update(db: Connection, token_id: str, changes: Mapping[str, Any]) -> TokenRow:
    """`changes` may hold `name`, `scopes`, `models`, `expires_at` and limits by their names."""
    find(db, token_id)
    known: dict[str, Callable[[Any], Any]] = {
        "name": checked_name,
        "scopes": _scopes,
        "models": _models,
        "expires_at": _expiry,
    }
    own = {name: known[name](value) for name, value in changes.items() if name in known}
    limits = checked_limits({name: value for name, value in changes.items() if name not in known})
    if own or limits:
        table.update(db, token_id, {**own, **limits})
    return find(db, token_id)


def find(db: Connection, token_id: str) -> TokenRow:
    """Raises UnknownToken."""
    row = table.find(db, token_id) if token_id.isprintable() else None  # no database takes every character
    if row is None:
        raise UnknownToken(f"there is no token {token_id!r:.80}", param="token")
    return row


def revoke(db: Connection, token_id: str) -> bool:
    """False where there is no such token, or it was revoked before."""
    return token_id.isprintable() and table.revoke(db, token_id, int(time.time()))


def is_valid(db: Connection, token: str) -> bool:
    """Whether it is known and was not revoked."""
    row = table.by_hash(db, digest(token)) if is_well_formed(token) else None
    return row is not None and row.revoked_at is None


def is_empty(db: Connection) -> bool:
    """Whether no token was ever minted."""
    return table.is_empty(db)


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), []
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)


def _scopes(scopes: Iterable[str]) -> frozenset[str]:
    chosen = frozenset(scopes)
    unknown = sorted(chosen - set(SCOPES))
    if unknown or not chosen:
        wrong = f", not {unknown[0]!r:.40}" if unknown else ""
        raise BadAccount(f"scopes: one or more of {', '.join(SCOPES)}{wrong}", param="scopes")
    return chosen


def _models(models: Iterable[str] | None) -> tuple[str, ...] | None:
    if models is None:
        return None
    chosen = tuple(dict.fromkeys(models))
    if not 0 < len(chosen) <= MAX_MODELS or any(
        not 0 < len(model) <= 128 or not model.isprintable() for model in chosen
    ):
        raise BadAccount(
            f"models: 1 to {MAX_MODELS} ids of models, or none at all to allow every model", param="models"
        )
    return chosen


def _expiry(expires_at: int | None) -> int | None:
    if expires_at is not None and not time.time() < expires_at < MAX_TIME:
        raise BadAccount("expires_at: a moment to come; to end a token now, revoke it", param="expires_at")
    return expires_at
