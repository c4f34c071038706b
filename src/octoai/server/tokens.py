"""API tokens: minted, recognised, revoked.

A token is `octoai_`, 32 random characters, and six that are a checksum of the rest. The checksum turns away typing
errors and made-up tokens without a look into the database, and lets scanners of leaked secrets tell real ones. What
is stored is a SHA-256 of the token: it has 190 random bits, so a slow hash would protect nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from octoai.server.errors import Unauthenticated
from octoai.server.store.tokens import TokenRow, TokenTable

PREFIX = "octoai_"
DEFAULT_ACCOUNT = "default"
_ALPHABET = string.digits + string.ascii_letters
_RANDOM_LENGTH = 32
_CHECKSUM_LENGTH = 6
_LENGTH = len(PREFIX) + _RANDOM_LENGTH + _CHECKSUM_LENGTH

_HOW = "Send `Authorization: Bearer <token>`; `octoai token create --name NAME` makes one."


@dataclass(frozen=True, slots=True)
class Account:
    """Who is asking: the account, and by which of its tokens."""

    id: str
    token_id: str


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


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), []
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Tokens:
    """Every token of this service. Each look-up reads the database, so a revoked token is refused at once."""

    def __init__(self, table: TokenTable, *, clock: Callable[[], float] = time.time) -> None:
        self._table = table
        self._clock = clock

    def mint(self, name: str, account: str = DEFAULT_ACCOUNT) -> Minted:
        minted = Minted("tok_" + secrets.token_hex(8), new_token())
        hint = f"{minted.text[: len(PREFIX) + 4]}…{minted.text[-4:]}"
        self._table.add(TokenRow(minted.id, account, name, _digest(minted.text), hint, int(self._clock()), None))
        return minted

    def authenticate(self, authorization: str | None) -> Account:
        """The account of an `Authorization` header's token. Raises Unauthenticated."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if not token:
            raise Unauthenticated(f"No API token was sent. {_HOW}")
        if scheme.lower() != "bearer":
            raise Unauthenticated(f"The Authorization header is not a bearer token. {_HOW}")
        row = self._find(token)
        if row is None:
            raise Unauthenticated(f"This API token is not known here. {_HOW}")
        if row.revoked_at is not None:
            raise Unauthenticated(f"This API token has been revoked. {_HOW}")
        return Account(row.account, row.id)

    def is_valid(self, token: str) -> bool:
        row = self._find(token)
        return row is not None and row.revoked_at is None

    def all(self) -> list[TokenRow]:
        return self._table.all()

    def revoke(self, token_id: str) -> bool:
        return self._table.revoke(token_id, int(self._clock()))

    @property
    def is_empty(self) -> bool:
        return self._table.is_empty()

    def _find(self, token: str) -> TokenRow | None:
        if not is_well_formed(token):
            return None
        digest = _digest(token)
        row = self._table.by_hash(digest)
        # The index compared a hash, whose timing tells nothing of the token; compared again in constant time.
        return row if row is not None and hmac.compare_digest(row.hash, digest) else None
