"""`octoai statement`: the month as text, and as CSV that adds up."""

from __future__ import annotations

import csv
import io
import random
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from octoai.cli import main
from octoai.cli.dates import moment, months
from octoai.server import accounts, tokens
from octoai.server.store import Connection, Place, connect
from octoai.server.store.entries import Entry, balance_nanos, post

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["statement", *arguments, "--data-dir", str(tmp_path)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def fill(db: Connection) -> str:
    """An account with credit from October, and a March 2026 with something of everything. The id of its token."""
    with db.transaction():
        accounts.create(db, "acme", name="ACME Inc.")
        accounts.create(db, "zeta")
        token = tokens.mint(db, "laptop", "acme").id
        about = {"token_id": token, "request": "job_1", "model": "tiny"}
        counts = {"prompt_tokens": 1200, "cached_tokens": 200, "completion_tokens": 30}
        post(
            db,
            [
                Entry(moment("2026-02-27"), "acme", "grant", 10_000_000_000, note="first"),
                Entry(moment("2026-03-02"), "acme", "grant", 5_000_000_000, note='=HYPERLINK("http://x")'),
                Entry(moment("2026-03-03"), "acme", "adjustment", -1_000_000_000, note='-2, "so"\nsaid'),
                Entry(moment("2026-03-04"), "acme", "charge", -1_500, **about, **counts),
                Entry(moment("2026-03-05"), "acme", "charge", -3_000, **{**about, "model": "large"}, **counts),
                Entry(moment("2026-03-06"), "acme", "refund", 1_500, note="was slow", **about),
                Entry(moment("2026-04-01"), "acme", "grant", 1, note="later"),
                Entry(moment("2026-04-01"), "zeta", "grant", 1),
            ],
        )
    return token


@pytest.fixture
def token(tmp_path: Path) -> str:
    with closing(connect(Place(tmp_path))) as db:
        return fill(db)


def test_the_text_has_every_part(run: Run, token: str) -> None:
    status, out, err = run("2026-03")
    assert (status, err) == (0, "")
    heads = "REQUESTS  PROMPT TOKENS  CACHED TOKENS  COMPLETION TOKENS        USD"
    token_id, total = "TOKEN ID".ljust(len(token)), "total".ljust(len(token))
    expected = f"""\
Statement of acme (ACME Inc.) for 2026-03 (UTC)

                                USD
opening balance          10.00
grants and adjustments    4.00
usage                    -0.0000045
corrections and refunds   0.0000015
closing balance          13.999997

Grants and adjustments
  DATE                     ITEM        NOTE                      USD
  2026-03-02 00:00:00 UTC  grant       =HYPERLINK("http://x")   5.00
  2026-03-03 00:00:00 UTC  adjustment  -2, "so" said           -1.00

Usage by model
  MODEL  {heads}
  large         1          1,200            200                 30  0.000003
  tiny          1          1,200            200                 30  0.0000015
  total         2          2,400            400                 60  0.0000045

Usage by token
  {token_id}  TOKEN NAME  {heads}
  {token}  laptop             2          2,400            400                 60  0.0000045
  {total}                     2          2,400            400                 60  0.0000045

Corrections and refunds
  DATE                     ITEM    REQUEST  MODEL  NOTE            USD
  2026-03-06 00:00:00 UTC  refund           tiny   was slow  0.0000015
"""
    assert out.splitlines() == expected.splitlines()


def test_the_csv_is_rfc_4180_and_safe_to_open(run: Run, token: str) -> None:
    status, out, err = run("2026-03", "--account", "acme", "--csv")
    assert (status, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert out.startswith("account,month,item,date,model,token_id,token_name,request_id,note,requests,prompt_tokens,")
    assert '"\'=HYPERLINK(""http://x"")"' in out
    assert [row["note"] for row in rows if row["item"] == "adjustment"] == ['\'-2, "so"\nsaid']
    assert [row["item"] for row in rows] == [
        *("opening balance", "usage", "usage", "grant", "adjustment", "refund", "closing balance"),
    ]
    assert {row["amount_usd"] for row in rows if row["item"] == "usage"} == {"-0.0000015", "-0.000003"}
    assert [row["token_name"] for row in rows if row["item"] == "usage"] == ["laptop", "laptop"]
    assert (rows[0]["date"], rows[-1]["date"]) == ("2026-03-01T00:00:00.000000Z", "2026-04-01T00:00:00.000000Z")
    assert adds_up(rows) == Decimal("13.999997")


def adds_up(rows: list[dict[str, str]]) -> Decimal:
    """The closing balance of one account, which is the sum of the rows before."""
    *parts, closing_ = [Decimal(row["amount_usd"]) for row in rows]
    assert sum(parts) == closing_
    return closing_


def test_whatever_happened_the_csv_adds_up_from_month_to_month(run: Run, tmp_path: Path) -> None:
    chance = random.Random(11)
    start, end = months("2026-01")[0], months("2026-03")[1]
    kinds = ["charge"] * 6 + ["grant", "adjustment", "correction", "refund"]
    with closing(connect(Place(tmp_path))) as db, db.transaction():
        for account in ("acme", "zeta"):
            accounts.create(db, account)
        post(
            db,
            [
                Entry(
                    *(
                        at_us,
                        chance.choice(["acme", "zeta"]),
                        chance.choice(kinds),
                        chance.randrange(-(10**13), 10**12),
                    ),
                    token_id=f"tok_{chance.randrange(3)}",
                    model=f"model-{chance.randrange(3)}",
                )
                for at_us in sorted(chance.randrange(start, end) for _ in range(500))
            ],
        )
        balances = {account: balance_nanos(db, account) for account in ("acme", "zeta")}
    for account, nanos in balances.items():
        before = Decimal(0)
        for month in ("2026-01", "2026-02", "2026-03"):
            _, out, _ = run(month, "--account", account, "--csv")
            rows = list(csv.DictReader(io.StringIO(out, newline="")))
            assert Decimal(rows[0]["amount_usd"]) == before
            before = adds_up(rows)
        assert before == Decimal(nanos).scaleb(-9)


def test_all_accounts_are_told_that_had_entries(run: Run, token: str) -> None:
    _, out, _ = run("2026-04")
    assert [line for line in out.splitlines() if line.startswith("Statement")] == [
        "Statement of acme (ACME Inc.) for 2026-04 (UTC)",
        "Statement of zeta for 2026-04 (UTC)",
    ]
    status, out, _ = run("2026-01")
    assert (status, out) == (0, "no account had entries before the end of 2026-01\n")
    _, out, _ = run("2026-01", "--csv")
    assert out.count("\r\n") == 1


def test_a_month_that_is_not_over_says_so(run: Run, token: str) -> None:
    month = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m")
    _, out, _ = run(month, "--account", "acme")
    assert "The month is not over: this is as of " in out
    assert "balance so far" in out
    assert "closing balance" not in out
    _, out, err = run(month, "--csv")
    assert err.startswith(f"octoai: {month} is not over")
    assert "not over" not in out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("2026-13",), 2, "2026-11"),
        (("November",), 2, "2026-11"),
        (("2099-01",), 2, "2099-01 has not begun"),
        (("2099-01", "--csv"), 2, "2099-01 has not begun"),
        (("2026-11", "--account", "nobody"), 1, "'nobody'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    run: Run, token: str, arguments: tuple[str, ...], status: int, said: str
) -> None:
    ended, out, err = run(*arguments)
    assert (ended, out) == (status, "")
    assert said in err
    assert err.count("\n") == 1
