"""Files that are held open, to be there as long as somebody may want to read them again."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from octoai.server.engines.llama.prefixes import parts

log = logging.getLogger("octoai.engine")


class _Held(NamedTuple):
    file: BinaryIO
    written: tuple[int, int]
    """What tells that somebody wrote to it: its size and its time."""


class HeldFiles:
    """What an engine may have to load again, held open: it is there until then, and is what it was when its start was
    checked, also when a newer profile takes its place in the cache, or somebody deletes or replaces it. Who overwrites
    it changes it all the same: that is said."""

    def __init__(self) -> None:
        self._held: dict[Path, list[_Held]] = {}  # all files of a model, by the first

    def hold(self, *paths: Path | None) -> None:
        """These, and no others any more."""
        before = self._held
        self._held = {}
        for path in filter(None, paths):
            with suppress(OSError):
                self._held[path] = before.pop(path) if path in before else [_held(part) for part in parts(path)]
        for files in before.values():
            for each in files:
                each.file.close()

    @contextmanager
    def instead(self, *paths: Path | None) -> Iterator[None]:
        """These as well, and then no others any more; those from before where what is done meanwhile fails."""
        before = list(self._held)
        self.hold(*{*before, *paths})
        try:
            yield
        except BaseException:
            self.hold(*before)
            raise
        self.hold(*paths)

    def is_there(self, path: Path) -> bool:
        """Whether what is held is still what is in that place, as it was."""
        files = self._held.get(path, [])
        return bool(files) and all(_is_in_place(file) and _written(file) == written for file, written in files)

    def path(self, path: Path, directory: Path) -> Path:
        """Where it can be read: by links in that directory, if it is not in its place any more."""
        files = self._held.get(path, [])
        if any(_written(each.file) != each.written for each in files):
            log.warning(
                "%s was overwritten since it was loaded: it is used as it is now, unchecked until the next start", path
            )
        if all(_is_in_place(each.file) for each in files):
            return path
        log.warning(
            "%s is not what it was when it was loaded, or gone: it is used as it was until the next start", path
        )
        for file, _ in files:  # by their names, as llama.cpp finds those of one model
            (directory / Path(file.name).name).symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        return directory / path.name


def _held(path: Path) -> _Held:
    file = path.open("rb")
    return _Held(file, _written(file))


def _written(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _is_in_place(file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
    except OSError:
        return False
