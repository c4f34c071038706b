"""Accounts: opened, changed, credited and closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from octoai.server import accounts
from octoai.server.accounts import PLANS, AccountExists, BadAccount, UnknownAccount
from octoai.server.billing.money import NANOS
from octoai.server.store import Connection, Place, connect
from octoai.server.store import entries as entry_table
from octoai.server.store.accounts import Limits
from octoai.server.store.entries import balance_nanos


@pytest.fixture
def db(place: Place) -> Iterator[Connection]:
    connection = connect(place)
    yield connection
    connection.close()


# ── accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_account_has_the_limits_of_its_plan_and_its_own_over_them(db: Connection) -> None:
    assert accounts.create(db, "a").limits == Limits(requests_per_minute=10)
    assert accounts.create(db, "b", plan="pro").limits == Limits(requests_per_minute=240)
    own = {"requests_per_minute": None, "hard_budget_nanos": 5}
    made = accounts.create(db, "c", name="C ✓", plan="pro", is_prepaid=True, limits=own)
    assert made == accounts.find(db, "c")
    assert (made.name, made.is_prepaid, made.limits) == ("C ✓", True, Limits(hard_budget_nanos=5))
    assert accounts.find(db, "a").name == "a"


def test_a_new_plan_brings_its_limits_and_leaves_budgets_alone(db: Connection) -> None:
    accounts.create(db, "a", limits={"soft_budget_nanos": 4, "concurrent_requests": 2})
    changed = accounts.update(db, "a", plan="pro")
    assert changed.limits == Limits(soft_budget_nanos=4, requests_per_minute=240)
    both = accounts.update(db, "a", plan="free", limits={"requests_per_minute": 7})
    assert (both.plan, both.limits.requests_per_minute) == ("free", 7)
    assert accounts.update(db, "a") == both
    assert accounts.update(db, "a", name="A", is_prepaid=True).is_prepaid


@pytest.mark.parametrize("account_id", ["", "A", "a b", "-a", "a" * 65, "tok_1", "ä", "a\n", "\0"])
def test_an_id_is_something_plain(db: Connection, account_id: str) -> None:
    with pytest.raises(BadAccount) as caught:
        accounts.create(db, account_id)
    assert caught.value.param == "id"


def test_an_id_is_taken_once(db: Connection) -> None:
    accounts.create(db, "a")
    with pytest.raises(AccountExists), db.transaction():
        accounts.create(db, "a")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"plan": "gold"}, "plan"),
        ({"name": "\n"}, "name"),
        ({"limits": {"hard_budget_nanos": -1}}, "hard_budget_nanos"),
        ({"limits": {"hard_budget_nanos": 2**62}}, "hard_budget_nanos"),
        ({"limits": {"created_at": 1}}, "created_at"),
    ],
)
def test_what_an_account_cannot_be_is_said(db: Connection, options: dict[str, Any], param: str) -> None:
    accounts.create(db, "there")
    for act in (lambda: accounts.create(db, "a", **options), lambda: accounts.update(db, "there", **options)):
        with pytest.raises(BadAccount) as caught:
            act()
        assert caught.value.param == param


@pytest.mark.parametrize("account_id", ["nobody", "", "\0", "\udcff"])
def test_an_account_that_is_not_there_is_said_to_be_unknown(db: Connection, account_id: str) -> None:
    for act in (accounts.find, accounts.close, accounts.reopen, accounts.update):
        with pytest.raises(UnknownAccount):
            act(db, account_id)
    with pytest.raises(UnknownAccount):
        accounts.credit(db, account_id, 1)


def test_credit_is_granted_and_adjusted_to_the_nano_dollar(db: Connection) -> None:
    accounts.create(db, "a")
    with db.transaction():
        accounts.credit(db, "a", 25 * NANOS, note="first")
        accounts.credit(db, "a", -5 * NANOS - 1, kind="adjustment")
    assert balance_nanos(db, "a") == 20 * NANOS - 1
    newest, oldest = entry_table.of_account(db, "a", 10)
    assert (newest.kind, newest.amount_nanos, newest.note) == ("adjustment", -5 * NANOS - 1, None)
    assert (oldest.kind, oldest.note, oldest.seq) == ("grant", "first", newest.seq - 1)
    assert entry_table.of_account(db, "a", 1) == [newest]
    assert entry_table.of_account(db, "a", 10, newest.seq) == [oldest]
    assert entry_table.of_account(db, "b", 10) == []


@pytest.mark.parametrize(
    ("nanos", "options"),
    [
        (0, {}),
        (-1, {}),
        (0, {"kind": "adjustment"}),
        (10**18 + 1, {}),
        (-(10**18) - 1, {"kind": "adjustment"}),
        (1, {"kind": "charge"}),
        (1, {"note": "x" * 201}),
        (1, {"note": "\0"}),
    ],
)
def test_credit_that_makes_no_sense_is_refused(db: Connection, nanos: int, options: dict[str, str]) -> None:
    accounts.create(db, "a")
    with pytest.raises(BadAccount) as caught, db.transaction():
        accounts.credit(db, "a", nanos, **options)
    assert caught.value.param in ("amount", "kind", "note")
    assert balance_nanos(db, "a") == 0


def test_a_balance_stays_where_a_database_can_count(db: Connection) -> None:
    accounts.create(db, "a")
    with db.transaction():
        for _ in range(4):
            accounts.credit(db, "a", -(10**18), kind="adjustment")
    with pytest.raises(BadAccount, match="four billion dollars") as caught, db.transaction():
        accounts.credit(db, "a", -1, kind="adjustment")
    assert caught.value.param == "amount"
    assert balance_nanos(db, "a") == -4 * 10**18


def test_plans_are_those_of_octoai(db: Connection) -> None:
    assert {name: limits.requests_per_minute for name, limits in PLANS.items()} == {
        "free": 10,
        "pro": 240,
        "unlimited": None,
    }
