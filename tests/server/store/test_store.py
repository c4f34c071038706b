"""The database, SQLite and PostgreSQL alike: one meaning of every statement."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from octoai.server.store import Conflict, Connection, Place, StoreAway, StoreError, connect
from octoai.server.store import reader as reader_module
from octoai.server.store.reader import Reader
from octoai.server.store.sqlite import FILENAME

READ = """
import sys
from pathlib import Path
from octoai.server.store import Place, connect

def peak_kib():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

connection = connect(Place(Path(sys.argv[1]), sys.argv[2] or None), migrate=False)
with connection.snapshot():
    before = peak_kib()
    print(sum(1 for _ in connection.stream("SELECT id, text FROM things ORDER BY id")), peak_kib() - before)
connection.close()
"""


@pytest.fixture
def opened(place: Place) -> Iterator[Callable[[], Connection]]:
    """Connections to one database, in which there is a table of things."""
    connections: list[Connection] = []

    def open_one() -> Connection:
        connections.append(connect(place))
        return connections[-1]

    open_one().execute("CREATE TABLE things (id BIGINT PRIMARY KEY, text TEXT)")
    yield open_one
    for each in connections:
        each.close()


@pytest.fixture
def connection(opened: Callable[[], Connection]) -> Connection:
    return opened()


def ids(connection: Connection) -> list[int]:
    return [row[0] for row in connection.rows("SELECT id FROM things ORDER BY id")]


def add(connection: Connection, number: int) -> None:
    connection.execute("INSERT INTO things VALUES (?, 'x')", (number,))


def test_it_is_there_again_the_next_time(place: Place) -> None:
    first = connect(place)
    first.execute("INSERT INTO versions VALUES ('tests', 7)")
    first.close()
    second = connect(place)
    assert second.row("SELECT value FROM versions WHERE name = ?", ("tests",)) == (7,)
    second.close()


def test_a_transaction_is_written_whole_or_not_at_all(opened: Callable[[], Connection]) -> None:
    connection, other = opened(), opened()
    with connection.transaction():
        add(connection, 1)
        add(connection, 2)
        assert ids(other) == []  # and a reader is not held up by it
    assert ids(other) == [1, 2]
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), connection.transaction():
            add(connection, 3)
            raise error
    assert ids(connection) == [1, 2]
    with connection.transaction():
        add(connection, 4)
    assert ids(other) == [1, 2, 4]


def test_a_transaction_within_a_transaction_is_refused(connection: Connection) -> None:
    with pytest.raises(StoreError, match="within a transaction"), connection.transaction():
        add(connection, 1)
        with connection.transaction():
            pass
    assert ids(connection) == []


def test_what_fails_in_a_savepoint_is_undone_and_the_rest_is_not(connection: Connection) -> None:
    with connection.transaction():
        add(connection, 1)
        with pytest.raises(Conflict), connection.savepoint():
            add(connection, 2)
            add(connection, 1)
        with connection.savepoint():
            add(connection, 3)
            with pytest.raises(ZeroDivisionError), connection.savepoint():
                add(connection, 4)
                raise ZeroDivisionError
        add(connection, 5)
    assert ids(connection) == [1, 3, 5]


def test_a_key_that_is_there_already_is_a_conflict(connection: Connection) -> None:
    add(connection, 1)
    with pytest.raises(Conflict) as caught:
        add(connection, 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(Conflict), connection.transaction():
        connection.execute_many("INSERT INTO things VALUES (?, ?)", [(2, "x"), (1, "x")])
    assert ids(connection) == [1]


def test_a_snapshot_is_of_one_moment_and_holds_no_writer_up(opened: Callable[[], Connection]) -> None:
    reader, writer = opened(), opened()
    add(writer, 1)
    with reader.snapshot():
        assert ids(reader) == [1]
        add(writer, 2)
        assert ids(reader) == [1]
    assert ids(reader) == [1, 2]


@pytest.mark.parametrize("num_interrupted", [1, 2])
def test_a_snapshot_whose_end_is_interrupted_is_over_for_the_next(tmp_path: Path, num_interrupted: int) -> None:
    place = Place(tmp_path)
    with closing(connect(place)) as reader, closing(connect(place)) as writer:
        writer.execute("CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT)")
        ends = 0

        def interrupt(statement: str) -> None:
            nonlocal ends
            ends += statement == "ROLLBACK"
            if statement == "ROLLBACK" and ends <= num_interrupted:
                reader.interrupt()

        reader._connection.set_trace_callback(interrupt)  # type: ignore[attr-defined]
        with reader.snapshot():
            assert ids(reader) == []
        add(writer, 1)
        assert ends == 2
        if num_interrupted == 1:
            assert ids(reader) == [1]
        with reader.snapshot():
            assert ids(reader) == [1]
        add(writer, 2)
        assert ids(reader) == [1, 2]


def test_what_a_transaction_has_read_is_not_changed_meanwhile(opened: Callable[[], Connection]) -> None:
    opened().execute("INSERT INTO things VALUES (1, '0')")

    def count(connection: Connection) -> None:
        for _ in range(50):
            with connection.transaction():
                (text,) = connection.row("SELECT text FROM things WHERE id = 1") or ("",)
                connection.execute("UPDATE things SET text = ? WHERE id = 1", (str(int(text) + 1),))

    threads = [threading.Thread(target=count, args=(opened(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened().row("SELECT text FROM things") == ("150",)


def test_execute_tells_how_many_rows_it_changed(connection: Connection) -> None:
    connection.execute_many("INSERT INTO things VALUES (?, ?)", ((number, None) for number in range(10)))
    assert connection.execute("UPDATE things SET text = 'y' WHERE id < ?", (3,)) == 3
    assert connection.execute("DELETE FROM things WHERE id = 99") == 0
    assert connection.row("SELECT id FROM things WHERE id = 99") is None


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, True, "", "ünï%s?code", b"", b"\x00\xff", None])
def test_a_value_comes_back_as_it_was(connection: Connection, value: object) -> None:
    kind = {int: "BIGINT", bool: "BIGINT", bytes: "BYTEA"}.get(type(value), "TEXT")
    connection.execute(f"CREATE TABLE kept (value {kind})")
    connection.execute("INSERT INTO kept VALUES (?)", (value,))
    assert connection.row("SELECT value FROM kept") == (value,)


def test_signs_between_quotes_are_no_parameters(connection: Connection) -> None:
    add(connection, 7)
    found = connection.row("SELECT '?', 'it''s 100 % ?', id % 4, ? FROM things WHERE text LIKE '%x'", ("p",))
    assert found == ("?", "it's 100 % ?", 3, "p")


def test_sums_and_averages_are_plain_numbers(connection: Connection) -> None:
    connection.execute_many("INSERT INTO things VALUES (?, ?)", [(2**62, "x"), (-3, "x")])
    (total, mean, none) = connection.row("SELECT sum(id), avg(id), sum(NULLIF(id, id)) FROM things") or ()
    assert (total, type(total), none) == (2**62 - 3, int, None)
    assert isinstance(mean, int | float) and mean == pytest.approx(2**61)


def test_an_error_is_one_line(connection: Connection) -> None:
    with pytest.raises(StoreError) as caught:
        connection.row("SELECT 1\nFROM nowhere\n")
    assert "\n" not in str(caught.value) and "nowhere" in str(caught.value)
    assert not isinstance(caught.value, Conflict)


def test_rows_are_streamed_in_bounded_memory(place: Place, connection: Connection) -> None:
    numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
    connection.execute(f"INSERT INTO things {numbers} SELECT i, ? FROM n", ("x" * 1000,))
    command = [sys.executable, "-c", READ, str(place.data_dir), place.url or ""]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    count, kib = map(int, done.stdout.split())
    assert count == 100_000
    assert kib < 16 * 1024  # of the 100 MB that were read


def test_a_stream_may_be_left_early_and_others_run_beside_it(connection: Connection) -> None:
    connection.execute_many("INSERT INTO things VALUES (?, 'x')", ((number,) for number in range(5000)))
    with connection.snapshot():
        first, second = (connection.stream("SELECT id FROM things ORDER BY id") for _ in range(2))
        assert [row[0] for row in itertools.islice(first, 2500)] == list(range(2500))
        assert next(second) == (0,)
        assert connection.row("SELECT count(*) FROM things") == (5000,)
    assert len(ids(connection)) == 5000


def test_a_commit_waits_for_the_disk_unless_told_otherwise(tmp_path: Path) -> None:
    connection = connect(Place(tmp_path))
    assert connection.row("PRAGMA journal_mode") == ("wal",)
    for is_durable, synchronous in ((True, 2), (False, 1), (True, 2)):
        connection.set_durable(is_durable)
        assert connection.row("PRAGMA synchronous") == (synchronous,)
    connection.close()


@pytest.mark.parametrize("wreck", ["garbage", "directory", "file in the way"])
def test_what_cannot_be_used_is_one_line_that_names_it(tmp_path: Path, wreck: str) -> None:
    directory = tmp_path / "data"
    if wreck == "file in the way":
        directory.write_text("x")
    else:
        directory.mkdir()
        if wreck == "garbage":
            (directory / FILENAME).write_bytes(b"not a database, not at all " * 100)
        else:
            (directory / FILENAME).mkdir()
    with pytest.raises(StoreError) as caught:
        connect(Place(directory))
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_copy_put_beside_the_log_of_a_newer_database_is_told_of_that_log(tmp_path: Path) -> None:
    path = tmp_path / FILENAME
    with closing(connect(Place(tmp_path))) as db:
        db.execute("CREATE TABLE things (id INTEGER PRIMARY KEY, text TEXT)")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        copy = path.read_bytes()
        for number in range(300):
            db.execute("INSERT INTO things VALUES (?, ?)", (number, "x" * 1000))
        log = path.with_name(f"{FILENAME}-wal").read_bytes()
    path.write_bytes(copy[: len(copy) // 2])
    path.with_name(f"{FILENAME}-wal").write_bytes(log[: len(log) // 2])
    with pytest.raises(StoreError, match=f"{FILENAME}-wal"), closing(connect(Place(tmp_path))) as db:
        db.rows("SELECT * FROM things")
        db.rows("PRAGMA integrity_check")


def test_a_reader_that_is_closed_while_it_reads_reads_to_the_end(place: Place) -> None:
    """As at the end of a service, whose look for changes has just begun. It used to end the process."""
    query = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 20000) SELECT MAX(x) FROM c"
    connect(place).close()
    found: list[int] = []

    def action(db: Connection) -> None:
        begun.set()
        row = db.row(query)
        assert row is not None
        found.append(row[0])

    async def main() -> None:
        reader = Reader(place)
        asking = asyncio.create_task(reader.run(action))
        await asyncio.to_thread(begun.wait)
        reader.close()
        await asking

    for _ in range(20):
        begun = threading.Event()
        asyncio.run(main())
    assert found == [20000] * 20


def test_what_nobody_waits_for_any_more_leaves_its_thread_to_others(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is between two statements when it is told to end; with one thread, all else would wait."""
    query = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 10000000000) SELECT MAX(x) FROM c"
    connect(place).close()
    monkeypatch.setattr(reader_module, "END_SECONDS", 0.05)

    def between(db: Connection) -> None:
        time.sleep(0.4)
        db.row(query)

    async def main() -> None:
        with closing(Reader(place, num_threads=1)) as reader:
            for endless in (lambda db: db.row(query), between):
                with pytest.raises(StoreAway, match=r"0\.2 s"):
                    await reader.run(endless, seconds=0.2)
                assert await reader.run(lambda db: db.row("SELECT 7"), seconds=3) == (7,)

    asyncio.run(main())
