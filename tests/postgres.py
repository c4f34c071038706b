"""A PostgreSQL server of the tests' own: its programs are found, everything else is in a temporary directory."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg

PASSWORD = "s3cret/p@ss:wörd%41"  # with everything that must be percent-encoded in a URL
MISSING = (
    "the programs of a PostgreSQL server (initdb, pg_ctl) are not here: run .ci/postgres, or install them "
    "(Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql), or set OCTOAI_SKIP_POSTGRES=1"
)
_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)
# No test cuts the power, and a database for each takes its time.
_CONFIG = """
listen_addresses = '127.0.0.1'
unix_socket_directories = '{directory}'
port = {port}
max_connections = 200
shared_buffers = 32MB
fsync = off
full_page_writes = off
"""


class ServerMissing(Exception):
    pass


class PostgresServer:
    """Started when made, on a port of 127.0.0.1 that stays the same; `remove` leaves nothing behind."""

    user = "octoai"

    def __init__(self) -> None:
        self._programs = programs()
        self._owner = _owner()
        self._directory = Path(tempfile.mkdtemp(prefix="octoai-postgres-"))
        self._data = self._directory / "data"
        self._numbers = itertools.count()
        self.port = _free_port()
        try:
            self._make()
            self.start()
        except BaseException:
            self.remove()
            raise

    def url(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://{self.user}:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{next(self._numbers)}_{secrets.token_hex(4)}"
        self._administrate(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Also where it is still in use."""
        self._administrate(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def copy(self, url: str) -> str:
        """The URL of another database, as this one is now. Ends the connections to it."""
        copied = f"{url.rpartition('/')[2]}_copy"
        self._end_connections(url)
        self._administrate(f"CREATE DATABASE {copied} TEMPLATE {url.rpartition('/')[2]}")
        return self.url(copied)

    def replace(self, url: str, other: str) -> None:
        """From now on `other` is found where that database was, which is gone: as in a failover."""
        self.drop_database(url)
        self._administrate(f"ALTER DATABASE {other.rpartition('/')[2]} RENAME TO {url.rpartition('/')[2]}")

    @contextlib.contextmanager
    def without(self, url: str, pid: int) -> Iterator[None]:
        """That connection is ended, and there is no room for another in its place; those of others stay."""
        name = url.rpartition("/")[2]
        self._administrate(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            self._administrate(f"SELECT pg_terminate_backend({pid}, 5000)")
            yield
        finally:
            self._administrate(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self._directory / "log"))

    def stop(self, mode: str = "fast") -> None:
        """`mode`: "smart" waits for clients, "fast" ends their connections, "immediate" is like a crash."""
        self._run("pg_ctl", "stop", "-w", "-D", str(self._data), "-m", mode)

    def pause(self) -> None:
        """Every process stops where it is: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.resume()
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self._directory)

    def _make(self) -> None:
        secret = self._directory / "password"
        secret.write_text(PASSWORD)
        if self._owner:
            os.chown(secret, self._owner.pw_uid, self._owner.pw_gid)
            os.chown(self._directory, self._owner.pw_uid, self._owner.pw_gid)
        options = ["--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        self._run("initdb", "-D", str(self._data), f"--username={self.user}", *options)
        with (self._data / "postgresql.conf").open("a") as config:
            config.write(_CONFIG.format(directory=self._directory, port=self.port))

    def _end_connections(self, url: str) -> None:
        name = url.rpartition("/")[2]
        self._administrate(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'")

    def _administrate(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _run(self, program: str, *arguments: str) -> None:
        """As a user that PostgreSQL accepts. What it says goes to a file: the server keeps it open when it stays."""
        said = self._directory / "said"
        with said.open("wb") as output:
            status = subprocess.run(
                [str(self._programs / program), *arguments],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                user=self._owner.pw_uid if self._owner else None,
                group=self._owner.pw_gid if self._owner else None,
                extra_groups=[] if self._owner else None,
                timeout=60,
                check=False,
            ).returncode
        if status != 0:
            raise subprocess.CalledProcessError(status, program, said.read_text(errors="replace"))

    def _signal(self, number: signal.Signals) -> None:
        """The postmaster first: stopped, it starts no more."""
        postmaster = int((self._data / "postmaster.pid").read_text().split("\n", 1)[0])
        os.kill(postmaster, number)
        for pid in _children(postmaster):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def programs() -> Path:
    """The directory of initdb and pg_ctl. Raises ServerMissing."""
    on_path = shutil.which("pg_ctl")
    newest_first = sorted((place for pattern in _PLACES for place in glob.glob(pattern)), reverse=True)
    for place in ([str(Path(on_path).resolve().parent)] if on_path else []) + newest_first:
        if all(os.access(f"{place}/{name}", os.X_OK) for name in ("initdb", "pg_ctl", "postgres")):
            return Path(place)
    raise ServerMissing(MISSING)


def _owner() -> pwd.struct_passwd | None:
    """Who runs the server where we are root, which PostgreSQL refuses to be run by."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if listed.exists():
        return [int(child) for child in listed.read_text().split()]
    found = subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.PIPE, text=True, check=False)
    return [int(child) for child in found.stdout.split()]
