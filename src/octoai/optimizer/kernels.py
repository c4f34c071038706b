"""llama.cpp's kernels compiled for the processor at hand, from the source of the version that is installed.

Its wheel is built for processors of ten years ago. What newer ones have beside, as AVX-512 and its dot products of
bytes, is used by code that is in llama.cpp and only has to be compiled. That takes half a minute, once for an engine
and a CPU; the result lies in the cache. Decision 0012 says why, and what it gives.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from octoai.optimizer.additions import ADDED
from octoai.server.engines.llama.kernels import FOR_KERNELS
from octoai.server.machine.places import create
from octoai.server.sources import PullFailed, sdist

SOURCE_SHA256 = {"2026.10.11549": "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"}
"""Of xllamacpp's source archives, by version."""

_MACHINES = {"x86_64": ("x86", "-march=native"), "aarch64": ("arm", "-mcpu=native")}
_DEFINED = (
    *("GGML_BACKEND_DL", "GGML_BACKEND_BUILD", "GGML_BACKEND_SHARED", "GGML_SHARED"),
    *("GGML_USE_OPENMP", "GGML_USE_LLAMAFILE", "GGML_USE_CPU_REPACK"),  # as the wheel has them
    *("_GNU_SOURCE", "NDEBUG"),
)
# Everything else stays inside: the wheel has functions of the same names.
_EXPORTED = "{ global: ggml_backend_init; calls_version; replace_calls; fast_*; shared_*; local: *; };"
_ATTENTION = ("attention", "attention_keys", "attention_vectors")
_OWN = [
    Path(__file__).with_name(f"{name}.cpp")
    for name in (*_ATTENTION, "affine", "calls", "sampling", "sharing", "tokenization")
]
_OPTIONS = ("-O3", "-fPIC", "-fopenmp", "-w", *(f"-D{name}" for name in _DEFINED))
RECIPE = hashlib.sha256(repr((_OPTIONS, ADDED, [path.read_bytes() for path in _OWN])).encode()).hexdigest()[:8]
"""Of how they are made: kernels that an earlier version of this file made are others."""
_LOADING = """
import pathlib, sys
from octoai.server.engines.llama import kernels
try:
    kernels.load(pathlib.Path(sys.argv[1]))
except kernels.CannotLoadKernels:
    sys.exit(kernels.NO_KERNELS)
"""
_OTHER_OPENMP = b"__kmpc_"  # what code of LLVM's and Intel's compilers calls
_IN_VAIN = "llama.cpp's kernels are those of its wheel"
_MORE_TIME = "give it more --seconds, of which they may take half"


class NoKernels(Exception):
    """There are none; the text is one line that says why and what to do next."""


class NoKernelsNow(NoKernels):
    """There may be some at another time, or once what is wrong has been put right."""


@dataclass(frozen=True, slots=True)
class _Compilers:
    """Commands, the directory of llama.cpp's that has the kernels of this machine's architecture, and the option that
    allows its compiler all instructions of this CPU."""

    c: list[str]
    cxx: list[str]
    architecture: str
    tuned: str


def shares_cache() -> bool:
    """Whether attention of these kernels is for slots with one cache: `attention.cpp` has it for AVX2 and more."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text("utf-8", "replace").split())
    except OSError:
        return False
    return platform.machine() == "x86_64" and {"avx2", "fma", "f16c"} <= flags


def make(
    path: Path, version: str, *, work: Path, num_threads: int, environ: Mapping[str, str], seconds: float = math.inf
) -> None:
    """Compile the kernels of that version of xllamacpp into `path`. `work` is a directory on the same file system, for
    the source and what is made of it: gone afterwards, or left to its owner by who is killed. Raises NoKernels, also
    where it takes longer than it may."""
    deadline = time.monotonic() + seconds
    if version not in SOURCE_SHA256:
        raise NoKernels(f"the checksum of the source of xllamacpp {version} is not known: {_IN_VAIN}")
    compilers = _compilers(environ)
    try:
        source = create(create(work) / "source")
        _unpack(version, source, environ, deadline)
        made = _built(source / "thirdparty" / "llama.cpp" / "ggml", work, compilers, num_threads, deadline)
        made.chmod(0o600)
        with made.open("rb") as file:  # or what is there after a power cut may be empty, and is there all the same
            os.fsync(file.fileno())
        made.replace(create(path.parent) / path.name)
    except PullFailed as error:
        raise NoKernelsNow(f"{error}; {_IN_VAIN}") from None
    except OSError as error:
        raise NoKernelsNow(f"{error.filename or path}: {error.strerror or error}; {_IN_VAIN}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(version: str, source: Path, environ: Mapping[str, str], deadline: float) -> None:
    """Raises PullFailed or OSError; NoKernelsNow when time is up. A download that goes on then, since an index sends
    little by little, is left to end with us: nobody wants its files any more."""
    failed: list[Exception] = []

    def unpack() -> None:
        try:
            sdist.unpack("xllamacpp", version, SOURCE_SHA256[version], source, environ)
        except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
            failed.append(error)

    download = threading.Thread(target=unpack, daemon=True)
    download.start()
    while download.is_alive() and time.monotonic() < deadline:
        download.join(min(1.0, max(0.0, deadline - time.monotonic())))
    if download.is_alive():
        raise NoKernelsNow(f"there was no time to download their source: {_IN_VAIN}; {_MORE_TIME}")
    if failed:
        raise failed[0]


def can_be_loaded(path: Path) -> bool:
    """In a process of its own, since kernels stay loaded, and a damaged file may crash who loads it. Raises
    NoKernelsNow where that process ended for another reason."""
    ran = subprocess.run([sys.executable, "-P", "-c", _LOADING, str(path)], capture_output=True, check=False)  # noqa: S603  # our own text
    if ran.returncode not in (0, *FOR_KERNELS):
        raise NoKernelsNow(f"{path} could not be tried (exit status {ran.returncode}): {_IN_VAIN}; optimize again")
    return ran.returncode == 0


def _compilers(environ: Mapping[str, str]) -> _Compilers:
    """GNU's: the wheel's threads are those of its OpenMP library, and there must not be two."""
    known = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or known is None:
        raise NoKernels(f"kernels are compiled on Linux only, for x86-64 and AArch64: {_IN_VAIN}")
    c, cxx = _command(environ, "CC", "gcc"), _command(environ, "CXX", "g++")
    missing = next((name for name, *_ in (cxx, c) if shutil.which(name, path=environ.get("PATH")) is None), None)
    if missing is not None:
        raise NoKernelsNow(
            f"there is no {missing}: {_IN_VAIN}; install it (Debian: g++) and optimize again to have faster ones"
        )
    return _Compilers(c, cxx, *known)


def _command(environ: Mapping[str, str], name: str, default: str) -> list[str]:
    try:
        return shlex.split(environ.get(name, "")) or [default]
    except ValueError as error:
        wrong = f"{name} is no command ({str(error).lower()})"
        raise NoKernelsNow(f"{wrong}: {_IN_VAIN}; set it to GNU's compiler") from None


def _built(ggml: Path, work: Path, compilers: _Compilers, num_threads: int, deadline: float) -> Path:
    cpu = ggml / "src" / "ggml-cpu"
    architecture = cpu / "arch" / compilers.architecture
    directories = (cpu, cpu / "amx", cpu / "tiled", architecture)
    # In the same order each time: profiles name what is made of it by its checksum.
    found = (path for directory in directories for path in sorted(directory.glob("*.c*")))
    sources = [path for path in found if path.stem != "cpu-feats"]
    sources.append(cpu / "llamafile" / "sgemm.cpp")
    for path in _OWN:
        shutil.copy(path, cpu)
    for name, text, addition in ADDED:
        _add(cpu / name, text, addition)
    included = (ggml / "include", ggml.parent / "include", ggml / "src", cpu)
    # Nor does it say where it was made.
    common = [*_OPTIONS, compilers.tuned, f"-ffile-prefix-map={work}=.", *(f"-I{path}" for path in included)]
    objects = {path: work / f"{'-'.join(path.relative_to(cpu).parts)}.o" for path in sources}
    # The largest first: who begins last should be done soon.
    ordered = sorted(sources, key=lambda path: -path.stat().st_size)
    _run([_compiling(path, objects[path], common, compilers) for path in ordered], num_threads, deadline)
    exported, made = work / "exported.map", work / "kernels.so"
    exported.write_text(_EXPORTED)
    # Not by -Wl, which takes a path with a comma for two options.
    link = ["-shared", "-fopenmp", "-Xlinker", f"--version-script={exported}", "-Wl,-Bsymbolic", "-o", str(made)]
    _run([[*compilers.cxx, *link, *map(str, objects.values())]], 1, deadline)
    if _OTHER_OPENMP in made.read_bytes():
        names = " or ".join(dict.fromkeys((compilers.c[0], compilers.cxx[0])))
        raise NoKernelsNow(f"{names} has another OpenMP than GNU's: {_IN_VAIN}; set CC and CXX to GNU's compilers")
    return made


def _add(path: Path, text: str, addition: str) -> None:
    source = path.read_text("utf-8")
    if source.count(text) != 1:
        raise NoKernels(f"{path.name} of the source is not as it was: {_IN_VAIN}")
    path.write_text(source.replace(text, text + addition), "utf-8")


def _compiling(source: Path, target: Path, common: Sequence[str], compilers: _Compilers) -> list[str]:
    compiler = [*compilers.c, "-std=gnu11"] if source.suffix == ".c" else [*compilers.cxx, "-std=gnu++17"]
    return [*compiler, *common, "-c", str(source), "-o", str(target)]


def _run(commands: Sequence[list[str]], num_at_once: int, deadline: float = math.inf) -> None:
    """All of them; none is left running, whatever happens. Raises NoKernelsNow when one fails (there may be no
    memory or no room on the disk for it), or time is up."""
    waiting, running = deque(commands), deque[tuple[str, subprocess.Popen[str]]]()
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                command = waiting.popleft()
                with _signals_waiting():
                    running.append((command[0], _started(command)))
            compiler, process = running[0]
            said = _ended(process, deadline)
            running.popleft()
            if process.returncode:
                words = next((line for line in said.splitlines() if "error" in line), "it said nothing")
                raise NoKernelsNow(f"{compiler} failed: {words:.200}; {_IN_VAIN}")
    finally:
        for _, process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a compiler is several processes
            process.communicate()


def _ended(process: subprocess.Popen[str], deadline: float) -> str:
    """What it said. Waited for a second at a time: a signal that comes as a wait begins does not end that wait."""
    while (left := deadline - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=min(1.0, left))[1]
    raise NoKernelsNow(f"there was no time to compile all: {_IN_VAIN}; {_MORE_TIME}")


@contextmanager
def _signals_waiting() -> Iterator[None]:
    """Until what is done here is done: nobody would know of a process that was started and not noted."""
    heard: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in handlers:
            signal.signal(number, lambda each, _frame: heard.append(each))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in heard:
            signal.raise_signal(late)


def _started(command: Sequence[str]) -> subprocess.Popen[str]:
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(  # noqa: S603  # the user's own compiler, on files whose checksum was verified
        command, stdin=nothing, stdout=nothing, stderr=pipe, text=True, errors="replace", start_new_session=True
    )
