"""What a search found, kept for the next start: a profile, and beside it the file of weights that it needs. Kernels
that were compiled for this CPU are no model's own, and lie apart.

A profile holds for one model (by the hash of its files), one CPU and one version of the engine; for any other it is not
found. The directory of profiles lies in the cache: deleting it costs a search, nothing else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from octoai.optimizer.outcome import Goal
from octoai.optimizer.space import Candidate
from octoai.server.engines.llama.prefixes import parts
from octoai.server.machine.cores import num_cores
from octoai.server.machine.places import create

_FILENAME = "profile.json"
OTHERS_CODE = "is not loaded, since others can write it or its directory: remove that one"
_AGAIN = "the defaults are used; make it again with `octoai optimize`"


class BadProfile(Exception):
    """A profile that cannot be used; the text is one line that says why and what to do next."""


class DamagedProfile(BadProfile):
    """One that never can be, whatever is done."""


@dataclass(frozen=True, slots=True)
class Profile:
    """`weights_file` is beside it, None where the file as given is the best; `kernels_file` is among the kernels of
    this CPU and engine, None where those of the wheel are the best. `ratios` are the rates of the prompt, one stream
    and several requests, each as a multiple of the engine's own defaults; None where none were compared."""

    model_sha256: str
    cpu: str
    engine: str
    candidate: Candidate
    goal: Goal
    max_loss: float
    made: str
    kl_nats: float | None = None
    same_top: float | None = None
    ratios: tuple[float, float, float] | None = None
    weights_file: str | None = None
    weights_bytes: int | None = None
    weights_sha256: str | None = None
    kernels_file: str | None = None
    kernels_sha256: str | None = None
    memory_bytes: int = 0
    """The most that the engine took while it was measured."""

    def __str__(self) -> str:
        gain = f", {self.ratios[2]:.1f} x the engine's defaults" if self.ratios else ""
        return f"{self.candidate}{gain}"


_PROFILE = TypeAdapter(Profile)


def _damaged(source: Path) -> DamagedProfile:
    return DamagedProfile(f"the profile of {source.name} is damaged; {_AGAIN}")


class Profiles:
    """Those in a cache directory. `cpu` and `engine` are by default this machine's."""

    def __init__(self, cache_dir: Path, *, cpu: str | None = None, engine: str | None = None) -> None:
        self._cache_dir = cache_dir
        self._directory = cache_dir / "profiles"
        self.cpu = cpu or this_cpu()
        self.engine = engine or version("xllamacpp")

    def find(self, source: Path, model_sha256: str | None = None) -> tuple[Profile, Path] | None:
        """The profile for that file of weights, whose hash may be known, and the file to serve in its place. Raises
        BadProfile."""
        try:
            size = source.stat().st_size
            # The model is hashed only where a profile may be for it.
            if not any(self._directory.glob(f"{size}-*-{self._machine}")):
                return None
            place = self._directory / self._name(size, model_sha256 or sha256_of_model(source))
            if not place.is_dir():
                return None
            profile = _PROFILE.validate_json((place / _FILENAME).read_bytes())
            if not profile.candidate.can_be_chosen(num_cores()):
                raise _damaged(source)
            candidate = profile.candidate.tuned(kernels=self._kernels(profile))
            return replace(profile, candidate=candidate), _weights(profile, place) or source
        except ValidationError:
            raise _damaged(source) from None
        except OSError as error:
            raise BadProfile(f"cannot read the profile of {source.name}: {error.strerror or error}; {_AGAIN}") from None

    def kernels_path(self, recipe: str) -> Path:
        """Where the kernels of this CPU and engine that were made so are, or will be."""
        return self._kernels_directory / f"{self._machine}-{recipe}.so"

    def place(self, source: Path, model_sha256: str) -> Path:
        """Where the profile of that model is, or will be."""
        return self._directory / self._name(source.stat().st_size, model_sha256)

    def is_searched_in_vain(self, source: Path, recipe: str) -> bool:
        """Whether a search has found nothing for that file, with kernels made so. Raises OSError."""
        return self._note(source, sha256_of_model(source), recipe).exists()

    def note_in_vain(self, source: Path, model_sha256: str, recipe: str) -> None:
        """A search to its end has found nothing: a service need not have another made at each of its starts."""
        note = self._note(source, model_sha256, recipe)
        create(note.parent)
        note.touch()

    def _note(self, source: Path, model_sha256: str, recipe: str) -> Path:
        return self._cache_dir / "searched" / f"{self._name(source.stat().st_size, model_sha256)}-{recipe}"

    def store(self, source: Path, profile: Profile, weights: Path | None) -> Path:
        """Keep it in place of an older one. `weights`, if any, is moved here. Returns the directory of the profile."""
        place = self.place(source, profile.model_sha256)
        create(self._directory)
        create(place)
        if weights is not None:
            assert profile.weights_file is not None
            with weights.open("rb") as file:
                os.fsync(file.fileno())
            weights.replace(place / profile.weights_file)
        part = place / f".{_FILENAME}.{os.getpid()}"
        # A cache may be moved: where it is, is said by who asks.
        kept = replace(profile, candidate=profile.candidate.tuned(kernels=None))
        with part.open("wb") as file:
            file.write(_PROFILE.dump_json(kept, indent=1))
            file.flush()
            os.fsync(file.fileno())  # or it may be there after a power cut, and empty
        part.replace(place / _FILENAME)
        self._remove_replaced(place, {_FILENAME, profile.weights_file})
        return place

    def _remove_replaced(self, place: Path, kept: set[str | None]) -> None:
        """Weights of an older profile, profiles for older engines, and their kernels."""
        for path in place.iterdir():
            if path.name not in kept:
                with suppress(OSError):  # only room is lost
                    path.unlink()
        with suppress(OSError):
            for other in self._directory.glob(place.name.rpartition("-")[0] + "-*"):
                if other != place:
                    shutil.rmtree(other)
            for other in self._kernels_directory.glob(self._machine.partition("-")[0] + "-*.so"):
                if not other.name.startswith(f"{self._machine}-"):
                    other.unlink()

    def _kernels(self, profile: Profile) -> Path | None:
        """The file, checked. None where the wheel's are used."""
        if profile.kernels_file is None:
            return None
        path = self._kernels_directory / Path(profile.kernels_file).name
        if path.is_file() and not is_ours_alone(path):
            raise BadProfile(f"{path} {OTHERS_CODE}; {_AGAIN}")
        if not path.is_file() or sha256(path) != profile.kernels_sha256:
            raise DamagedProfile(f"the kernels in {path} are not the ones the profile was made with; {_AGAIN}")
        return path

    @property
    def _kernels_directory(self) -> Path:
        return self._cache_dir / "kernels"

    @property
    def _machine(self) -> str:
        return f"{hashlib.sha256(self.cpu.encode()).hexdigest()[:8]}-{self.engine}"

    def _name(self, size: int, model_sha256: str) -> str:
        return f"{size}-{model_sha256[:16]}-{self._machine}"


def sha256(*paths: Path) -> str:
    """Of what is in them, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def sha256_of_model(source: Path) -> str:
    """Of all files that the model is in."""
    return sha256(*parts(source))


def is_ours_alone(path: Path) -> bool:
    """Whether nobody but us, and root, can write the file or put another in its place: a library is code of ours. Who
    can put another directory in the place of the file's is met where it is loaded: there it is looked at as well."""
    return all(
        status.st_uid in {os.geteuid(), 0} and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        for status in (path.stat(), path.parent.stat())
    )


def this_cpu() -> str:
    """What decides which kernels are fast: the processor, what it can do, and how many cores we may use."""
    name, flags = platform.processor() or platform.machine(), ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        said = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
        said = {key.strip(): value.strip() for key, value in said.items()}
        name = said.get("model name", name)
        flags = hashlib.sha256(said.get("flags", said.get("Features", "")).encode()).hexdigest()[:8]
    return " ".join(filter(None, [name, f"{num_cores()} cores", flags]))


def _weights(profile: Profile, place: Path) -> Path | None:
    """The file, checked. None where the model's own is served."""
    if profile.weights_file is None:
        return None
    path = place / Path(profile.weights_file).name
    if not path.is_file() or path.stat().st_size != profile.weights_bytes or sha256(path) != profile.weights_sha256:
        raise DamagedProfile(f"the weights of the profile in {place} are not the ones it was made with; {_AGAIN}")
    return path
