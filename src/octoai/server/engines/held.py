"""Files that are held open, to be there as long as somebody may want to read them again."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from octoai.server.engines.prefixes import parts

log = logging.getLogger("octoai.engine")


class HeldFiles:
    """What an engine may have to load again, held open: it is there until then, and is what it was when its start was
    checked, also when a newer profile takes its place in the cache, or somebody deletes or replaces it."""

    def __init__(self) -> None:
        self._held: dict[Path, list[BinaryIO]] = {}  # all files of a model, by the first

    def hold(self, *paths: Path | None) -> None:
        """These, and no others any more."""
        before = self._held
        self._held = {}
        for path in filter(None, paths):
            with suppress(OSError):
                self._held[path] = before.pop(path) if path in before else [part.open("rb") for part in parts(path)]
        for files in before.values():
            for file in files:
                file.close()

    def path(self, path: Path, directory: Path) -> Path:
        """Where it can be read: by links in that directory, if it is not in its place any more."""
        files = self._held.get(path, [])
        if all(map(_is_in_place, files)):
            return path
        log.warning(
            "%s is not what it was when it was loaded, or gone: it is used as it was until the next start", path
        )
        for file in files:  # by their names, as llama.cpp finds those of one model
            (directory / Path(file.name).name).symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        return directory / path.name


def _is_in_place(file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
    except OSError:
        return False
