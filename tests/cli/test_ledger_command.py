"""`octoai ledger`: what it prints, and what it says when something cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.cli import main
from octoai.cli.dates import moment, months, rfc3339
from octoai.server import accounts, tokens
from octoai.server.store import Connection, Place, connect, requests
from octoai.server.store.entries import Entry, post

SECOND = 1_000_000
DAY = 86_400 * SECOND
NOON = 1_793_534_400_000_000  # 2026-11-01 12:00:00 UTC


def record(kind: str, number: int, **more: Any) -> dict[str, Any]:
    at_us = NOON + number * DAY
    return {
        **{"kind": kind, "id": f"id{number}", "request_id": f"req_{number}", "account": "acme", "token_id": "tok_1"},
        **{"model": "small", "served_model": "small-q4", "journal": "j", "is_reserved": False, "outcome": "stop"},
        **{"input_nanos": 150, "cached_input_nanos": 75, "output_nanos": 600, "opened_us": at_us, "lease_us": at_us},
        **{"prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 20, "settled_us": at_us + 1},
        **more,
    }


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Settled, interrupted, refunded and open requests, a day apart."""
    with closing(connect(Place(tmp_path))) as db, db.transaction():
        accounts.create(db, "acme", plan="unlimited")
        tokens.mint(db, "t", "acme")
        records = [record("settlement", 0), record("checkpoint", 1), record("settlement", 2), record("intent", 3)]
        requests.apply(db, [record("intent", 1), *records, record("settlement", 4, account="zeta")], NOON)
        requests.interrupt(db, requests.named(db, "id1"), NOON + DAY)
        requests.refund(db, requests.named(db, "req_2")[0], "sorry", NOON + 2 * DAY)
    return tmp_path


@pytest.fixture
def db(data_dir: Path) -> Iterator[Connection]:
    with closing(connect(Place(data_dir))) as connection:
        yield connection


def octoai(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, *words: str) -> tuple[int, str, str]:
    status = main(["ledger", *words, "--data-dir", str(data_dir)])
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()


def exported(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, *words: str) -> list[dict[str, Any]]:
    status, out, err = octoai(capfdbinary, data_dir, "export", *words)
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_whole_books_are_said_to_be_whole(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path) -> None:
    assert octoai(capfdbinary, data_dir, "verify") == (
        0,
        "whole: 5 entries, 5 requests (1 of them open); balances of 2 accounts, spending and usage add up\n",
        "",
    )


def test_an_entry_of_a_time_to_come_is_told_beside_books_that_are_whole(
    capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, db: Connection
) -> None:
    later = time.time_ns() // 1000 + 400 * DAY  # by a clock that was wrong once
    with db.transaction():
        post(db, [Entry(later, "acme", "grant", 1)])
    status, out, err = octoai(capfdbinary, data_dir, "verify")
    assert (status, err) == (0, "")
    whole, told = out.splitlines()
    assert whole.startswith("whole: 6 entries")
    assert told.startswith(f"the ledger's newest entry is of {rfc3339(later)[:10]} ")


def test_the_first_bad_row_is_named(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, db: Connection) -> None:
    db.execute("UPDATE requests SET completion_tokens = 12 WHERE id = 'id0'")
    status, out, err = octoai(capfdbinary, data_dir, "verify")
    assert (status, out) == (1, "")
    assert err == "octoai: request req_0 (id id0) of account acme: entries say 20 completion tokens, the row 12\n"


@pytest.mark.parametrize("words", [("export", "--account", "\udcff"), ("refund", "\udcff", "--note", "x")])
def test_characters_that_no_database_takes_are_one_line(
    capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, words: tuple[str, ...]
) -> None:
    status, out, err = octoai(capfdbinary, data_dir, *words)
    assert (status, out) == (1, "")
    assert err.startswith("octoai: there is no ")


def test_every_request_is_a_line(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path) -> None:
    rows = exported(capfdbinary, data_dir)
    assert [row["request_id"] for row in rows] == ["req_0", "req_1", "req_2", "req_4"]
    assert rows[0] == {
        "request_id": "req_0",
        "id": "id0",
        "account": "acme",
        "token_id": "tok_1",
        "model": "small",
        "served_model": "small-q4",
        "status": "settled",
        "outcome": "stop",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 20,
        "cost_nanos": 6 * 150 + 4 * 75 + 20 * 600,
        "waived_nanos": 0,
        "input_nanos": 150,
        "cached_input_nanos": 75,
        "output_nanos": 600,
        "opened_at": "2026-11-01T12:00:00.000000Z",
        "settled_at": "2026-11-01T12:00:00.000001Z",
    }
    assert [row["status"] for row in rows] == ["settled", "interrupted", "refunded", "settled"]
    assert rows[2]["cost_nanos"] == 0 and rows[2]["completion_tokens"] == 20


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["--since", "2026-11-02"], "124"),
        (["--until", "2026-11-02"], "0"),
        (["--since", "2026-11-01T12:00:00Z", "--until", "2026-11-02T13:00:00+01:00"], "0"),
        (["--since", "2026-11-01T12:00:00.000001Z", "--until", "2026-11-03"], "1"),
        (["--account", "zeta"], "4"),
        (["--status", "refunded", "--status", "interrupted"], "12"),
        (["--status", "settled", "--account", "acme"], "0"),
        (["--open"], "01234"),
        (["--open", "--since", "2026-11-04", "--until", "2026-11-05"], "3"),
        (["--account", "nobody"], ""),
    ],
)
def test_some_requests(
    capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, words: list[str], numbers: str
) -> None:
    found = [row["request_id"] for row in exported(capfdbinary, data_dir, *words)]
    assert found == [f"req_{number}" for number in numbers]


def test_one_that_runs_was_not_settled_yet(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path) -> None:
    (row,) = [row for row in exported(capfdbinary, data_dir, "--open") if row["status"] == "open"]
    assert (row["request_id"], row["settled_at"], row["outcome"], row["cost_nanos"]) == ("req_3", None, None, 0)


def test_who_reads_only_the_beginning_sees_no_complaint(data_dir: Path, db: Connection) -> None:
    with db.transaction():
        requests.apply(db, [record("settlement", number) for number in range(10, 2000)], NOON)
    program = [sys.executable, "-m", "octoai", "ledger", "export", "--data-dir", str(data_dir)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ.copy()) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


def test_who_takes_a_while_to_read_does_not_make_the_log_grow(data_dir: Path, db: Connection) -> None:
    """As with a pager: what was written meanwhile stayed in the write-ahead log, gigabytes of it."""
    numbers = [*range(10, 2600)]
    with db.transaction():
        requests.apply(db, [record("settlement", number) for number in numbers], NOON)
    db.execute("PRAGMA busy_timeout = 0")
    program = [sys.executable, "-m", "octoai", "ledger", "export", "--data-dir", str(data_dir)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        first = child.stdout.readline()  # what follows is more than a pipe takes
        with db.transaction():
            requests.apply(db, [record("settlement", 9)], NOON)
        row = db.row("PRAGMA wal_checkpoint(TRUNCATE)")
        assert row is not None and row[0] == 0  # all of it, nobody being in the way
        found = [json.loads(line)["request_id"] for line in [first, *child.stdout]]
    assert set(found) >= {f"req_{number}" for number in (0, 1, 2, 4, *numbers)} and len(found) == len(set(found))


def test_a_request_is_refunded_once(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, db: Connection) -> None:
    status, out, err = octoai(capfdbinary, data_dir, "refund", "req_0", "--note", "our fault")
    assert (status, out, err) == (0, "refunded req_0: 0.0000132 USD to account acme\n", "")
    assert db.row("SELECT kind, amount_nanos, note FROM entries ORDER BY seq DESC") == ("refund", 13200, "our fault")
    status, out, err = octoai(capfdbinary, data_dir, "refund", "req_0", "--note", "again")
    assert (status, out, err) == (1, "", "octoai: request req_0 was refunded before\n")
    assert octoai(capfdbinary, data_dir, "verify")[0] == 0


@pytest.mark.parametrize(
    ("name", "note", "said"),
    [
        ("req_3", "x", "request req_3 has not ended yet: it was not charged"),
        ("req_9", "x", "there is no request 'req_9'; `octoai ledger export` shows them"),
        ("req_0", " ", "--note: 1 to 200 printable characters"),
        ("req_0", "a\nb", "--note: 1 to 200 printable characters"),
    ],
)
def test_what_cannot_be_refunded(
    capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, name: str, note: str, said: str
) -> None:
    assert octoai(capfdbinary, data_dir, "refund", name, "--note", note) == (1, "", f"octoai: {said}\n")


def test_of_two_with_one_name_the_id_says_which(
    capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, db: Connection
) -> None:
    with db.transaction():
        requests.apply(db, [record("settlement", 7, request_id="req_0")], NOON)
    status, _, err = octoai(capfdbinary, data_dir, "refund", "req_0", "--note", "x")
    assert (status, err) == (1, "octoai: 2 requests are called 'req_0'; say which, by its id: id0, id7\n")
    assert octoai(capfdbinary, data_dir, "refund", "id7", "--note", "x")[0] == 0
    assert [row["id"] for row in exported(capfdbinary, data_dir, "--status", "refunded")] == ["id2", "id7"]


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2026-13-01",
        "2026-11-01T12:00:00",
        "20261101",
        "2026-W45-1",
        "٢٠٢٦-11-01",
        "0001-01-01T00:00:00+01:00",
        "2026-11-01T24:00:00Z",
        "",
    ],
)
def test_what_is_no_time_is_wrong_usage(capfdbinary: pytest.CaptureFixture[bytes], data_dir: Path, text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        octoai(capfdbinary, data_dir, "export", "--since", text)
    assert caught.value.code == 2
    assert (
        capfdbinary.readouterr()
        .err.splitlines()[-1]
        .endswith(f"--since: a time is like 2026-11-22, or 2026-11-22T13:45:00Z, not {text!r}".encode())
    )


@given(st.integers(0, 253_402_300_799_999_999))
def test_moments_are_written_and_read_exactly(at_us: int) -> None:
    assert moment(rfc3339(at_us)) == at_us


def test_days_and_months_are_of_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    assert moment("2026-11-01") == NOON - DAY // 2
    assert moment("2026-11-01T13:00:00+01:00") == moment("2026-11-01T12:00:00Z") == NOON
    assert months("2026-11") == (moment("2026-11-01"), moment("2026-12-01"))
    assert months("2026-12") == (moment("2026-12-01"), moment("2027-01-01"))
    assert months("2024-02")[1] - months("2024-02")[0] == 29 * DAY


@pytest.mark.parametrize(
    "text", ["2026", "2026-13", "2026-00", "2026-1", "26-11", "2026-11-01", "9999-12", "٢٠٢٦-11", ""]
)
def test_what_is_no_month_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a month is like 2026-11, not [^\n]*$"):
        months(text)


def test_the_command_starts_without_the_heavy_half() -> None:
    program = "import sys, octoai.cli.ledger; print([name for name in sys.modules if name.startswith('octoai.server')])"
    assert subprocess.check_output([sys.executable, "-c", program]) == b"[]\n"


WITHOUT_A_DATABASE = [
    *("ledger verify", "ledger export", "ledger refund req_1 --note x", "usage", "statement 2026-11", "price list"),
    *("account list", "account show acme", "account credit acme 1", "account adjust acme 1 --note x"),
    *("account update acme", "account close acme", "account reopen acme"),
    *("token list", "token update tok_1", "token revoke tok_1"),
]


@pytest.mark.parametrize("command", WITHOUT_A_DATABASE)
def test_where_there_is_no_database_none_is_made_to_be_found_whole(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "mistyped"
    assert main([*command.split(), "--data-dir", str(place)]) == 1
    wanted = (
        f"octoai: there is no database in '{place}': give the service's --data-dir, or make one with `octoai serve`\n"
    )
    assert capsys.readouterr() == ("", wanted)
    assert not place.exists()


@pytest.mark.parametrize(
    "command", ["account create acme", "token create --name x", "price set smollm2 --input 1 --output 1"]
)
def test_what_creates_something_makes_the_database_for_it(command: str, tmp_path: Path) -> None:
    assert main([*command.split(), "--data-dir", str(tmp_path / "new")]) == 0
    assert main(["ledger", "verify", "--data-dir", str(tmp_path / "new")]) == 0
