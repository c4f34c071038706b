"""SQLite in the data directory: write-ahead log, so that readers are never blocked by the writer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from octoai.server.store.database import Conflict, Parameters, Row, StoreAway, StoreError, StoreFull, Undone
from octoai.server.store.schema import MIGRATIONS, statements

FILENAME = "octoai.db"
BUSY_SECONDS = 10.0
TURN_SECONDS = 0.001  # between attempts to write while another does
NUM_BACKUPS = 5
_BACKUP = re.compile(r"octoai-schema(\d+)-(\w+)\.backup\.db")


class SqliteConnection:
    portion = 32  # about a millisecond: the work is done here, on a core that others may be waiting for

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._told():
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # Only where it is new: closing any descriptor of a file drops the locks that this process holds on it
                # by others, and SQLite would not know.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except (OSError, ValueError) as error:  # the latter for a name with a character that none may have
                raise StoreError(f"cannot use the database {str(path)!r}: {error}") from error
            _make_private(path)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._write_ahead()
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute("PRAGMA foreign_keys = ON")
            except BaseException:
                self._connection.close()
                raise

    def row(self, sql: str, parameters: Parameters = ()) -> Row | None:
        with self._told():
            found: Row | None = self._connection.execute(sql, parameters).fetchone()
            return found

    def rows(self, sql: str, parameters: Parameters = ()) -> list[Row]:
        with self._told():
            return self._connection.execute(sql, parameters).fetchall()

    def stream(self, sql: str, parameters: Parameters = ()) -> Iterator[Row]:
        with self._told():
            yield from self._connection.execute(sql, parameters)

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        with self._told():
            return self._connection.execute(sql, parameters).rowcount

    def execute_many(self, sql: str, rows: Iterable[Parameters]) -> None:
        with self._told():
            self._connection.executemany(sql, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._take_turn()
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(StoreError):
                if self._connection.in_transaction:  # some errors (a full disk) roll back by themselves
                    self.execute("ROLLBACK")
            raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        if self._connection.in_transaction:  # one whose end was interrupted
            self.execute("ROLLBACK")
        self.execute("BEGIN")
        try:
            yield
        finally:
            for _ in range(2):  # the first may be interrupted, and what is read next would still be of this moment
                with contextlib.suppress(StoreError):
                    if self._connection.in_transaction:
                        self.execute("ROLLBACK")

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        self.execute("SAVEPOINT inner_step")
        try:
            yield
        except BaseException as error:
            if not self._connection.in_transaction:  # a full disk: whoever went on would commit each statement alone
                raise Undone(f"the database {self.path} has undone the whole transaction: {error}") from error
            with contextlib.suppress(StoreError):
                self.execute("ROLLBACK TO inner_step")
                self.execute("RELEASE inner_step")
            raise
        self.execute("RELEASE inner_step")

    def _take_turn(self) -> None:
        """Begin to write, when nobody else does. SQLite itself waits longer each time: among several that write often,
        as the workers of one service do, some would wait for a second where others wait for none."""
        end = time.monotonic() + BUSY_SECONDS
        self.execute("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    self.execute("BEGIN IMMEDIATE")
                    return
                except StoreAway:
                    if time.monotonic() > end:
                        raise
                    time.sleep(TURN_SECONDS)
        finally:
            self.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")

    def set_durable(self, is_durable: bool) -> None:
        self.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")

    def interrupt(self) -> None:
        self._connection.interrupt()

    def close(self) -> None:
        self._connection.close()

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction; what has something in it is backed up first."""
        if self._version() == len(MIGRATIONS):
            return
        with self.transaction():
            version = self._version()  # looked at again under the write lock: another process may have been first
            if 0 < version < len(MIGRATIONS):
                self._back_up(version)
            for migration in MIGRATIONS[version:]:
                for statement in statements(migration, "sqlite"):
                    self.execute(statement)
            self.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _version(self) -> int:
        """How many migrations were done. Raises StoreError where there are more than we know."""
        (version,) = self.row("PRAGMA user_version") or (0,)
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{self.path} was written by a newer version of octoai (schema {version}, and this one knows "
                f"{len(MIGRATIONS)}): use that version, or put a backup from before in its place{self._last_backup()}"
            )
        return int(version)

    def _last_backup(self) -> str:
        """The newest beside it that we could use, as a refusal says it."""
        usable = [
            (found[2], found[0])
            for path in self.path.parent.iterdir()
            if (found := _BACKUP.fullmatch(path.name)) and int(found[1]) <= len(MIGRATIONS)
        ]
        return f": {max(usable)[1]} is one, without what came later" if usable else ""

    def _back_up(self, version: int) -> None:
        """Under the write lock, so that nobody migrates meanwhile. It is called a backup once it is whole."""
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = self.path.with_name(f"{self.path.stem}-schema{version}-{moment}.backup.db")
        partial = self.path.with_name(f"{self.path.stem}.backup.partial")
        with self._told():
            _remove(partial)  # of a process that was killed
            self._check_room()
            try:
                self._copy(partial)
                partial.rename(target)
            except BaseException:
                _remove(partial)
                raise
        backups = self.path.parent.glob(f"{self.path.stem}-schema*.backup.db")
        for old in sorted(backups, key=lambda each: each.name.rpartition("-")[2])[:-NUM_BACKUPS]:  # by their moments
            old.unlink(missing_ok=True)

    def _check_room(self) -> None:
        """For a backup. Raises StoreFull."""
        (num_pages,), (page_bytes,) = self.rows("PRAGMA page_count") + self.rows("PRAGMA page_size")
        num_bytes, free_bytes = num_pages * page_bytes, shutil.disk_usage(self.path.parent).free
        if free_bytes < num_bytes:
            raise StoreFull(
                f"the database {self.path} is of an older version and is backed up before it is changed: that takes "
                f"{num_bytes / 1e6:.1f} MB beside it, and {free_bytes / 1e6:.1f} MB are free"
            )

    def _copy(self, target: Path) -> None:
        """Read by a connection that is not the one writing."""
        os.close(os.open(target, os.O_CREAT | os.O_RDWR, 0o600))
        with (
            contextlib.closing(sqlite3.connect(self.path)) as reader,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            reader.backup(copy)

    def _write_ahead(self) -> None:
        """Where two processes make a new database at once, one finds it locked here: SQLite itself does not wait."""
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors in our words."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise Conflict(str(error)) from error
        except (sqlite3.Error, OSError) as error:
            text = f"cannot use the database {self.path}: {error}"
            if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreAway(text) from error
            if _code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
                raise StoreFull(text) from error
            if _code(error) == sqlite3.SQLITE_CORRUPT:
                text += f"; a backup is put back without the {self.path.name}-wal and -shm of what was there before"
            raise StoreError(text) from error


def _make_private(path: Path) -> None:
    """A backup that was put in place may be for all to read, as `sqlite3` makes it. Another user's file is let be."""
    for suffix in ("", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        with contextlib.suppress(OSError):
            found = file.stat()
            if found.st_uid == os.geteuid() and found.st_mode & 0o077:
                file.chmod(found.st_mode & 0o700)


def _remove(partial: Path) -> None:
    """Of a backup that is not whole, and what SQLite has beside it."""
    for suffix in ("", "-journal"):
        partial.with_name(partial.name + suffix).unlink(missing_ok=True)


def _code(error: Exception) -> int:
    """The primary result code: the extended ones have more above the low byte."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
