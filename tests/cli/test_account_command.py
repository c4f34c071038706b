"""`octoai account …`: on the database itself, and beside a service that runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from octoai.cli import main
from octoai.cli.account import PLANS
from octoai.cli.columns import Figure, aligned
from octoai.server import accounts, tokens
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.store import Place, connect
from octoai.server.store import tokens as table
from tests.running import InProcess
from tests.talking import ask

Octoai = Callable[..., str]


@pytest.fixture
def octoai(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Octoai:
    """Run a command on a database of the test's own; what it prints."""
    if place.url is not None:
        monkeypatch.setenv("OCTOAI_DATABASE", place.url)

    def run(*arguments: str, status: int = 0) -> str:
        assert main([*arguments, "--data-dir", str(place.data_dir)]) == status
        said = capsys.readouterr()
        if status == 0:
            assert said.err == ""
            return said.out
        assert said.out == ""
        assert said.err.startswith("octoai: ")
        assert said.err.count("\n") == 1
        return said.err

    return run


def shown(octoai: Octoai, account_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(octoai("account", "show", account_id, "--json"))
    return found


def test_an_account_is_opened_changed_closed_and_opened_again(octoai: Octoai) -> None:
    assert "octoai token create --account acme" in octoai(
        *("account", "create", "acme", "--name", "Acme ✓", "--plan", "pro", "--prepaid"),
        *("--soft-budget", "15.5", "--hard-budget", "20", "--concurrent-requests", "4"),
    )
    first = shown(octoai, "acme")
    assert (first["name"], first["plan"], first["prepaid"]) == ("Acme ✓", "pro", True)
    assert (first["soft_budget"], first["hard_budget"]) == ("15.50", "20.00")
    assert (first["requests_per_minute"], first["concurrent_requests"]) == (240, 4)
    octoai("account", "update", "acme", "--hard-budget", "none", "--requests-per-minute", "7", "--postpaid")
    changed = shown(octoai, "acme")
    assert changed == {**first, "prepaid": False, "hard_budget": None, "requests_per_minute": 7}
    octoai("account", "update", "acme")
    assert shown(octoai, "acme") == changed
    octoai("account", "close", "acme")
    assert shown(octoai, "acme")["closed_at"] is not None
    octoai("account", "reopen", "acme")
    assert shown(octoai, "acme") == changed


def test_credit_is_granted_and_adjusted_also_below_nothing(octoai: Octoai) -> None:
    octoai("account", "create", "acme")
    assert octoai("account", "credit", "acme", "25", "--note", "first") == (
        "acme: grant of 25.00 USD, balance 25.00 USD\n"
    )
    assert octoai("account", "adjust", "acme", "-5.00", "--note", "wrong") == (
        "acme: adjustment of -5.00 USD, balance 20.00 USD\n"
    )
    octoai("account", "adjust", "--note", "more", "acme", "0.000000001")
    assert shown(octoai, "acme")["balance"] == "20.000000001"


def test_accounts_are_listed_as_a_table_and_for_programs(octoai: Octoai) -> None:
    octoai("account", "create", "acme", "--prepaid", "--hard-budget", "20")
    octoai("account", "create", "beta-long-name", "--soft-budget", "3")
    octoai("account", "create", "gamma")
    octoai("account", "credit", "acme", "123.45")
    octoai("account", "close", "gamma")
    head, *lines = octoai("account", "list").splitlines()
    assert head.split("  ")[0] == "ID"
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["acme"] == ["acme", "free", "yes", "123.45", "0.00", "20.00", "0", "open"]
    assert rows["beta-long-name"][-4:] == ["soft", "3.00", "0", "open"]
    assert rows["gamma"][-3:] == ["-", "0", "closed"]
    assert len({line.index("free") for line in lines}) == 1
    listed = json.loads(octoai("account", "list", "--json"))
    assert [each["id"] for each in listed] == [line.split()[0] for line in lines]
    assert listed[0] == shown(octoai, listed[0]["id"])


def test_accounts_are_listed_without_looking_at_every_token(
    octoai: Octoai, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10,000 of both it took five seconds: each account went through all tokens."""
    octoai("account", "create", "acme")
    with closing(connect(place)) as db, db.transaction():
        for name in ("one", "two"):
            tokens.mint(db, name, "acme")

    def read(_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(table, "row_of", read)
    assert [each["active_tokens"] for each in json.loads(octoai("account", "list", "--json"))] == [2]


def test_a_long_table_takes_no_longer_a_row_than_a_short_one() -> None:
    """For each row the longest of its column was looked for again: with 10,000 accounts for most of five seconds."""
    num = 40_000
    began = time.monotonic()
    table = aligned(["N"], [[Figure(f"{number}.{'0' * (number % 3)}")] for number in range(num)])
    assert time.monotonic() - began < 2
    assert table.splitlines()[:4] == [f"{text:>8}".rstrip() for text in ("N", "0.  ", "1.0 ", "2.00")]


def test_one_account_is_shown_to_a_person(octoai: Octoai) -> None:
    octoai("account", "create", "acme", "--hard-budget", "20")
    lines = dict(line.split("  ", 1) for line in octoai("account", "show", "acme").splitlines())
    assert {name: value.strip() for name, value in lines.items()} | {"created at": ""} == {
        "id": "acme",
        "name": "acme",
        "plan": "free",
        "prepaid": "no",
        "balance": "0.00",
        "spent this month": "0.00",
        "active tokens": "0",
        "soft budget": "none",
        "hard budget": "20.00",
        "requests per minute": "10",
        "prompt tokens per minute": "none",
        "completion tokens per minute": "none",
        "concurrent requests": "none",
        "created at": "",
        "closed at": "-",
    }


WRONG = [
    (("create", "Bad Id"), "id"),
    (("create", "there"), "already"),
    (("create", "x", "--name", "a\nb"), "name"),
    (("create", "x", "--hard-budget", "much"), "--hard-budget"),
    (("create", "x", "--hard-budget", "-1"), "--hard-budget"),
    (("create", "x", "--soft-budget", "1e3"), "--soft-budget"),
    (("create", "x", "--requests-per-minute", "-1"), "--requests-per-minute"),
    (("create", "x", "--concurrent-requests", "1.5"), "--concurrent-requests"),
    (("create", "x", "--prompt-tokens-per-minute", "9" * 13), "--prompt-tokens-per-minute"),
    (("update", "there", "--completion-tokens-per-minute", "all"), "--completion-tokens-per-minute"),
    (("credit", "there", "-3"), "grant"),
    (("credit", "there", "0"), "grant"),
    (("credit", "there", "x"), "AMOUNT"),
    (("credit", "there", "9999999999"), "AMOUNT"),
    (("credit", "there", "1", "--note", "x" * 201), "note"),
    (("adjust", "there", "0", "--note", "x"), "zero"),
    *(((action, "nobody"), "nobody") for action in ("show", "update", "close", "reopen")),
    (("show", "\udcff"), "no account"),
    (("credit", "nobody", "1"), "nobody"),
]


def test_what_is_wrong_is_one_line_and_changes_nothing(octoai: Octoai) -> None:
    octoai("account", "create", "there")
    before = octoai("account", "list", "--json")
    for arguments, said in WRONG:
        assert said in octoai("account", *arguments, status=1), arguments
    assert octoai("account", "list", "--json") == before


@pytest.mark.parametrize(
    "arguments",
    [
        *((), ("create",), ("create", "x", "--plan", "gold"), ("create", "x", "--prepaid", "--postpaid")),
        *(("credit", "x"), ("adjust", "x", "1"), ("adjust", "x", "-y", "--note", "z"), ("fly", "x")),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["account", *arguments])
    assert ended.value.code == 2
    assert "usage: octoai account" in capsys.readouterr().err


def test_the_plans_offered_are_those_there_are() -> None:
    assert set(PLANS) == set(accounts.PLANS)


def test_a_closed_account_is_refused_by_a_service_that_runs(
    in_process: Callable[..., InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = in_process(ScriptedEngine())
    place = ("--data-dir", str(tmp_path / "data0"))

    def status() -> int:
        return ask(service, "/v1/models", authorization=f"Bearer {token}")[0]

    assert main(["account", "create", "acme", *place]) == 0
    token = service.mint("t", "acme").text
    assert status() == 200
    for command, expected in (("close", 401), ("reopen", 200)):
        assert main(["account", command, "acme", *place]) == 0
        time.sleep(0.4)  # as long as a service may take to see what another process has changed
        assert status() == expected
