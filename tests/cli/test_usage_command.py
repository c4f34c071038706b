"""`octoai usage`: what it prints, for people and for programs, and what it says where it cannot."""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from octoai.cli import main
from octoai.cli.dates import moment
from octoai.server import accounts, tokens
from octoai.server.store import Connection, Place, connect
from octoai.server.store.entries import Entry, post

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Its status, and what it said on standard output and on standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["usage", *arguments, "--data-dir", str(tmp_path)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def charge(at_us: int, token: str, model: str, nanos: int, account: str = "acme") -> Entry:
    counts = {"prompt_tokens": 1000, "cached_tokens": 200, "completion_tokens": 30}
    return Entry(at_us, account, "charge", -nanos, token_id=token, request="r", model=model, **counts)


def fill(db: Connection) -> tuple[str, str]:
    """Two accounts with a token each, and what they used in October and November 2026. The ids of the tokens."""
    with db.transaction():
        for account in ("acme", "zeta"):
            accounts.create(db, account)
        acme, zeta = (tokens.mint(db, name, name.strip("=")).id for name in ("=acme", "zeta"))
        november = moment("2026-11-01")
        post(
            db,
            [
                charge(moment("2026-10-31T23:59:59Z"), acme, "tiny", 1),
                charge(november, acme, "tiny", 1_500),
                charge(november + 1, acme, "large", 2_000_000_000),
                charge(moment("2026-11-02T10:30:00Z"), zeta, "tiny", 70, "zeta"),
            ],
        )
    return acme, zeta


@pytest.fixture
def ids(tmp_path: Path) -> tuple[str, str]:
    with closing(connect(Place(tmp_path))) as db:
        return fill(db)


KINDS = ("prompt", "cached", "completion")
NOVEMBER = ("--since", "2026-11-01", "--until", "2026-12-01")


def test_the_table_has_a_row_for_each_model_and_their_total(run: Run, ids: tuple[str, str]) -> None:
    status, out, err = run(*NOVEMBER)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "Usage from 2026-11-01 00:00:00 UTC to 2026-12-01 00:00:00 UTC",
        "MODEL  REQUESTS  PROMPT TOKENS  CACHED TOKENS  COMPLETION TOKENS         USD",
        "large         1          1,000            200                 30  2.00",
        "tiny          2          2,000            400                 60  0.00000157",
        "total         3          3,000            600                 90  2.00000157",
    ]


def test_it_is_of_this_month_unless_told(run: Run, ids: tuple[str, str], tmp_path: Path) -> None:
    with closing(connect(Place(tmp_path))) as db, db.transaction():
        post(db, [charge(time.time_ns() // 1000, ids[0], "today's", 5)])
    status, out, _ = run("--csv")
    assert status == 0
    assert "today's" in out


def test_csv_is_for_programs(run: Run, ids: tuple[str, str]) -> None:
    acme, zeta = ids
    _, out, _ = run(*NOVEMBER, "--by", "day,token", "--by", "model", "--csv")
    assert out.count("\r\n") == out.count("\n") == 4
    counts = ["1", "1000", "200", "30"]
    assert list(csv.reader(io.StringIO(out, newline=""))) == [
        ["day", "token_id", "token_name", "model", "requests", *(f"{kind}_tokens" for kind in KINDS), "usd"],
        ["2026-11-01", acme, "'=acme", "large", *counts, "2.00"],
        ["2026-11-01", acme, "'=acme", "tiny", *counts, "0.0000015"],
        ["2026-11-02", zeta, "zeta", "tiny", *counts, "0.00000007"],
    ]


def test_json_has_exact_sums(run: Run, ids: tuple[str, str]) -> None:
    _, out, _ = run(*NOVEMBER, "--by", "account", "--json")
    told = json.loads(out)
    assert (told["since"], told["until"]) == ("2026-11-01T00:00:00.000000Z", "2026-12-01T00:00:00.000000Z")
    assert [(row["account"], row["usd"], row["cost_nanos"]) for row in told["rows"]] == [
        ("acme", "2.0000015", 2_000_001_500),
        ("zeta", "0.00000007", 70),
    ]
    total = {"requests": 3, "prompt_tokens": 3000, "cached_tokens": 600, "completion_tokens": 90}
    assert told["total"] == {**total, "usd": "2.00000157", "cost_nanos": 2_000_001_570}


def test_one_account_and_any_span(run: Run, ids: tuple[str, str]) -> None:
    _, out, _ = run("--since", "2026-10-01", "--until", "2026-11-02", "--by", "month", "--account", "acme", "--csv")
    assert [row[0] for row in csv.reader(io.StringIO(out))] == ["month", "2026-10", "2026-11"]
    _, out, _ = run("--since", "2026-11-02T10:00:00Z", "--until", "2026-11-02T11:00:00Z", "--by", "hour", "--csv")
    assert out.splitlines()[1].startswith("2026-11-02 10:00,1,")
    _, out, _ = run("--since", "2026-11-02T10:30:59Z", "--until", "2026-11-02T10:30:59.5Z")
    assert out.startswith("Usage from 2026-11-02 10:30:00 UTC to 2026-11-02 10:31:00 UTC\n")
    assert "tiny" in out
    status, out, _ = run("--since", "2020-01-01", "--until", "2020-02-01")
    assert (status, out.splitlines()[-1].split()) == (0, ["total", "0", "0", "0", "0", "0.00"])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--since", "yesterday"), 2, "2026-11-22"),
        (("--since", "2026-11-02", "--until", "2026-11-02"), 2, "nothing between"),
        (("--by", "colour"), 2, "'colour'"),
        (("--by", "day,month"), 2, "not by both"),
        (("--account", "nobody"), 1, "no account 'nobody'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    run: Run, ids: tuple[str, str], arguments: tuple[str, ...], status: int, said: str
) -> None:
    ended, out, err = run(*arguments)
    assert (ended, out) == (status, "")
    assert said in err
    assert err.startswith("octoai: ")
    assert err.count("\n") == 1


def test_the_commands_load_nothing_heavy_before_they_run() -> None:
    program = "import sys, octoai.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name.startswith(("octoai.server", "starlette", "orjson", "pydantic"))]


def test_the_last_moment_that_can_be_written_is_understood(run: Run, tmp_path: Path) -> None:
    connect(Place(tmp_path)).close()
    status, out, _ = run("--until", "9999-12-31T23:59:59.5Z")
    assert (status, out[-5:]) == (0, "0.00\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
@pytest.mark.parametrize("arguments", [["usage", "--csv"], ["token", "list"], ["--help"]])
def test_where_there_is_no_room_for_what_is_printed_it_is_said_in_one_line(
    tmp_path: Path, arguments: list[str]
) -> None:
    with closing(connect(Place(tmp_path))) as db:
        fill(db)
    place = [] if arguments == ["--help"] else ["--data-dir", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "octoai", *arguments, *place]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (1, "octoai: No space left on device\n")


def test_a_closed_output_is_no_matter(tmp_path: Path) -> None:
    connect(Place(tmp_path)).close()
    command = f'"{sys.executable}" -m octoai usage --data-dir "{tmp_path}" >&-'
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("command", ["usage --csv", "statement 2026-10 --csv", "ledger export"])
def test_what_is_made_for_a_file_is_not_made_for_a_closed_output(tmp_path: Path, command: str) -> None:
    connect(Place(tmp_path)).close()
    command = f'"{sys.executable}" -m octoai {command} --data-dir "{tmp_path}" >&-'
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (1, "octoai: there is no standard output to write to\n")


def test_what_was_printed_before_something_went_wrong_is_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        print("done so far")
        raise TimeoutError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *_: argparse.Namespace(run=run))
    assert main(["usage"]) == 1
    out, err = capfd.readouterr()
    assert (out, err) == ("done so far\n", "octoai: TimeoutError\n")


def test_a_directory_that_was_deleted_is_no_matter(tmp_path: Path) -> None:
    """Where the command runs, without a configuration there."""
    connect(Place(tmp_path)).close()
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'rmdir "{gone}" && "{sys.executable}" -m octoai usage --data-dir "{tmp_path}"'
    ran = subprocess.run(command, shell=True, cwd=gone, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_who_takes_a_while_to_read_does_not_make_the_log_grow(tmp_path: Path) -> None:
    """As with a pager: what was written meanwhile stayed in the write-ahead log, gigabytes of it."""
    with closing(connect(Place(tmp_path))) as db:
        with db.transaction():
            accounts.create(db, "acme")
            start = moment("2026-11-01")
            post(db, [charge(start + number * 60_000_000, f"tok_{number}", "tiny", 1) for number in range(3000)])
        db.execute("PRAGMA busy_timeout = 0")
        command = [sys.executable, "-m", "octoai", "usage", "--since", "2026-10-01", "--by", "token", "--csv"]
        with subprocess.Popen([*command, "--data-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True) as reading:
            assert reading.stdout is not None
            first = reading.stdout.readline()  # what follows is more than a pipe takes
            with db.transaction():
                post(db, [charge(start, "tok_late", "tiny", 1)])
            row = db.row("PRAGMA wal_checkpoint(TRUNCATE)")
            assert row is not None and row[0] == 0  # all of it, nobody being in the way
            rest = list(reading.stdout)
    assert first.startswith("token_id,") and len(rest) == 3000
    assert not any(line.startswith("tok_late,") for line in rest)


def test_who_reads_no_further_is_told_nothing(tmp_path: Path) -> None:
    """As `| head` does, or a pager that is left: a traceback followed."""
    with closing(connect(Place(tmp_path))) as db, db.transaction():
        accounts.create(db, "acme")
        start = moment("2026-11-01")
        post(db, [charge(start + number * 60_000_000, f"tok_{number}", "tiny", 1) for number in range(3000)])
    command = [sys.executable, "-m", "octoai", "usage", "--since", "2026-10-01", "--by", "token", "--csv"]
    reading = subprocess.Popen(
        [*command, "--data-dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reading.stdout is not None and reading.stderr is not None
    reading.stdout.readline()
    reading.stdout.close()
    assert reading.stderr.read() == ""
    reading.stderr.close()
    reading.wait(20)
