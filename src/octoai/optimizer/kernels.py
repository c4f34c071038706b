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
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from octoai.server.places import create
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
_ADDED = (
    ("ggml-cpu.c", "nchunk0 * nchunk1 < nth * 4 || ggml_is_numa()", " || nr1 == 1"),
    ("repack.cpp", "const bool disable_chunking = ggml_is_numa()", " || ne1 == 1"),
    (
        "llamafile/sgemm.cpp",
        "(A[lda * (ii + 0) + l].d);",
        " for (int64_t i = 0; i < 4; ++i)"
        " __builtin_prefetch((const char *) (A + lda * (ii + 4)) + (l * 4 + i) * sizeof(TA));",
    ),
    (
        "arch/x86/quants.c",
        "__m256i qx = _mm256_loadu_si256((const __m256i *)x[ib].qs);",
        " _mm_prefetch((const char *) (x + ib) + 4096, _MM_HINT_T0);",
    ),
    (
        "arch/x86/repack.cpp",
        "// Load 8 blocks of 32 interleaved as 8 bytes (B0 - B7)",
        "\n_mm_prefetch((const char *) (b_ptr + b) + 4096, _MM_HINT_T0);"
        " _mm_prefetch((const char *) (b_ptr + b) + 4160, _MM_HINT_T0);",
    ),
    (
        "repack.cpp",
        "repack<BLOC_TYPE, INTER_SIZE, NB_COLS>(t, data, data_size);\n    }\n};\n\n}  // namespace ggml::cpu::repack\n",
        '\n#include "affine.cpp"\n',
    ),
    (
        "repack.cpp",
        "ggml_repack_get_optimal_repack_type(const struct ggml_tensor * cur) {",
        "\n    if (const auto * evenly = evenly_spaced(cur)) return evenly;",
    ),
    ("repack.cpp", '#include "repack.h"', "\ntemplate <typename> constexpr bool takes_a_few = false;"),
    (
        "repack.cpp",
        "const int64_t ncols = src0_end - src0_start;",
        "\nconst int64_t at_once = MAX(NB_COLS, (128 << 10) / (int64_t) nb01 / NB_COLS * NB_COLS);"
        "\nif (nrows > (takes_a_few<BLOC_TYPE> ? 4 : 1) && nrows < 16 && nrows % 4 != 0 && ncols > at_once) {"
        " for (int64_t at = src0_start; at < src0_end; at += at_once)"
        " forward_mul_mat_one_chunk(params, op, at, MIN(at + at_once, src0_end), src1_start, src1_end);"
        " return; }",
    ),
    (
        "repack.cpp",
        "nrows - (nrows % 4), ncols);\n        }\n",
        "if (const int64_t few = nrows % 4; takes_a_few<BLOC_TYPE> && few > 1) {"
        " float * to = (float *) (dst_ptr + (nrows - few) * nb1) + src0_start;"
        " const char * from = src1_ptr + src1_col_stride * (nrows - few);"
        " gemv<BLOC_TYPE, INTER_SIZE, NB_COLS, PARAM_TYPE>"
        "(ne00, to, nb1 / nb0, src0_ptr + src0_start * nb01, from, few, ncols);"
        " return; }\n",
    ),
    ("vec.cpp", "#include <cassert>", '\n#include "calls.cpp"'),
    ("ops.cpp", "#include <cmath>", '\n#include "attention.cpp"'),
    ("ggml-cpu.c", '#include "ops.h"', "\nvoid begin_graph(void);"),
    (
        "ggml-cpu.c",
        "ggml_graph_compute(struct ggml_cgraph * cgraph, struct ggml_cplan * cplan) {",
        "\n    begin_graph();",
    ),
    ("ops.cpp", "const bool use_ref = params->use_ref;", " if (!use_ref && attend_together(params, dst)) return;"),
)
"""Files, a text in each, and what is added behind it.

Of a matrix that is multiplied by one vector, every thread takes an equal part, as llama.cpp has it where memory has
several nodes. Taking turns of 64 rows, two threads read memory at two thirds of its speed, and a stream is nothing but
reading memory. It changes no result.

Of a matrix that is multiplied by a few vectors, the next four rows are fetched while four are computed: rows that are
short and read four at a time are no pattern to the processor, which then waits for each. Two streams were slower side
by side than one after the other. It changes no result either.

Of a matrix that is multiplied by one vector, Q8_0 and Q4_0 are fetched a page ahead: what a processor fetches by itself
ends with the page, and where that of the next one is takes it long to find out, on a virtual machine longest.

Attention is computed by `attention.cpp` where it can, for which results are added up in F32.

Of a few vectors, those left over when four are taken at a time are multiplied together where that can be done, else one
after the other: with rows that stay in the second cache meanwhile, not each with the whole matrix.

How weights are kept for a product is asked of `affine.cpp` first, which has Q4_0, Q4_1 and Q8_0 eight rows at a time.

`calls.cpp` has samplers, which need the vector functions of the file it is in, and what slots share.
"""
_ATTENTION = ("attention", "attention_keys", "attention_vectors")
_OWN = [
    Path(__file__).with_name(f"{name}.cpp")
    for name in (*_ATTENTION, "affine", "calls", "sampling", "sharing", "tokenization")
]
_OPTIONS = ("-O3", "-fPIC", "-fopenmp", "-w", *(f"-D{name}" for name in _DEFINED))
RECIPE = hashlib.sha256(repr((_OPTIONS, _ADDED, [path.read_bytes() for path in _OWN])).encode()).hexdigest()[:8]
"""Of how they are made: kernels that an earlier version of this file made are others."""
_LOADING = """
import pathlib, sys
from octoai.server.engines import kernels
kernels.load(pathlib.Path(sys.argv[1]))
"""
_OTHER_OPENMP = b"__kmpc_"  # what code of LLVM's and Intel's compilers calls
_IN_VAIN = "llama.cpp's kernels are those of its wheel"


class NoKernels(Exception):
    """None could be made; the text is one line that says why and what to do next."""


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
    compilers = _compilers(environ)
    if version not in SOURCE_SHA256:
        raise NoKernels(f"the checksum of the source of xllamacpp {version} is not known: {_IN_VAIN}")
    try:
        source = create(create(work) / "source")
        sdist.unpack("xllamacpp", version, SOURCE_SHA256[version], source, environ)
        made = _built(source / "thirdparty" / "llama.cpp" / "ggml", work, compilers, num_threads, deadline)
        made.chmod(0o600)
        with made.open("rb") as file:  # or what is there after a power cut may be empty, and is there all the same
            os.fsync(file.fileno())
        made.replace(create(path.parent) / path.name)
    except PullFailed as error:
        raise NoKernels(f"{error}; {_IN_VAIN}") from None
    except OSError as error:
        raise NoKernels(f"{error.filename or path}: {error.strerror or error}; {_IN_VAIN}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def can_be_loaded(path: Path) -> bool:
    """In a process of its own, since kernels stay loaded, and a damaged file may crash who loads it."""
    ran = subprocess.run([sys.executable, "-c", _LOADING, str(path)], capture_output=True, check=False)  # noqa: S603  # our own text
    return ran.returncode == 0


def _compilers(environ: Mapping[str, str]) -> _Compilers:
    """GNU's: the wheel's threads are those of its OpenMP library, and there must not be two."""
    known = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or known is None:
        raise NoKernels(f"kernels are compiled on Linux only, for x86-64 and AArch64: {_IN_VAIN}")
    c, cxx = shlex.split(environ.get("CC") or "gcc"), shlex.split(environ.get("CXX") or "g++")
    missing = next((name for name, *_ in (cxx, c) if shutil.which(name, path=environ.get("PATH")) is None), None)
    if missing is not None:
        raise NoKernels(
            f"there is no {missing}: {_IN_VAIN}; install it (Debian: g++) and optimize again to have faster ones"
        )
    return _Compilers(c, cxx, *known)


def _built(ggml: Path, work: Path, compilers: _Compilers, num_threads: int, deadline: float) -> Path:
    cpu = ggml / "src" / "ggml-cpu"
    architecture = cpu / "arch" / compilers.architecture
    directories = (cpu, cpu / "amx", cpu / "tiled", architecture)
    sources = [path for directory in directories for path in directory.glob("*.c*") if path.stem != "cpu-feats"]
    sources.append(cpu / "llamafile" / "sgemm.cpp")
    for path in _OWN:
        shutil.copy(path, cpu)
    for name, text, addition in _ADDED:
        _add(cpu / name, text, addition)
    included = (ggml / "include", ggml.parent / "include", ggml / "src", cpu)
    common = [*_OPTIONS, compilers.tuned, *(f"-I{path}" for path in included)]
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
        raise NoKernels(f"{names} has another OpenMP than GNU's: {_IN_VAIN}; set CC and CXX to GNU's compilers")
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
    """All of them; none is left running, whatever happens. Raises NoKernels when one fails, or time is up."""
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
                raise NoKernels(f"{compiler} failed: {words:.200}; {_IN_VAIN}")
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
    raise NoKernels(f"there was no time to compile all: {_IN_VAIN}; with a longer --seconds there may be")


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
