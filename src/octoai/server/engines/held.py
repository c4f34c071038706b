"""Files that are held open, to be there as long as somebody may want to read them again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class HeldFiles:
    """What an engine may have to load again, held open: it is there until then, also when a newer profile takes its
    place in the cache, or somebody deletes it."""

    def __init__(self) -> None:
        self._held: dict[Path, BinaryIO] = {}

    def hold(self, *paths: Path | None) -> None:
        """These, and no others any more."""
        before = self._held
        self._held = {}
        for path in filter(None, paths):
            with suppress(OSError):
                self._held[path] = before.pop(path) if path in before else path.open("rb")
        for file in before.values():
            file.close()

    def path(self, path: Path) -> Path:
        """Where it can be read."""
        if path in self._held and not path.exists():
            return Path(f"/proc/{os.getpid()}/fd/{self._held[path].fileno()}")
        return path
