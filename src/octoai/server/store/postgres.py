"""PostgreSQL, which several machines may share. It knows nothing of our tables but how they are migrated.

A connection that was lost (the server was restarted, the network was away) is made again by the next use outside a
transaction, at once and without waiting; what was under way fails with StoreAway. Nothing is ever sent twice.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import StrDumper

from octoai.server.store.database import Conflict, Parameters, Row, StoreAway, StoreError, StoreFull
from octoai.server.store.schema import MIGRATIONS, statements

HOW = "database must be postgresql://user@host/name"
_WRITER_LOCK = 0x6F63746F6169  # "octoai": whoever writes holds it
STREAM_ROWS = 1000
# A writer that is frozen (a paused container, a machine that was lost) keeps its lock for as long as the server waits
# for its next statement; none of ours needs so long for that. Others wait for the lock for longer than that, not
# without end.
IDLE_SECONDS = 5
LOCK_SECONDS = 10
CANCEL_SECONDS = 3.0

# What the URL does not say itself. A host that vanished is noticed in about 10 s: 5 + 2 x 2 s without an answer to
# keepalives, or 10 s (in milliseconds here) without one to what was sent.
_DEFAULTS: dict[str, str | int] = {
    "application_name": "octoai",
    "connect_timeout": 3,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": 10_000,
    "target_session_attrs": "read-write",  # of several hosts, the one that is not a standby
}


_AWAY = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.IdleInTransactionSessionTimeout,
)


class PostgresConnection:
    portion = 512  # the work is the server's; what takes time here is to ask it

    def __init__(self, url: str) -> None:
        """Connects at once. Raises StoreError; no error's text has the URL's password in it."""
        self._parameters = _connection_parameters(url)
        self._names = itertools.count()
        self._in_transaction = False
        self._closed = False
        self._connection = self._connect()

    def row(self, sql: str, parameters: Parameters = ()) -> Row | None:
        with _told():
            return self._ready().execute(_translated(sql), parameters).fetchone()

    def rows(self, sql: str, parameters: Parameters = ()) -> list[Row]:
        with _told():
            return self._ready().execute(_translated(sql), parameters).fetchall()

    def stream(self, sql: str, parameters: Parameters = ()) -> Iterator[Row]:
        with _told(), self._ready().cursor(f"stream_{next(self._names)}") as cursor:
            cursor.itersize = STREAM_ROWS
            yield from cursor.execute(_translated(sql), parameters)

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        with _told():
            return self._ready().execute(_translated(sql), parameters).rowcount

    def execute_many(self, sql: str, rows: Iterable[Parameters]) -> None:
        with _told(), self._ready().cursor() as cursor:
            cursor.executemany(_translated(sql), rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        # One writer at a time, as on SQLite: no two can wait for each other, and what is read stays so to the end. Each
        # sees what the one before has written, whatever the database's own default is. SET LOCAL, since a pooler may
        # give the next transaction to somebody else.
        with self._begun(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; "
            f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'; "
            f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'; "
            f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})"
        ):
            yield
            self._commit()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        with self._begun("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"):
            yield

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        self.execute("SAVEPOINT inner_step")
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreError):
                self.execute("ROLLBACK TO inner_step")
                self.execute("RELEASE inner_step")
            raise
        self.execute("RELEASE inner_step")

    def set_durable(self, is_durable: bool) -> None:
        """Always durable here: other machines decide by what they read, so it must not be gone after a crash."""

    def interrupt(self) -> None:
        """The connection goes with it: the server may hear of this only when it is asked something else."""
        connection = self._connection
        with contextlib.suppress(psycopg.Error, OSError):
            connection.cancel_safe(timeout=CANCEL_SECONDS)
        _shut_down(connection)

    def close(self) -> None:
        """Also from another thread, whose call under way then fails with StoreAway, even where the server hangs."""
        self._closed = True
        connection = self._connection
        _shut_down(connection)
        with connection.lock:  # held by a call under way; it ends at once, its socket being shut down
            connection.close()

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction: all of it, or nothing. One process at a time does it."""
        has_version = self.row("SELECT to_regclass('schema_version') IS NOT NULL") == (True,)
        if has_version and self._version() == len(MIGRATIONS):
            return  # the usual case needs no lock, and no right to make tables
        with self.transaction():
            # Not asked again whether it is there: the answer may be remembered from before.
            self.execute("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")
            for migration in MIGRATIONS[self._version() :]:
                for statement in statements(migration, "postgres"):
                    self.execute(statement)
            self.execute("DELETE FROM schema_version")
            self.execute("INSERT INTO schema_version VALUES (?)", (len(MIGRATIONS),))

    def _version(self) -> int:
        """How many migrations were done. Raises StoreError where there are more than we know."""
        (version,) = self.row("SELECT version FROM schema_version") or (0,)
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the database was written by a newer version of octoai (schema {version}, and this one knows "
                f"{len(MIGRATIONS)}): use that version, or a backup from before"
            )
        return int(version)

    @contextmanager
    def _begun(self, begin: str) -> Iterator[None]:
        """A transaction that is rolled back, where nothing inside has ended it."""
        if self._in_transaction:
            raise StoreError("cannot begin a transaction within a transaction")
        try:
            self.execute(begin)
            self._in_transaction = True
            yield
        finally:
            self._in_transaction = False
            self._roll_back()

    def _commit(self) -> None:
        with _told():
            ended = self._ready().execute(b"COMMIT").statusmessage
        if ended != "COMMIT":  # what PostgreSQL says, without an error, where a statement before had failed
            raise StoreError("nothing was written: a statement of the transaction had failed")

    def _roll_back(self) -> None:
        connection = self._connection
        if connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            with contextlib.suppress(psycopg.Error):
                connection.execute(b"ROLLBACK")
        if connection.info.transaction_status != TransactionStatus.IDLE:
            connection.close()  # the next use must not find itself in this transaction

    def _ready(self) -> psycopg.Connection[Row]:
        """The connection, made again where it was lost and no transaction was lost with it."""
        if self._closed:
            raise StoreError("the database connection is closed")
        if not self._in_transaction and (self._connection.closed or _hung_up(self._connection)):
            self._connection.close()
            self._connection = self._connect()
            if self._closed:  # by another thread, meanwhile
                self._connection.close()
        return self._connection

    def _connect(self) -> psycopg.Connection[Row]:
        with _told():
            connection = psycopg.connect(**self._parameters, autocommit=True)  # type: ignore[arg-type]
        # Never prepared: a pooler (pgbouncer, in transaction mode) may give each transaction another server process.
        connection.prepare_threshold = None
        # One type each, the one all our columns have, so that SQL means the same as on SQLite.
        connection.adapters.register_dumper(int, Int8Dumper)
        connection.adapters.register_dumper(bool, Int8Dumper)
        connection.adapters.register_dumper(str, StrDumper)
        connection.adapters.register_loader("numeric", _Number)
        return connection


class _Number(Loader):
    """What PostgreSQL makes of the sum of integers, as an integer; of their average, as a float."""

    def load(self, data: Buffer) -> int | float:
        text = bytes(data)
        return int(text) if text.lstrip(b"-").isdigit() else float(text)


def _connection_parameters(url: str) -> dict[str, str | int]:
    """Of the URL, with our defaults. Parts of a password may be anywhere where it is not as it should be."""
    if not url.startswith(("postgresql://", "postgres://")):
        raise StoreError(HOW)
    try:
        given = conninfo_to_dict(url)
    except psycopg.Error:
        raise StoreError(HOW) from None
    port = str(given.get("port") or "")
    if "@" in f"{given.get('host')}{given.get('dbname')}" or not re.fullmatch(r"[0-9,]*", port):
        raise StoreError(f"{HOW}; what is special in its password (@, /, :, %) must be percent-encoded")
    return {**_DEFAULTS, **given, "client_encoding": "utf8"}  # type: ignore[dict-item]


@lru_cache(maxsize=1000)
def _translated(sql: str) -> bytes:
    """`?` as psycopg's `%s`, except between quotes."""
    pieces = sql.replace("%", "%%").split("'")
    pieces[::2] = [piece.replace("?", "%s") for piece in pieces[::2]]
    return "'".join(pieces).encode()


def _hung_up(connection: psycopg.Connection[Row]) -> bool:
    """Whether the server has closed the connection since its last use. Costs microseconds, and sends nothing."""
    poll = select.poll()
    try:
        poll.register(connection.pgconn.socket, select.POLLIN)
        while poll.poll(0):
            connection.pgconn.consume_input()  # a notice, or its last words; an error where there is nothing more
    except psycopg.Error:
        return True
    return False


def _shut_down(connection: psycopg.Connection[Row]) -> None:
    """End both directions, so that whoever waits for the server wakes. The descriptor stays the connection's."""
    with contextlib.suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.pgconn.socket)) as copy:
        copy.shutdown(socket.SHUT_RDWR)


@contextmanager
def _told() -> Iterator[None]:
    """psycopg's errors in our words, on one line."""
    try:
        yield
    except psycopg.IntegrityError as error:
        raise Conflict(_line(error)) from error
    except psycopg.errors.DiskFull as error:
        raise StoreFull(f"the database has no room: {_line(error)}") from error
    except psycopg.errors.LockNotAvailable as error:
        raise StoreAway(
            f"the database is away: another session has kept it locked for {LOCK_SECONDS} s; pg_locks says which, "
            "pg_terminate_backend(pid) ends it"
        ) from error
    except _AWAY as error:
        raise StoreAway(f"the database is away: {_line(error)}") from error
    except psycopg.Error as error:
        raise StoreError(f"cannot use the database: {_line(error)}") from error


def _line(error: psycopg.Error) -> str:
    """Without DETAIL, which may hold values of the row."""
    return " ".join((error.diag.message_primary or str(error)).split())
