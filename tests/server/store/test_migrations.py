"""Migrations: done once whoever comes first, whole or not at all, and nothing that was there is lost by them."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from octoai.server.store import Place, StoreError, StoreFull, connect
from octoai.server.store.schema import MIGRATIONS
from octoai.server.store.sqlite import FILENAME, NUM_BACKUPS

SCHEMA_1 = """
CREATE TABLE tokens (
    id          TEXT PRIMARY KEY,
    account     TEXT NOT NULL,
    name        TEXT NOT NULL,
    hash        {blob} NOT NULL UNIQUE,
    hint        TEXT NOT NULL,
    created_at  {integer} NOT NULL,
    revoked_at  {integer}
)
"""
OLD_TOKENS = [
    ("tok_1", "default", "bootstrap", b"\x01" * 32, "octoai_aaaa…bbbb", 1_700_000_000, None),
    ("tok_2", "default", "laptop", b"\x02" * 32, "octoai_cccc…dddd", 1_700_000_001, None),
    ("tok_3", "other", "gone", b"\x03" * 32, "octoai_eeee…ffff", 1_700_000_002, 1_700_000_003),
]
PROGRAM = """
import os, sys, time
from itertools import islice
from pathlib import Path
from octoai.server.store import Place, connect, postgres, schema, sqlite
place = Place(Path(sys.argv[1]), sys.argv[2] or None)
"""
MEET = PROGRAM + "time.sleep(max(0, float(sys.argv[3]) - time.time())); connect(place).close()"
DIE = (
    PROGRAM
    + """
def dying(migration, database):
    yield from islice(schema.statements(migration, database), 5)
    os._exit(9)
postgres.statements = sqlite.statements = dying
connect(place)
"""
)
FILL_DISK = (
    PROGRAM
    + """
import resource, signal
from octoai.server.store import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # in place of a disk that is full
try:
    connect(place)
except StoreError as error:
    print(type(error).__name__)
"""
)


def command(program: str, place: Place, *more: str) -> list[str]:
    return [sys.executable, "-c", program, str(place.data_dir), place.url or "", *more]


def old_database(place: Place) -> None:
    """With tokens in it, as version 1.12.0 left it (which knew SQLite only)."""
    if place.url is None:
        place.data_dir.mkdir(mode=0o700)
        (place.data_dir / FILENAME).touch(mode=0o600)
        raw = sqlite3.connect(place.data_dir / FILENAME, isolation_level=None)
        raw.execute(SCHEMA_1.format(blob="BLOB", integer="INTEGER") + "STRICT")
        raw.execute("PRAGMA user_version = 1")
        raw.executemany("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?)", OLD_TOKENS)
        raw.close()
        return
    with psycopg.connect(place.url) as connection:
        connection.execute(SCHEMA_1.format(blob="BYTEA", integer="BIGINT").encode())
        connection.execute("CREATE TABLE schema_version (version BIGINT NOT NULL)")
        connection.execute("INSERT INTO schema_version VALUES (1)")
        connection.cursor().executemany("INSERT INTO tokens VALUES (%s, %s, %s, %s, %s, %s, %s)", OLD_TOKENS)


def version(place: Place) -> int:
    connection = connect(place, migrate=False)
    found = connection.row("PRAGMA user_version" if place.url is None else "SELECT version FROM schema_version")
    connection.close()
    assert found is not None
    return int(found[0])


def tables(place: Place) -> set[str]:
    connection = connect(place, migrate=False)
    lists = {True: "SELECT name FROM sqlite_schema WHERE type = 'table'", False: "SELECT tablename FROM pg_tables"}
    names = {str(name) for (name,) in connection.rows(lists[place.url is None])}
    connection.close()
    return names


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_tokens_of_the_first_schema_are_kept(place: Place) -> None:
    old_database(place)
    connection = connect(place)
    columns = "id, account, name, hash, hint, created_at, revoked_at"
    assert connection.rows(f"SELECT {columns} FROM tokens ORDER BY id") == OLD_TOKENS
    scopes = dict(connection.rows("SELECT name, scopes FROM tokens"))
    assert set(scopes["bootstrap"].split()) == {"inference", "usage", "admin"}
    assert set(scopes["laptop"].split()) == {"inference", "usage"}
    assert connection.rows("SELECT id FROM accounts ORDER BY id") == [("default",), ("other",)]
    connection.close()
    assert version(place) == len(MIGRATIONS)


def test_migrating_a_migrated_database_changes_nothing(place: Place) -> None:
    for _ in range(2):
        connect(place).close()
        assert version(place) == len(MIGRATIONS)


@pytest.mark.parametrize("start", ["empty", "old"])
def test_a_migration_that_fails_changes_nothing_and_the_next_start_completes_it(
    place: Place, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(place, migrate=False).close() if start == "empty" else old_database(place)
    before = tables(place)

    def failing(migration: str, database: str) -> Iterator[str]:
        yield "CREATE TABLE halfway (id INTEGER)"
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patched:
        for module in ("sqlite", "postgres"):
            patched.setattr(f"octoai.server.store.{module}.statements", failing)
        with pytest.raises(RuntimeError, match="in the middle"):
            connect(place)
    assert tables(place) == before
    connect(place).close()
    assert version(place) == len(MIGRATIONS)


def test_a_process_that_dies_while_migrating_leaves_the_database_as_it_was(place: Place) -> None:
    old_database(place)
    before = tables(place)
    assert subprocess.run(command(DIE, place), timeout=30, check=False).returncode == 9
    assert tables(place) == before
    connection = connect(place)
    assert len(connection.rows("SELECT id FROM tokens")) == len(OLD_TOKENS)
    connection.close()


@pytest.mark.parametrize("start", ["empty", "old"])
def test_processes_that_come_at_the_same_moment_migrate_it_once(place: Place, start: str) -> None:
    if start == "old":
        old_database(place)
    moment = str(time.time() + 1.0)
    processes = [subprocess.Popen(command(MEET, place, moment), stderr=subprocess.PIPE, text=True) for _ in range(6)]
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    assert version(place) == len(MIGRATIONS)
    backups = list(place.data_dir.glob("*.backup.db"))
    assert bool(backups) == (start == "old" and place.url is None)
    for backup in backups:
        with closing(sqlite3.connect(backup)) as copy:
            assert copy.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_newer_database_is_not_touched(place: Place) -> None:
    connection = connect(place)
    newer = "PRAGMA user_version = 99" if place.url is None else "UPDATE schema_version SET version = 99"
    connection.execute(newer)
    connection.close()
    with pytest.raises(
        StoreError, match=r"newer version.*99, and this one knows \d+\): use that version, or .* before"
    ):
        connect(place)


def test_a_newer_database_is_refused_with_the_backup_that_can_be_used(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    connection = connect(place)
    (known,) = connection.row("PRAGMA user_version") or (0,)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"put a backup from before in its place$"):
        connect(place)
    for schema, day in ((9, 1), (known, 2), (8, 1), (known + 1, 3)):
        (place.data_dir / f"octoai-schema{schema}-2020010{day}T000000Z.backup.db").touch()
    with pytest.raises(StoreError, match=rf": octoai-schema{known}-20200102T000000Z\.backup\.db is one, without "):
        connect(place)


def test_only_the_owner_can_read_the_file_and_its_backup(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    old_database(place)
    connection = connect(place)
    connection.execute("INSERT INTO versions VALUES ('tests', 7)")
    files = list(place.data_dir.iterdir())
    assert len(files) >= 3  # the write-ahead log is as secret as the rest
    assert {mode(file) for file in files} == {0o600}
    connect(Place(tmp_path / "new")).close()
    assert (mode(tmp_path / "new"), mode(tmp_path / "new" / FILENAME)) == (0o700, 0o600)
    connection.close()


def test_a_file_that_was_put_in_place_for_all_to_read_is_made_private(tmp_path: Path) -> None:
    place = Place(tmp_path)
    file = tmp_path / FILENAME
    with closing(connect(place)) as other:
        files = [file, *tmp_path.glob(f"{FILENAME}-*")]
        assert len(files) == 3
        for each in files:
            each.chmod(0o644)
        connect(place).close()
        assert {mode(each) for each in files} == {0o600}
        with other.transaction(), pytest.raises(sqlite3.OperationalError, match="locked"):  # its locks are whole
            sqlite3.connect(file, timeout=0).execute("BEGIN IMMEDIATE")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody else")
def test_a_file_of_somebody_else_keeps_its_mode(tmp_path: Path) -> None:
    place, file = Place(tmp_path), tmp_path / FILENAME
    connect(place).close()
    os.chown(file, 65534, 65534)
    file.chmod(0o664)
    connect(place).close()
    assert mode(file) == 0o664


def test_the_old_database_is_kept_beside_the_migrated_one(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    old_database(place)
    for number in range(NUM_BACKUPS + 2):  # of numbers that come behind this one's as text
        (place.data_dir / f"octoai-schema9{number}-20200101T00000{number}Z.backup.db").touch()
    connect(place).close()
    backups = {*place.data_dir.glob("*.backup.db")}
    assert len(backups) == NUM_BACKUPS
    (newest,) = [backup for backup in backups if "-schema1-" in backup.name]
    copy = sqlite3.connect(newest)
    assert copy.execute("SELECT * FROM tokens ORDER BY id").fetchall() == OLD_TOKENS
    copy.close()


def test_a_backup_that_finds_no_room_leaves_nothing_and_takes_no_others_place(tmp_path: Path) -> None:
    """Each start left a part of one, and five of those were all the backups that were kept."""
    place = Place(tmp_path / "data")
    old_database(place)
    with closing(sqlite3.connect(place.data_dir / FILENAME)) as raw, raw:
        more = [(f"tok_{number}", "a", "x" * 1000, str(number).encode(), "h", 1, None) for number in range(10, 500)]
        raw.executemany("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?)", more)
    whole = place.data_dir / "octoai-schema1-20200101T000000Z.backup.db"
    whole.touch()
    for _ in range(2):
        ran = subprocess.run(command(FILL_DISK, place), capture_output=True, text=True, timeout=30, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "StoreFull\n", "")
        assert [path for path in place.data_dir.iterdir() if "backup" in path.name] == [whole]
    connect(place).close()
    assert len([path for path in place.data_dir.iterdir() if "backup" in path.name]) == 2


def test_what_a_process_that_was_killed_left_of_a_backup_goes_with_the_next(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    old_database(place)
    for suffix in ("", "-journal"):
        (place.data_dir / f"octoai.backup.partial{suffix}").write_bytes(b"the beginning of one")
    connect(place).close()
    (backup,) = [path for path in place.data_dir.iterdir() if "backup" in path.name]
    with closing(sqlite3.connect(backup)) as copy:
        assert copy.execute("SELECT * FROM tokens ORDER BY id").fetchall() == OLD_TOKENS


def test_that_there_is_no_room_for_a_backup_is_said_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "data")
    old_database(place)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreFull, match=r"octoai\.db is of an older version .* takes 0\.0 MB .* 0\.0 MB are free$"):
        connect(place)
    assert [path for path in place.data_dir.iterdir() if "backup" in path.name] == []
    monkeypatch.undo()
    connect(place).close()
    assert version(place) == len(MIGRATIONS)
