"""The database: for its owner alone, migrated once whoever comes first, and never by an older version."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from octoai.server.store import FILENAME, StoreError, connect

OPEN = """
import sys, time
from pathlib import Path
from octoai.server.store import connect
from octoai.server.store.tokens import TokenTable
from octoai.server.tokens import Tokens
time.sleep(max(0, float(sys.argv[2]) - time.time()))
tokens = Tokens(TokenTable(connect(Path(sys.argv[1]))))
for _ in range(20):
    assert tokens.is_valid(tokens.mint("x").text)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    connection = connect(tmp_path / "data")
    connection.execute("INSERT INTO tokens VALUES ('i', 'a', 'n', x'00', 'h', 1, NULL)")
    assert mode(tmp_path / "data") == 0o700
    files = list((tmp_path / "data").iterdir())
    assert len(files) >= 2  # the write-ahead log is as secret as the rest
    assert {mode(file) for file in files} == {0o600}
    connection.close()


def test_it_is_there_again_the_next_time(tmp_path: Path) -> None:
    first = connect(tmp_path)
    first.execute("INSERT INTO tokens VALUES ('i', 'a', 'n', x'00', 'h', 1, NULL)")
    first.close()
    second = connect(tmp_path)
    assert second.execute("SELECT id FROM tokens").fetchall() == [("i",)]
    assert second.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    second.close()


def test_processes_that_come_at_the_same_moment_migrate_it_once(tmp_path: Path) -> None:
    import time

    start = str(time.time() + 1.0)
    command = [sys.executable, "-c", OPEN, str(tmp_path / "data"), start]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    connection = connect(tmp_path / "data")
    assert connection.execute("SELECT count(*) FROM tokens").fetchone() == (120,)
    connection.close()


def test_a_newer_database_is_not_touched(tmp_path: Path) -> None:
    connect(tmp_path).close()
    raw = sqlite3.connect(tmp_path / FILENAME)
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(StoreError, match=r"newer version.*99"):
        connect(tmp_path)


def test_a_migration_that_was_interrupted_is_done_again(tmp_path: Path) -> None:
    raw = sqlite3.connect(tmp_path / FILENAME, isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    raw.execute("CREATE TABLE tokens (id TEXT)")
    raw.close()  # dies before its end
    connection = connect(tmp_path)
    assert connection.execute("SELECT hash FROM tokens").fetchall() == []
    connection.close()


@pytest.mark.parametrize("wreck", ["garbage", "directory", "file in the way"])
def test_what_cannot_be_used_is_one_line_that_names_it(tmp_path: Path, wreck: str) -> None:
    place = tmp_path / "data"
    if wreck == "file in the way":
        place.write_text("x")
    else:
        place.mkdir()
        if wreck == "garbage":
            (place / FILENAME).write_bytes(b"not a database, not at all " * 100)
        else:
            (place / FILENAME).mkdir()
    with pytest.raises(StoreError) as caught:
        connect(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)
