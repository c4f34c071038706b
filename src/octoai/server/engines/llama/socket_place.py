"""Where the socket of a child is: a directory that only we can enter, and hold as long as we live.

Who is killed together with the child, as by a container's end, leaves it behind; who makes the next one removes those
that nobody holds any more. Nothing but the socket and links is taken out of one, and only where it is ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX, SOCKET = "octoai-sock-", "e.sock"  # short: so is what a path of a socket may be
MAX_BYTES = 107  # of a socket's path, on Linux
YOUNG_SECONDS = 60.0  # who has just made one may not hold it yet


class SocketPlace:
    """Raises OSError where none can be made."""

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with suppress(OSError):  # held, or somebody else was faster
                _remove_left(left)
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))  # 0700
        try:
            if len(os.fsencode(self.socket)) > MAX_BYTES:
                raise OSError(errno.ENAMETOOLONG, f"no socket can be in {tempfile.gettempdir()}: set a shorter TMPDIR")
            self._held: int | None = os.open(self.directory, os.O_RDONLY)
        except OSError:
            os.rmdir(self.directory)
            raise
        with suppress(OSError):  # a file system without locks: there nobody else can hold it either, and it is left
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def socket(self) -> str:
        return str(self.directory / SOCKET)

    @property
    def is_there(self) -> bool:
        """Whether who asks can still find the socket."""
        return os.path.exists(self.socket)

    def remove(self) -> None:
        """The child may have done so already, and so may we."""
        shutil.rmtree(self.directory, ignore_errors=True)
        held, self._held = self._held, None
        if held is not None:
            os.close(held)


def _remove_left(directory: Path) -> None:
    """Raises OSError where it is held, or is no directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or time.time() - status.st_mtime < YOUNG_SECONDS:
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(fd):
            if name == SOCKET or stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=fd)
        os.rmdir(directory)
    finally:
        os.close(fd)
