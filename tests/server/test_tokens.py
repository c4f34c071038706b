"""API tokens: what they look like, what is kept of them, and what they may be."""

from __future__ import annotations

import re
import string
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server import accounts, tokens
from octoai.server.accounts import BadAccount, UnknownAccount, UnknownToken
from octoai.server.store import Connection, Place, connect
from octoai.server.store import tokens as table
from octoai.server.store.accounts import Limits
from octoai.server.tokens import SCOPES, is_well_formed, new_token


@pytest.fixture
def db(place: Place) -> Iterator[Connection]:
    connection = connect(place)
    yield connection
    connection.close()


def test_a_token_is_prefixed_random_and_checksummed() -> None:
    made = {new_token() for _ in range(200)}
    assert len(made) == 200
    for token in made:
        assert re.fullmatch(r"octoai_[0-9A-Za-z]{38}", token)
        assert is_well_formed(token)


@given(st.integers(7, 44), st.sampled_from(string.ascii_letters + string.digits))
def test_one_wrong_character_is_noticed(place: int, character: str) -> None:
    token = new_token()
    changed = token[:place] + character + token[place + 1 :]
    assert is_well_formed(changed) == (changed == token)


@pytest.mark.parametrize(
    "text", ["", "octoai_", "octoai_" + "a" * 38, "sk-" + "a" * 42, "é" * 45, "octoai_" + "²" * 38]
)
def test_what_is_not_a_token_is_not_well_formed(text: str) -> None:
    assert not is_well_formed(text)
    assert not is_well_formed(new_token() + "a")
    assert not is_well_formed(new_token()[:-1])


def test_a_token_belongs_to_the_default_account_unless_told(db: Connection) -> None:
    minted = tokens.mint(db, "mine")
    row = tokens.find(db, minted.id)
    assert (row.account, row.scopes, row.models, row.expires_at) == ("default", {"inference", "usage"}, None, None)
    assert accounts.find(db, "default").plan == "unlimited"
    assert not accounts.find(db, "default").is_limited


def test_a_token_is_kept_as_it_was_minted(db: Connection) -> None:
    accounts.create(db, "acme")
    soon = int(time.time()) + 3600
    minted = tokens.mint(
        db,
        "mine ✓",
        "acme",
        scopes=["admin", "usage"],
        models=["b", "a", "b"],
        expires_at=soon,
        limits={"requests_per_minute": 3, "hard_budget_nanos": 0},
    )
    row = tokens.find(db, minted.id)
    assert (row.account, row.name, row.scopes) == ("acme", "mine ✓", {"admin", "usage"})
    assert (row.models, row.expires_at) == (("b", "a"), soon)
    assert row.limits == Limits(requests_per_minute=3, hard_budget_nanos=0)
    assert row.created_at == pytest.approx(time.time(), abs=5)
    assert (row.revoked_at, row.last_used_at) == (None, None)


def test_only_a_hash_is_stored(db: Connection, place: Place) -> None:
    minted = tokens.mint(db, "mine")
    row = tokens.find(db, minted.id)
    assert row.hash == tokens.digest(minted.text)
    assert len(row.hash) == 32
    assert row.hint.startswith("octoai_")
    assert len(row.hint) < 20
    assert minted.text not in repr(minted)
    assert repr(row.hash) not in repr(row)
    secret = minted.text.removeprefix("octoai_").encode()
    files = [file for file in place.data_dir.iterdir() if file.is_file()] if place.url is None else []
    for file in files:
        assert secret[4:12] not in file.read_bytes()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": " "}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "nul\0"}, "name"),
        ({"name": "\udcff"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["inference", "everything"]}, "scopes"),
        ({"models": []}, "models"),
        ({"models": [""]}, "models"),
        ({"models": ["x" * 129]}, "models"),
        ({"models": ["\0"]}, "models"),
        ({"models": [str(number) for number in range(1001)]}, "models"),
        ({"expires_at": 1}, "expires_at"),
        ({"expires_at": 2**63}, "expires_at"),
        ({"limits": {"requests_per_minute": -1}}, "requests_per_minute"),
        ({"limits": {"requests_per_second": 1}}, "requests_per_second"),
        ({"account": "nobody"}, "account"),
        ({"account": "\0"}, "account"),
        ({"account": "\udcff"}, "account"),
    ],
)
def test_what_a_token_cannot_be_is_said_and_nothing_is_kept(
    db: Connection, options: dict[str, object], param: str
) -> None:
    accounts.ensure_default(db)
    with pytest.raises(BadAccount) as caught, db.transaction():
        tokens.mint(db, **{"name": "mine", **options})  # type: ignore[arg-type]
    assert caught.value.param == param
    assert "\n" not in str(caught.value)
    assert tokens.is_empty(db)


def test_a_closed_account_gets_no_tokens(db: Connection) -> None:
    accounts.create(db, "acme")
    accounts.close(db, "acme")
    with pytest.raises(BadAccount, match="closed"):
        tokens.mint(db, "mine", "acme")


def test_a_change_is_what_is_given_and_nothing_else(db: Connection) -> None:
    minted = tokens.mint(db, "mine", models=["a"], limits={"requests_per_minute": 3})
    before = tokens.find(db, minted.id)
    assert tokens.update(db, minted.id, {}) == before
    changed = tokens.update(db, minted.id, {"scopes": list(SCOPES), "models": None, "requests_per_minute": None})
    assert (changed.scopes, changed.models, changed.limits) == (set(SCOPES), None, Limits())
    assert (changed.name, changed.hash, changed.account) == (before.name, before.hash, before.account)
    assert tokens.update(db, minted.id, {"name": "yours", "concurrent_requests": 2}).name == "yours"
    for wrong in ({"scopes": []}, {"name": ""}, {"expires_at": 5}, {"models": []}, {"hash": 1}, {"account": 1}):
        with pytest.raises(BadAccount):
            tokens.update(db, minted.id, wrong)


def test_a_token_is_revoked_once(db: Connection) -> None:
    minted = tokens.mint(db, "mine")
    assert tokens.revoke(db, minted.id)
    assert tokens.find(db, minted.id).revoked_at == pytest.approx(time.time(), abs=5)
    assert not tokens.revoke(db, minted.id)


@pytest.mark.parametrize("token_id", ["tok_0", "", "\0", "\udcff", "'; DROP TABLE tokens; --"])
def test_a_token_that_is_not_there_is_said_to_be_unknown(db: Connection, token_id: str) -> None:
    assert not tokens.revoke(db, token_id)
    for ask in (lambda: tokens.find(db, token_id), lambda: tokens.update(db, token_id, {"name": "x"})):
        with pytest.raises(UnknownToken):
            ask()


def test_an_account_that_is_not_there_is_said_to_be_unknown(db: Connection) -> None:
    with pytest.raises(UnknownAccount):
        tokens.mint(db, "mine", "nobody")


def test_tokens_that_work_are_counted_by_account(db: Connection) -> None:
    now = int(time.time())
    with db.transaction():
        for account in ("acme", "zeta", "none"):
            accounts.create(db, account)
        minted = [tokens.mint(db, f"t{number}", "acme") for number in range(5)]
        tokens.mint(db, "t", "zeta")
        tokens.revoke(db, minted[0].id)
        for number, expires_at in ((1, now - 1), (2, now), (3, now + 1)):
            table.update(db, minted[number].id, {"expires_at": expires_at})
    counted = table.num_active(db, now * 1_000_000 + 999_999)
    assert (counted["acme"], counted["zeta"], counted.get("none")) == (2, 1, None)
    assert table.num_active(db, now * 1_000_000, "acme") == {"acme": 2}
    assert table.num_active(db, (now - 2) * 1_000_000, "acme") == {"acme": 4}


def test_when_a_token_was_last_used_only_moves_on(db: Connection) -> None:
    minted = tokens.mint(db, "mine")
    for at, kept in ((50, 50), (40, 50), (60, 60)):
        table.used(db, {minted.id: at, "tok_0": at})
        assert tokens.find(db, minted.id).last_used_at == kept
