"""Beginnings of prompts that an engine has read and saved, as files: bounded, least recently used first to go.

A file's name has a fingerprint of the engine (weights, version, what shapes its cache), the number of tokens and
their hash, so that one outlives a restart and is never taken for another model's. One directory serves every model;
other processes may use it as well. The engine writes and reads the files; what is in them is not known here. What is
safe on the disk is read-only: of others, a power cut leaves a file of the right length with nothing in it, and nobody
who starts takes them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from octoai.server.engines.llama.slots import TOKEN_BYTES
from octoai.server.machine import places

log = logging.getLogger("octoai.engine")

SUFFIX, UNFINISHED = ".bin", ".part"
UNFINISHED_SECONDS = 3600.0  # after which nobody is writing it any more
RETRY_SECONDS = 60.0
_SAFE = 0o400  # the mode of a file
_PIECE_BYTES = 1024 * 1024
_FIRST_OF_SEVERAL = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")


def parts(weights: Path) -> list[Path]:
    """The files that a model is in, of which the first is given: by their names, as llama.cpp finds them."""
    named = _FIRST_OF_SEVERAL.fullmatch(weights.name)
    if named is None:
        return [weights]
    names = (f"{named[1]}-{each:05d}-of-{named[2]}.gguf" for each in range(2, int(named[2]) + 1))
    return [weights, *filter(Path.is_file, map(weights.with_name, names))]


def fingerprint(weights: Path, shape: str) -> str:
    """Of these weights in an engine of this `shape`. Not of all of a large file: its size, its time, both its ends; of
    further ones that belong to it, sizes and times."""
    status, *others = [part.stat() for part in parts(weights)]
    with weights.open("rb") as file:
        head = file.read(_PIECE_BYTES)
        file.seek(max(0, status.st_size - _PIECE_BYTES))
        ends = hashlib.sha256(head + file.read(_PIECE_BYTES)).hexdigest()
    further = "".join(f" {other.st_size} {other.st_mtime_ns}" for other in others)
    named = f"{status.st_size} {status.st_mtime_ns} {ends} {shape}{further}"
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None where another process has made room meanwhile."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return None


def _is_safe(entry: os.DirEntry[str]) -> bool:
    status = _status(entry)
    return status is not None and stat.S_IMODE(status.st_mode) == _SAFE


class Prefixes:
    """`max_bytes` bounds all files of the directory together; 0 keeps nothing."""

    def __init__(self, directory: Path, owner: str, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._owner = owner
        self._lengths: dict[str, int] = {}  # tokens in each of ours, by name
        self._token_bytes = 0.0  # of a file, for each token in it
        self._resting_until = 0.0

    @property
    def is_usable(self) -> bool:
        """False where nothing is kept, and for a while after the disk failed us."""
        return self.max_bytes > 0 and time.monotonic() >= self._resting_until

    def open(self) -> None:
        """Make the directory, find what is in it. What cannot be used is said once and done without."""
        if not self.max_bytes:
            return
        try:
            places.create(self.directory)
            for entry in list(os.scandir(self.directory)):
                self._open(entry)
        except OSError as error:
            self.failed(error.strerror or str(error))

    def _open(self, entry: os.DirEntry[str]) -> None:
        parts = entry.name.removesuffix(SUFFIX).split("-")
        if entry.name.endswith(UNFINISHED):
            status = _status(entry)
            if status is not None and time.time() - status.st_mtime > UNFINISHED_SECONDS:
                Path(entry.path).unlink(missing_ok=True)
        elif (
            entry.name.endswith(SUFFIX)
            and _is_safe(entry)
            and len(parts) == 3
            and parts[0] == self._owner
            and parts[1].isdecimal()
        ):
            self._lengths[entry.name] = int(parts[1])

    def longest(self, prompt: bytes) -> tuple[int, str | None]:
        """The most tokens that a kept file has of this prompt's beginning, and its name."""
        if not self.is_usable:
            return 0, None
        for length in sorted(set(self._lengths.values()), reverse=True):
            name = self.name(prompt[: length * TOKEN_BYTES])
            if length * TOKEN_BYTES <= len(prompt) and name in self._lengths:
                return length, name
        return 0, None

    def has(self, prefix: bytes) -> bool:
        return self.name(prefix) in self._lengths

    def name(self, prefix: bytes) -> str:
        digest = hashlib.sha256(prefix).hexdigest()[:32]
        return f"{self._owner}-{len(prefix) // TOKEN_BYTES}-{digest}{SUFFIX}"

    def has_room(self, prefix: bytes) -> bool:
        """Whether it would fit at all, judged by those before."""
        return self.is_usable and self._token_bytes * len(prefix) / TOKEN_BYTES <= self.max_bytes

    def unfinished(self) -> str:
        """A name to write a file under until it is whole."""
        return f"{secrets.token_hex(8)}{UNFINISHED}"

    def keep(self, unfinished: str, prefix: bytes) -> None:
        """It is whole. The least recently used of all others make room."""
        name = self.name(prefix)
        try:
            size = os.stat(self.directory / unfinished).st_size
            os.rename(self.directory / unfinished, self.directory / name)
            self._token_bytes = size * TOKEN_BYTES / len(prefix)
            self._lengths[name] = len(prefix) // TOKEN_BYTES
            self._make_room()
        except OSError as error:
            self.failed(error.strerror or str(error))

    def make_safe(self, prefix: bytes) -> None:
        """One that is kept. Takes as long as the disk does."""
        with suppress(OSError):  # another process has made room: there is nothing to be said
            file = os.open(self.directory / self.name(prefix), os.O_RDONLY)
            try:
                os.fsync(file)
                os.fchmod(file, _SAFE)
            finally:
                os.close(file)

    def _make_room(self) -> None:
        names = [entry for entry in os.scandir(self.directory) if entry.name.endswith(SUFFIX)]
        files = [(status, entry.name) for entry in names if (status := _status(entry)) is not None]
        total = sum(status.st_size for status, _ in files)
        for status, name in sorted(files, key=lambda file: (file[0].st_mtime_ns, file[0].st_size)):
            if total <= self.max_bytes:
                return
            self.drop(name)
            total -= status.st_size

    def use(self, name: str) -> None:
        """Its turn to go is the last again. Raises OSError where another process has made room."""
        os.utime(self.directory / name)

    def drop(self, name: str) -> None:
        self._lengths.pop(name, None)
        self._remove(name)

    def failed(self, reason: str, unfinished: str | None = None) -> None:
        """Nothing is saved or restored for a while: prompts are read as if there were no files."""
        self._resting_until = time.monotonic() + RETRY_SECONDS
        log.warning("prompts are not saved in %s for %.0f s: %s", self.directory, RETRY_SECONDS, reason)
        if unfinished is not None:
            self._remove(unfinished)

    def _remove(self, name: str) -> None:
        try:
            (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed: %s", self.directory / name, error.strerror)
