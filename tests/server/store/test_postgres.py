"""What is PostgreSQL's alone: connections that are lost and found, URLs with passwords in them, and whom they reach."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest

from octoai.cli import missing
from octoai.server.store import Conflict, Place, StoreAway, StoreError, clocks, connect, postgres
from octoai.server.store.postgres import PostgresConnection
from octoai.server.store.writer import Writer
from tests.postgres import PASSWORD, PostgresServer, ServerMissing, programs
from tests.talking import until


@pytest.fixture
def connection(postgres_url: str) -> Iterator[PostgresConnection]:
    connection = PostgresConnection(postgres_url)
    connection.execute("CREATE TABLE things (id BIGINT PRIMARY KEY)")
    yield connection
    connection.close()


@contextmanager
def stopped(server: PostgresServer, mode: str = "fast") -> Iterator[None]:
    server.stop(mode)
    try:
        yield
    finally:
        server.start()


def end_connections(url: str) -> None:
    """As an administrator does, or a server that goes away."""
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def ids(connection: PostgresConnection) -> list[int]:
    return [row[0] for row in connection.rows("SELECT id FROM things ORDER BY id")]


def no_secret_in(error: BaseException) -> str:
    told = str(error)
    assert "\n" not in told
    everything = "".join(traceback.format_exception(error)) + repr(error)
    for secret in (PASSWORD, "s3cret", "w%C3%B6rd", "wörd"):
        assert secret not in everything
    return told


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_the_next_use_after_a_restart_of_the_server_finds_it_again(
    connection: PostgresConnection, postgres_server: PostgresServer, mode: str
) -> None:
    connection.execute("INSERT INTO things VALUES (1)")
    with stopped(postgres_server, mode):
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(StoreAway) as caught:
                connection.row("SELECT 1")
            no_secret_in(caught.value)
        assert time.monotonic() - began < 2
    assert ids(connection) == [1]
    with connection.transaction():
        connection.execute("INSERT INTO things VALUES (2)")
    assert ids(connection) == [1, 2]


def test_a_connection_that_was_ended_while_idle_is_made_again_unnoticed(
    connection: PostgresConnection, postgres_url: str
) -> None:
    def transact() -> None:
        with connection.transaction():
            connection.execute("INSERT INTO things VALUES (3)")

    uses: list[Callable[[], object]] = [
        lambda: connection.row("SELECT 1"),
        lambda: connection.execute("DELETE FROM things"),
        lambda: connection.execute_many("INSERT INTO things VALUES (?)", [(1,), (2,)]),
        transact,
    ]
    for use in uses:
        end_connections(postgres_url)
        use()
    assert ids(connection) == [1, 2, 3]


def test_a_transaction_whose_connection_is_lost_fails_whole(connection: PostgresConnection, postgres_url: str) -> None:
    with pytest.raises(StoreAway), connection.transaction():
        connection.execute("INSERT INTO things VALUES (1)")
        end_connections(postgres_url)
        connection.execute("INSERT INTO things VALUES (2)")
    with pytest.raises(StoreAway), connection.transaction():
        connection.execute("INSERT INTO things VALUES (3)")
        end_connections(postgres_url)
    with pytest.raises(StoreAway), connection.snapshot():
        rows = connection.stream("SELECT generate_series(1, 5000)")
        next(rows)
        end_connections(postgres_url)
        list(rows)
    assert ids(connection) == []


def test_who_stands_still_in_a_transaction_loses_it_and_holds_up_nobody(
    connection: PostgresConnection, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "IDLE_SECONDS", 1)
    other = PostgresConnection(postgres_url)
    with pytest.raises(StoreAway), connection.transaction():
        connection.execute("INSERT INTO things VALUES (1)")
        began = time.monotonic()
        with other.transaction():
            other.execute("INSERT INTO things VALUES (2)")
        assert time.monotonic() - began < 3
        connection.execute("INSERT INTO things VALUES (3)")
    assert ids(connection) == [2]
    other.close()


def test_a_statement_may_take_longer_than_a_pause_between_two(
    connection: PostgresConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "IDLE_SECONDS", 1)
    with connection.transaction():
        connection.execute("INSERT INTO things VALUES (1)")
        connection.row("SELECT pg_sleep(1.5)")
    assert ids(connection) == [1]


def test_a_lock_that_is_not_given_up_is_told_with_what_to_do(
    connection: PostgresConnection, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "LOCK_SECONDS", 1)
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (postgres._WRITER_LOCK,))
        began = time.monotonic()
        said = r"locked for 1 s; pg_locks says which, pg_terminate_backend"
        with pytest.raises(StoreAway, match=said), connection.transaction():
            connection.execute("INSERT INTO things VALUES (1)")
        assert time.monotonic() - began < 3
    with connection.transaction():
        connection.execute("INSERT INTO things VALUES (2)")
    assert ids(connection) == [2]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_writer_sees_what_the_one_before_has_written_whatever_the_databases_default(
    postgres_url: str, connection: PostgresConnection, level: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
    one, other = PostgresConnection(postgres_url), PostgresConnection(postgres_url)
    seen: list[list[int]] = []

    def look() -> None:
        with other.transaction():
            seen.append(ids(other))

    with one.transaction():
        looking = threading.Thread(target=look)
        looking.start()
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        until(lambda: connection.row(waits) is not None, 5)
        one.execute("INSERT INTO things VALUES (1)")
    looking.join()
    assert seen == [[1]]
    one.close()
    other.close()


def test_a_failure_that_was_caught_does_not_look_written(connection: PostgresConnection) -> None:
    with pytest.raises(StoreError, match="nothing was written"), connection.transaction():
        connection.execute("INSERT INTO things VALUES (1)")
        with pytest.raises(Conflict):
            connection.execute("INSERT INTO things VALUES (1)")
    assert ids(connection) == []


def test_a_connection_is_closed_by_another_thread_while_the_server_hangs(
    connection: PostgresConnection, postgres_server: PostgresServer
) -> None:
    failed: list[Exception] = []

    def ask() -> None:
        try:
            connection.row("SELECT 1")
        except StoreError as error:
            failed.append(error)

    postgres_server.pause()
    try:
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        began = time.monotonic()
        connection.close()
        thread.join(5)
        assert time.monotonic() - began < 1 and not thread.is_alive()
    finally:
        postgres_server.resume()
    assert [type(error) for error in failed] == [StoreAway]
    with pytest.raises(StoreError, match="is closed"):
        connection.row("SELECT 1")
    connection.close()


def test_what_is_interrupted_ends_in_the_server_too(connection: PostgresConnection, postgres_url: str) -> None:
    query = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 10000000000) SELECT MAX(x) FROM c"
    running = "SELECT COUNT(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'WITH RECURSIVE c%'"
    failed: list[Exception] = []

    def ask() -> None:
        try:
            connection.row(query)
        except StoreError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    with closing(PostgresConnection(postgres_url)) as other:
        thread.start()
        until(lambda: other.row(running) == (1,))
        connection.interrupt()
        thread.join(5)
        assert [type(error) for error in failed] == [StoreAway]
        until(lambda: other.row(running) == (0,))
    assert connection.row("SELECT 7") == (7,)


def test_a_server_that_hangs_is_away_after_three_seconds(postgres_url: str, postgres_server: PostgresServer) -> None:
    postgres_server.pause()
    try:
        began = time.monotonic()
        with pytest.raises(StoreAway) as caught:
            PostgresConnection(postgres_url)
        assert 2 < time.monotonic() - began < 5
        no_secret_in(caught.value)
    finally:
        postgres_server.resume()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:s3cret@h/d",
        "/var/lib/octoai.db",
        "host=h password=s3cret",
        "postgresql:/u:s3cret@h/d",
        "postgresql://u:s3cret@wörd@h/d",
        "postgresql://u:12/s3cret@h/d",
        "postgresql://u:s3cret/x@h/d",
        "postgresql://u:s3cret%zz@h/d",
        "postgresql://u@x:s3cret@h/d",
        "postgresql://h/d?pasword=s3cret",
    ],
)
def test_what_is_no_url_of_postgresql_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="database must be postgresql://user@host/name") as caught:
        connect(Place(Path("/nowhere"), url))
    no_secret_in(caught.value)


def test_nothing_that_is_said_has_the_password_in_it(postgres_server: PostgresServer, postgres_url: str) -> None:
    right = postgres_server.url("postgres")
    for wrong, said in (
        (postgres_server.url("postgres", PASSWORD + "x"), "password authentication failed"),
        (postgres_server.url("nowhere"), "nowhere"),
        (right.replace(f":{postgres_server.port}/", ":1/"), "refused"),
        (right.replace("127.0.0.1", "nowhere.invalid"), "nowhere.invalid"),
        (right + "?sslmode=require", "SSL"),
    ):
        with pytest.raises(StoreAway, match=said) as caught:
            connect(Place(Path("/nowhere"), wrong))
        no_secret_in(caught.value)
    place = Place(Path("/nowhere"), postgres_url)
    connection = connect(place)
    assert "s3cret" not in repr(place) + repr(connection)
    with pytest.raises(StoreError) as caught_in_use:
        connection.execute("INSERT INTO versions VALUES (?)", ("a\0b",))
    no_secret_in(caught_in_use.value)
    connection.close()


def test_what_the_url_says_goes_before_our_own_settings(postgres_url: str) -> None:
    for more, name in (("", "octoai"), ("?application_name=other", "other")):
        connection = PostgresConnection(postgres_url + more)
        assert connection.row("SHOW application_name") == (name,)
        assert connection.row("SHOW client_encoding") == ("UTF8",)
        connection.close()


def test_a_commit_always_waits_for_the_disk(connection: PostgresConnection) -> None:
    connection.set_durable(False)
    assert connection.row("SHOW synchronous_commit") == ("on",)


def test_nothing_is_prepared_that_a_pooler_would_lose(connection: PostgresConnection) -> None:
    for number in range(20):
        connection.row("SELECT id FROM things WHERE id = ?", (number,))
        connection.execute_many("INSERT INTO things VALUES (?)", [(2 * number,), (2 * number + 1,)])
    assert connection.rows("SELECT name FROM pg_prepared_statements") == []


def test_without_psycopg_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['psycopg'] = None; import octoai.server.store.postgres"
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr.splitlines()[-1] and "psycopg" in done.stderr.splitlines()[-1]
    assert "octoai[server,postgres]>=1.12" in missing(ModuleNotFoundError(name="psycopg"))
    assert "octoai[server]>=1.12" in missing(ModuleNotFoundError(name="uvicorn.config"))


def test_where_there_is_no_server_the_tests_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("tests.postgres._PLACES", ())
    with pytest.raises(ServerMissing, match=r"apt-get install postgresql"):
        programs()


@pytest.mark.parametrize(("seconds", "said"), [(0, None), (2, None), (60, "60 s ahead of"), (-60, "60 s behind")])
def test_a_clock_that_is_not_the_databases_is_told_by_who_writes(
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    said: str | None,
) -> None:
    monkeypatch.setattr(clocks.time, "time", lambda: time.clock_gettime(time.CLOCK_REALTIME) + seconds)

    async def main() -> None:
        writer = Writer(Place(tmp_path, postgres_url))
        writer.start()
        for _ in range(2):
            assert await writer.run(lambda db: db.row("SELECT 1")) == (1,)
        await asyncio.to_thread(writer.close)

    asyncio.run(main())
    told = [each for each in caplog.messages if "clock" in each]
    assert [f"this machine's clock is {said} the database's" in each for each in told] == ([True] if said else [])
