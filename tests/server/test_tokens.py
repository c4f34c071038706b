"""API tokens: what they look like, what is kept of them, and who is let in."""

from __future__ import annotations

import re
import sqlite3
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.errors import Unauthenticated
from octoai.server.store import FILENAME, connect
from octoai.server.store.tokens import TokenTable
from octoai.server.tokens import Tokens, is_well_formed, new_token


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[Tokens]:
    connection = connect(tmp_path)
    yield Tokens(TokenTable(connection))
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


def test_a_token_lets_its_account_in(tokens: Tokens) -> None:
    minted = tokens.mint("mine", account="acme")
    account = tokens.authenticate(f"Bearer {minted.text}")
    assert (account.id, account.token_id) == ("acme", minted.id)
    for header in (f"bearer {minted.text}", f"BEARER {minted.text}", f"Bearer   {minted.text} "):
        assert tokens.authenticate(header) == account


@pytest.mark.parametrize(
    "header",
    [None, "", " ", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Token x", "Bearer x", "Bearer \xff\xfe", "Bearer null"],
)
def test_nothing_else_lets_anybody_in(tokens: Tokens, header: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        tokens.authenticate(header)
    assert caught.value.status == 401
    assert caught.value.code == "invalid_api_key"
    assert caught.value.headers["www-authenticate"] == "Bearer"
    assert "octoai token create" in caught.value.message


def test_a_well_formed_token_of_nobody_is_refused_and_not_repeated(tokens: Tokens) -> None:
    stranger = new_token()
    with pytest.raises(Unauthenticated) as caught:
        tokens.authenticate(f"Bearer {stranger}")
    assert stranger not in str(caught.value.body())


def test_a_token_without_its_scheme_is_refused(tokens: Tokens) -> None:
    minted = tokens.mint("mine")
    for header in (minted.text, f"Basic {minted.text}", f"Bearer {minted.text} {minted.text}"):
        with pytest.raises(Unauthenticated):
            tokens.authenticate(header)


def test_a_revoked_token_is_refused_at_once_also_by_another_connection(tmp_path: Path) -> None:
    connections = [connect(tmp_path), connect(tmp_path)]
    service, command = (Tokens(TokenTable(connection)) for connection in connections)
    minted = service.mint("mine")
    assert service.is_valid(minted.text)
    assert command.revoke(minted.id)
    assert not service.is_valid(minted.text)
    with pytest.raises(Unauthenticated, match="revoked"):
        service.authenticate(f"Bearer {minted.text}")
    assert not command.revoke(minted.id)
    assert not command.revoke("tok_0")
    for connection in connections:
        connection.close()


def test_only_a_hash_is_stored(tmp_path: Path) -> None:
    connection = connect(tmp_path)
    tokens = Tokens(TokenTable(connection))
    minted = tokens.mint("mine")
    tokens.authenticate(f"Bearer {minted.text}")
    secret = minted.text.removeprefix("octoai_").encode()
    files = list(tmp_path.iterdir())
    assert tmp_path / FILENAME in files
    for file in files:
        assert secret not in file.read_bytes()
        assert secret[4:12] not in file.read_bytes()
    assert minted.text not in repr(minted)
    (row,) = tokens.all()
    assert row.hint.startswith("octoai_")
    assert len(row.hint) < 20
    assert len(row.hash) == 32
    connection.close()


def test_a_name_is_data(tokens: Tokens) -> None:
    name = "'; DROP TABLE tokens; -- \n😀"
    minted = tokens.mint(name)
    assert [row.name for row in tokens.all()] == [name]
    assert tokens.is_valid(minted.text)


def test_a_bad_token_costs_no_look_up() -> None:
    connection = sqlite3.connect(":memory:")  # without the table: a look-up would fail
    for header in ("Bearer x", "Bearer octoai_" + "a" * 38):
        with pytest.raises(Unauthenticated):
            Tokens(TokenTable(connection)).authenticate(header)
    connection.close()
