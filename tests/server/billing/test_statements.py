"""Statements: whatever happened, the opening balance and everything on a statement add up to the closing one."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoai.cli.dates import months
from octoai.server import accounts
from octoai.server.accounts import UnknownAccount
from octoai.server.billing import statements
from octoai.server.billing.statements import UsageLine
from octoai.server.store import Connection, Place, connect, requests, usage
from octoai.server.store.entries import Entry, balance_nanos, post
from octoai.server.store.requests import RequestRow
from octoai.server.store.usage import UsageSum

OCTOBER, NOVEMBER, DECEMBER = months("2026-10"), months("2026-11"), months("2026-12")
LATER = months("2027-06")[0]
MINUTE_US, HOUR = 60_000_000, 3_600_000_000

amounts = st.integers(-(10**15), 10**15)
moments = st.integers(OCTOBER[0] - HOUR, DECEMBER[1] + HOUR)
edges = st.sampled_from([at + by for month in (NOVEMBER, DECEMBER) for at in month for by in (-1, 0, 1)])
entries = st.builds(
    Entry,
    at_us=st.one_of(moments, edges),
    account=st.sampled_from(["acme", "zeta"]),
    kind=st.sampled_from(["charge", "charge", "charge", "correction", "refund", "grant", "adjustment"]),
    amount_nanos=amounts,
    token_id=st.sampled_from(["tok_1", "tok_2", None]),
    model=st.sampled_from(["tiny", "large"]),
    prompt_tokens=st.integers(0, 10**6),
    cached_tokens=st.integers(0, 10**6),
    completion_tokens=st.integers(0, 10**6),
)


@pytest.fixture
def db(place: Place) -> Iterator[Connection]:
    with closing(connect(place)) as connection:
        with connection.transaction():
            for account in ("acme", "zeta"):
                accounts.create(connection, account, name=account.upper())
        yield connection


@settings(max_examples=60, deadline=None)
@given(st.lists(entries, max_size=40))
def test_a_statement_adds_up_to_the_nano_dollar(drawn: list[Entry]) -> None:
    with tempfile.TemporaryDirectory() as directory, closing(connect(Place(Path(directory)))) as db:
        db.set_durable(False)
        with db.transaction():
            for account in ("acme", "zeta"):
                accounts.create(db, account)
            posted = post(db, sorted(drawn, key=lambda entry: entry.at_us))
        for account in ("acme", "zeta"):
            own = [entry for entry in posted if entry.account == account]
            chain = [statements.statement(db, account, month, LATER) for month in (OCTOBER, NOVEMBER, DECEMBER)]
            for each, month in zip(chain, (OCTOBER, NOVEMBER, DECEMBER), strict=True):
                assert each.opening_nanos == sum(e.amount_nanos for e in own if e.at_us < month[0])
                assert each.closing_nanos == sum(e.amount_nanos for e in own if e.at_us < month[1])
                parts = [*each.given, *each.corrected]
                told = sum(part.amount_nanos for part in parts) - each.usage.cost_nanos
                assert each.opening_nanos + told == each.closing_nanos
                assert sorted(map(id, parts)) == sorted(map(id, each.movements))
            for before, after in pairwise(chain):
                assert before.closing_nanos == after.opening_nanos
            whole = statements.statement(db, account, (0, months("2100-01")[0]), LATER)
            assert whole.closing_nanos == balance_nanos(db, account)


def charge(at_us: int, nanos: int, *, token: str = "tok_1", model: str = "tiny", account: str = "acme") -> Entry:
    counts = {"prompt_tokens": 100, "cached_tokens": 40, "completion_tokens": 7}
    return Entry(at_us, account, "charge", -nanos, token_id=token, request="r", model=model, **counts)


def test_charges_are_summed_by_model_and_by_token(db: Connection) -> None:
    start = NOVEMBER[0]
    charges = [
        charge(start, 5),
        charge(start + 1, 7, token="tok_2"),
        charge(start + 2, 11, model="large"),
        charge(start + 3, 13, model="large"),
        charge(start + 4, 1000, account="zeta"),
        charge(NOVEMBER[1], 2000),
    ]
    with db.transaction():
        post(db, charges)
    of = statements.statement(db, "acme", NOVEMBER, LATER)
    assert of.by_model == [UsageLine(("large",), 2, 200, 80, 14, 24), UsageLine(("tiny",), 2, 200, 80, 14, 12)]
    assert of.by_token == [UsageLine(("tok_1",), 3, 300, 120, 21, 29), UsageLine(("tok_2",), 1, 100, 40, 7, 7)]
    assert of.usage == UsageLine((), 4, 400, 160, 28, 36)
    assert (of.name, of.opening_nanos, of.closing_nanos) == ("ACME", 0, -36)


def test_a_refund_names_the_request_and_is_of_the_month_when_it_was_made(db: Connection) -> None:
    row = RequestRow(
        *("job_1", "req_1", "acme", "tok_1", "tiny", "tiny", 1, 1, 1, OCTOBER[0], "journal", False, 0),
        status="settled",
        prompt_tokens=10,
        cost_nanos=10,
    )
    with db.transaction():
        requests._write(db, [row])
        post(db, [charge(OCTOBER[0], 10)._replace(request="job_1")])
        requests.refund(db, row, "was slow", NOVEMBER[0] + 5)
    october, november = (statements.statement(db, "acme", month, LATER) for month in (OCTOBER, NOVEMBER))
    assert (october.closing_nanos, october.corrected) == (-10, ())
    (refund,) = november.corrected
    assert (refund.kind, refund.request_id, refund.note, refund.amount_nanos) == ("refund", "req_1", "was slow", 10)
    assert (november.opening_nanos, november.closing_nanos, november.given) == (-10, 0, ())


def test_a_month_says_whether_it_is_over(db: Connection) -> None:
    for now, is_over, until in (
        (NOVEMBER[1], True, NOVEMBER[1]),
        (NOVEMBER[1] - 1, False, NOVEMBER[1] - 1),
        (NOVEMBER[0] - 9, False, NOVEMBER[0]),
    ):
        of = statements.statement(db, "acme", NOVEMBER, now)
        assert (of.is_over, of.until_us) == (is_over, until)


def test_statements_are_of_accounts_that_had_entries_by_then(db: Connection) -> None:
    with db.transaction():
        post(db, [charge(NOVEMBER[0], 1), charge(DECEMBER[0], 1, account="zeta")])
    told = [
        [each.account for each in statements.statements(db, month, LATER)] for month in (OCTOBER, NOVEMBER, DECEMBER)
    ]
    assert told == [[], ["acme"], ["acme", "zeta"]]
    with pytest.raises(UnknownAccount):
        statements.statement(db, "nobody", NOVEMBER, LATER)


def test_an_account_that_the_database_lost_keeps_nobody_from_their_statement(db: Connection) -> None:
    """Its row, that is: the journal had what it was charged, and was brought in by a database of before it was made."""
    with db.transaction():
        post(db, [charge(NOVEMBER[0], 1), charge(NOVEMBER[0], 2, account="lost")])
    told = statements.statements(db, NOVEMBER, LATER)
    assert [(each.account, each.name, each.closing_nanos) for each in told] == [
        ("acme", "ACME", -1),
        ("lost", "lost", -2),
    ]


def test_usage_is_told_by_whatever_is_asked_for(db: Connection) -> None:
    day = 24 * HOUR
    start = NOVEMBER[0]
    with db.transaction():
        post(db, [charge(start, 1), charge(start + HOUR, 2), charge(start + day, 4, token="tok_2", account="zeta")])
        post(db, [charge(DECEMBER[0], 8, model="large")])

    def told(*by: str, accounts: list[str] | None = None) -> dict[tuple[str, ...], int]:
        with db.snapshot():
            rows = list(statements.usage_by(db, OCTOBER[0], DECEMBER[1], by, accounts))
        assert [row.key for row in rows] == sorted(row.key for row in rows)
        return {row.key: row.cost_nanos for row in rows}

    assert told() == {(): 15}
    assert told("model") == {("tiny",): 7, ("large",): 8}
    assert told("account") == {("acme",): 11, ("zeta",): 4}
    assert told("token") == {("tok_1",): 11, ("tok_2",): 4}
    assert told("month") == {("2026-11",): 7, ("2026-12",): 8}
    assert told("model", "month") == {("tiny", "2026-11"): 7, ("large", "2026-12"): 8}
    assert told("month", "model") == {("2026-11", "tiny"): 7, ("2026-12", "large"): 8}
    assert told("day", "model") == {
        ("2026-11-01", "tiny"): 3,
        ("2026-11-02", "tiny"): 4,
        ("2026-12-01", "large"): 8,
    }
    assert told("model", "hour", accounts=["acme"]) == {
        ("tiny", "2026-11-01 00:00"): 1,
        ("tiny", "2026-11-01 01:00"): 2,
        ("large", "2026-12-01 00:00"): 8,
    }
    assert told("model", accounts=[]) == {}


def test_rows_of_usage_come_as_they_are_read(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million of them at once were two gigabytes."""
    num, made = 5000, 0
    with db.transaction():
        rows = [(at * 60, "acme", f"tok_{at % 7}", "tiny", 1, 1, 0, 1, at) for at in range(num)]
        db.execute_many("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def make(*values: Any) -> UsageSum:
        nonlocal made
        made += 1
        return UsageSum(*values)

    monkeypatch.setattr(usage, "UsageSum", make)
    with db.snapshot():
        found = statements.usage_by(db, 0, num * MINUTE_US, ["token", "hour"])
        first = next(found)
        assert first.key == ("tok_0", "1970-01-01 00:00") and made < 10
        assert first.cost_nanos + sum(row.cost_nanos for row in found) == num * (num - 1) // 2
    assert made == len({(at % 7, at // 60) for at in range(num)})


def test_usage_agrees_with_the_entries(db: Connection) -> None:
    sums: defaultdict[tuple[str, ...], int] = defaultdict(int)
    charges = [
        charge(NOVEMBER[0] + at * 7_777_777_777, at * at + 1, model=["tiny", "large"][at % 2]) for at in range(300)
    ]
    with db.transaction():
        post(db, charges)
    for each in charges:
        sums[(each.model or "",)] -= each.amount_nanos
    with db.snapshot():
        rows = list(statements.usage_by(db, NOVEMBER[0], NOVEMBER[1], ["model"]))
    assert {row.key: row.cost_nanos for row in rows} == sums


@pytest.mark.parametrize(("by", "said"), [(["colour"], "colour"), (["day", "month"], "not by both")])
def test_what_usage_cannot_be_told_by_is_said(db: Connection, by: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        statements.usage_by(db, 0, 1, by)
