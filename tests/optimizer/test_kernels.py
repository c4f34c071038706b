"""Kernels for the CPU at hand: made from source by the compiler that is here, or a line that says why not."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from octoai.optimizer import kernels, optimization
from octoai.optimizer.additions import ADDED
from octoai.optimizer.optimization import Wish
from octoai.optimizer.profile import Profiles
from octoai.optimizer.space import Candidate
from octoai.optimizer.trial import Bench
from octoai.server.machine.places import create
from octoai.server.sources import PullFailed, sdist
from tests.optimizer.told import told

ENGINE = version("xllamacpp")
GGML = Path("thirdparty", "llama.cpp", "ggml")
ADDED_TO = {
    name: "#if 0\n" + "".join(f"{text};\n" for each, text, _ in ADDED if each == name) + "#endif\n"
    for name, *_ in ADDED
}
C = "int helper(void); int shared(void) { return 1; } int ggml_backend_init(void) { return helper(); }"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of the source that is unpacked instead of llama.cpp's, by their path under `ggml-cpu`."""
    files = {
        "ggml-cpu.c": ADDED_TO["ggml-cpu.c"] + C,
        "repack.cpp": ADDED_TO["repack.cpp"] + 'extern "C" int helper() { return 42; }',
        "llamafile/sgemm.cpp": ADDED_TO["llamafile/sgemm.cpp"],
        "ops.cpp": ADDED_TO["ops.cpp"],
        "vec.cpp": ADDED_TO["vec.cpp"],
        "arch/x86/quants.c": ADDED_TO["arch/x86/quants.c"],
        "arch/x86/repack.cpp": ADDED_TO["arch/x86/repack.cpp"],
        "arch/x86/cpu-feats.cpp": "#error not for us",
        "arch/arm/cpu-feats.cpp": "#error not for us",
    }

    def unpack(_name: str, _version: str, _sha256: str, work: Path, _environ: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = work / GGML / "src" / "ggml-cpu" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return work

    monkeypatch.setattr(sdist, "unpack", unpack)
    return files


def make(path: Path, engine: str = ENGINE, seconds: float = 300, **environ: str) -> None:
    work, given = path.parent.parent / "making", {"PATH": os.environ["PATH"], **environ}
    try:
        kernels.make(path, engine, work=work, num_threads=2, environ=given, seconds=seconds)
    finally:
        assert not work.exists()


def why_not(path: Path, engine: str = ENGINE, **environ: str) -> str:
    with pytest.raises(kernels.NoKernels) as raised:
        make(path, engine, **environ)
    assert not list(path.parent.glob("*"))
    said = str(raised.value)
    assert "\n" not in said
    assert "llama.cpp's kernels are those of its wheel" in said
    return said


def test_the_installed_engine_has_a_source_whose_checksum_is_known() -> None:
    assert ENGINE in kernels.SOURCE_SHA256


@pytest.mark.usefixtures("source")
def test_a_library_is_made_that_shows_one_function_and_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "made.so"
    make(path, CC="env gcc")  # with arguments, as with a cache of compilations
    library = ctypes.CDLL(str(path))
    assert library.ggml_backend_init() == 42
    assert not hasattr(library, "shared")
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("name", ["a,b", "a b", os.fsdecode(b"caf\xe9")])
def test_a_cache_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "kernels" / "made.so"
    make(path)
    assert ctypes.CDLL(str(path)).ggml_backend_init() == 42
    assert not kernels.can_be_loaded(path)  # it says so by its exit status: the number is no backend


def test_what_is_made_is_the_same_wherever_it_is_made(source: dict[str, str], tmp_path: Path) -> None:
    """Or profiles of other models, which name the kernels by their checksum, would not find them again."""
    source["repack.cpp"] += 'extern "C" const char *ggml_backend_place() { return __FILE__; }\n'
    source["ggml-cpu.c"] += (
        "const char *ggml_backend_place(void); const char *fast_place(void) { return ggml_backend_place(); }"
    )
    paths = [tmp_path / name / "kernels" / "made.so" for name in ("here", "elsewhere")]
    for path in paths:
        make(path)
    place = ctypes.CDLL(str(paths[0])).fast_place
    place.restype = ctypes.c_char_p
    assert place().endswith(b"/ggml-cpu/repack.cpp")
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_openmp_than_that_of_the_wheel_is_refused(source: dict[str, str], tmp_path: Path) -> None:
    source["ops.cpp"] += 'extern "C" void __kmpc_fork_call(); extern "C" void threads() { __kmpc_fork_call(); }\n'
    source["repack.cpp"] = source["repack.cpp"].replace("return 42", "void threads(); threads(); return 42")
    said = why_not(tmp_path / "kernels" / "made.so")
    assert "gcc or g++ has another OpenMP than GNU's" in said
    assert "set CC and CXX" in said


@pytest.mark.parametrize("fault", ["killed", "no space", "none", "no command", "another OpenMP", "version", "source"])
def test_only_what_nobody_can_put_right_leaves_no_hope_of_kernels(
    source: dict[str, str], tmp_path: Path, fault: str
) -> None:
    """A service would not have another search made."""
    compiler, said = tmp_path / "compiler", {"killed": "Killed", "no space": "No space left on device"}.get(fault, "")
    compiler.write_text(f"#!/bin/sh\necho 'fatal error: {said}' >&2\nexit 1\n")
    compiler.chmod(0o700)
    if fault == "another OpenMP":
        source["repack.cpp"] += 'extern "C" const char *fast_threads() { return "__kmpc_"; }'
    if fault == "source":
        source["repack.cpp"] = source["repack.cpp"].replace("disable_chunking", "is_even")
    cxx = {"killed": compiler, "no space": compiler, "none": "no-such-compiler", "no command": '"'}.get(fault)
    environ, version = {"CXX": str(cxx)} if cxx else {}, "1.2.3" if fault == "version" else ENGINE
    with pytest.raises(kernels.NoKernels, match=said or None) as raised:
        make(tmp_path / "kernels" / "made.so", version, **environ)
    assert isinstance(raised.value, kernels.NoKernelsNow) == (fault not in ("version", "source"))


def test_kernels_that_others_can_write_may_be_removed_and_made_again(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    path = profiles.kernels_path(kernels.RECIPE)
    create(path.parent)
    path.write_bytes(b"kernels")
    path.chmod(0o666)
    own, missing = optimization._kernels(profiles, Wish(context_length=512), 2, tmp_path / "work", pytest.fail)
    assert own is None
    assert isinstance(missing, kernels.NoKernelsNow)
    assert "others can write it" in str(missing)


@pytest.mark.parametrize("name", ["missing.so", os.fsdecode(b"caf\xe9.so")])
def test_what_is_no_library_of_kernels_is_one_line_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.so")).write_bytes(b"nothing")
    program = """
import pathlib, sys
from octoai.server.engines.llama import kernels
try:
    kernels.load(pathlib.Path(sys.argv[1]))
except kernels.CannotLoadKernels as error:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=False).returncode == 7


def test_source_that_does_not_compile_is_one_line(source: dict[str, str], tmp_path: Path) -> None:
    source["ops.cpp"] += "int main() { return nothing; }"
    assert "g++ failed: " in (said := why_not(tmp_path / "kernels" / "made.so"))
    assert "error: " in said
    assert "nothing" in said


def test_source_that_is_not_as_it_was_when_we_looked_is_not_compiled(source: dict[str, str], tmp_path: Path) -> None:
    source["repack.cpp"] = source["repack.cpp"].replace("disable_chunking", "is_even")
    assert "repack.cpp of the source is not as it was" in why_not(tmp_path / "kernels" / "made.so")


@pytest.mark.usefixtures("source")
def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path) -> None:
    assert "there is no no-such-compiler: " in why_not(tmp_path / "made.so", CXX="no-such-compiler")
    assert "install it (Debian: g++)" in why_not(tmp_path / "made.so", CC="no-such-compiler")


def test_where_the_source_is_not_to_be_had_one_line_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(*_: object) -> Path:
        raise PullFailed("the package index cannot be reached")

    monkeypatch.setattr(sdist, "unpack", unpack)
    assert why_not(tmp_path / "k" / "made.so").startswith("the package index cannot be reached; ")
    assert "of xllamacpp 1.2.3 is not known" in why_not(tmp_path / "k" / "made.so", "1.2.3")


def test_a_download_that_takes_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hung, began = threading.Event(), time.monotonic()
    monkeypatch.setattr(sdist, "unpack", lambda *_: hung.wait(60))
    try:
        with pytest.raises(kernels.NoKernels, match=r"no time to download .*wheel; give it more --seconds"):
            make(tmp_path / "kernels" / "made.so", seconds=0.5)
        assert time.monotonic() - began < 10
    finally:
        hung.set()


@pytest.mark.parametrize("name", ["CC", "CXX"])
def test_a_compiler_that_is_no_command_is_one_line_that_names_the_variable(tmp_path: Path, name: str) -> None:
    assert why_not(tmp_path / "made.so", **{name: 'gcc "'}).startswith(f"{name} is no command (no closing quotation): ")


@pytest.mark.usefixtures("source")
def test_a_compiler_that_is_white_space_is_the_usual_one(tmp_path: Path) -> None:
    make(tmp_path / "kernels" / "made.so", CC=" ", CXX="  ")


@pytest.mark.usefixtures("source")
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("in the way")
    with pytest.raises(kernels.NoKernels, match="kernels: File exists; "):
        make(tmp_path / "kernels" / "made.so")


def test_who_is_interrupted_leaves_no_compiler_running(tmp_path: Path) -> None:
    marker = f"{time.time_ns()}"
    program = f"from octoai.optimizer.kernels import _run; _run([['sh', '-c', 'sleep {marker} & wait']] * 2, 2)"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        for _ in range(100):
            if num_running(marker) >= 4:
                break
            time.sleep(0.1)
        assert num_running(marker) >= 4
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) != 0
    assert num_running(marker) == 0


@pytest.mark.usefixtures("source")
def test_compilers_that_take_too_long_are_ended(tmp_path: Path) -> None:
    compiler, began = tmp_path / "compiler", time.monotonic()
    compiler.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/compilers\nexec sleep {int(time.time())}\n")
    compiler.chmod(0o700)
    with pytest.raises(kernels.NoKernels, match=r"no time to compile all: .*wheel; give it more --seconds"):
        make(tmp_path / "kernels" / "made.so", seconds=1.5, CC=str(compiler), CXX=str(compiler))
    assert time.monotonic() - began < 10
    assert len((tmp_path / "compilers").read_text().split()) == 2
    assert not any(Path("/proc", pid).exists() for pid in (tmp_path / "compilers").read_text().split())


def test_half_of_a_search_may_be_spent_on_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def make(*_: object, seconds: float, **__: object) -> None:
        given.append(seconds)
        raise kernels.NoKernels("no time")

    monkeypatch.setattr(kernels, "make", make)
    wish = Wish(context_length=512, seconds=100)
    path, missing = optimization._kernels(Profiles(tmp_path), wish, 2, tmp_path / "work", given.append)
    assert (path, str(missing)) == (None, "no time")
    assert given == ["compiling kernels for this CPU", 50]


def test_a_signal_that_comes_while_a_compiler_is_started_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nobody would know of it, and it would be left running."""
    marker, started = f"{time.time_ns()}", kernels._started

    def interrupted(command: Sequence[str]) -> subprocess.Popen[str]:
        process = started(command)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(kernels, "_started", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernels._run([["sh", "-c", f"sleep {marker}"]], 1)
    assert num_running(marker) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def num_running(marker: str) -> int:
    """Processes with that word in their arguments, Python's own not counted."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    return sum(marker.encode() in line and b"python" not in line for line in lines)


def test_slots_share_a_cache_where_attention_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.shares_cache() == (" avx2 " in Path("/proc/cpuinfo").read_text("utf-8"))
    monkeypatch.setattr(kernels.platform, "machine", lambda: "aarch64")
    assert not kernels.shares_cache()


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_kernels_that_do_not_load_are_made_again(tmp_path: Path, content: bytes | None) -> None:
    profiles = Profiles(tmp_path)
    path = profiles.kernels_path(kernels.RECIPE)
    if content is not None:
        create(path.parent)
        path.write_bytes(content)
    steps: list[str] = []
    wish = Wish(context_length=512, seconds=600)

    def make(path: Path, *_: object, **__: object) -> None:
        (create(path.parent) / path.name).write_text("new")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "make", make)
        assert optimization._kernels(profiles, wish, 2, tmp_path / "work", steps.append) == (path, None)
    assert steps == ["compiling kernels for this CPU"]
    assert path.read_text() == "new"


def test_kernels_stay_where_others_cannot_be_made_or_what_looks_at_them_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profiles name them by their checksum: without them none is used any more."""
    profiles = Profiles(tmp_path)
    path = profiles.kernels_path(kernels.RECIPE)
    create(path.parent)
    path.write_bytes(b"kernels")
    wish = Wish(context_length=512, seconds=30)
    own, missing = optimization._kernels(profiles, wish, 2, tmp_path / "work", pytest.fail)
    assert own is None
    assert "only a search of 60 seconds or more compiles them" in str(missing)
    (tmp_path / "ctypes.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wish = Wish(context_length=512, seconds=600)
    own, missing = optimization._kernels(profiles, wish, 2, tmp_path / "work", pytest.fail)
    assert own is None
    assert str(missing).startswith(f"{path} could not be tried (exit status 1): ")
    assert isinstance(missing, kernels.NoKernelsNow)
    assert path.read_bytes() == b"kernels"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
def test_kernels_that_load_are_not_made_again(tmp_path: Path, made: Path) -> None:
    profiles = Profiles(tmp_path)
    path = profiles.kernels_path(kernels.RECIPE)
    shutil.copy(made, create(path.parent) / path.name)
    wish = Wish(context_length=512, seconds=600)
    assert optimization._kernels(profiles, wish, 2, tmp_path / "work", pytest.fail) == (path, None)
    os.truncate(path, path.stat().st_size // 2)
    assert not kernels.can_be_loaded(path)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
def test_llama_cpps_own_are_made_run_and_say_what_the_wheels_say(
    embedded_model: Path, tmp_path: Path, made: Path
) -> None:
    given = Candidate(num_threads=2)
    with Bench(embedded_model, tmp_path, context_length=512, num_threads=2) as bench:
        speed, _ = bench.speed(given.tuned(kernels=made), 1 / 16, 1)
        assert speed.joint_rate > 0
        # Not the same to the last bit: other instructions round in another order, as other formats do.
        assert bench.loss(given.tuned(kernels=made)).kl_nats < 0.005


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
def test_attention_is_what_it_is_by_definition(made: Path) -> None:
    """Of all shapes; ours to five digits at least. What is not for it, llama.cpp's code does, which adds up in F16."""
    found = told("attend", made)
    has_vectors = " avx2 " in Path("/proc/cpuinfo").read_text("utf-8")
    for case in found["ours"]:
        assert case["difference"] < (1e-5 if has_vectors else 2e-2), case
    for case in found["llama.cpp's"]:
        assert case["difference"] < 2e-2, case


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
def test_products_of_evenly_spaced_levels_are_what_they_are_by_definition(made: Path) -> None:
    """Of the activations as Q8_0 keeps them: nothing else is rounded."""
    instructions = Path("/proc/cpuinfo").read_text("utf-8")
    needed = {"Q4_0": " avx2 ", "Q4_1": " avx2 ", "Q8_0": "_vnni "}
    for case in told("multiply", made):
        if needed[case["kind"]] in instructions:
            assert case["difference"] < 1e-5, case


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
def test_samplers_draw_what_the_engines_own_draw(made: Path) -> None:
    """With the same seed, and from the same nucleus. How its sum is rounded moves its end by a token in thousands."""
    found = told("sample", made)
    assert found["replaced"] == 11  # and what slots hold is heard of
    for case in found["draws"]:
        assert case["same"] > 0.98, case
        assert case["forbidden"] == 0, case
        assert case["difference"] < 1e-6, case
        assert case["repeats"], case
        assert case["seed"] == 7, case
    for case in found["nuclei"]:
        assert case["differ"] <= 1 + case["kept"] // 5_000, case
        assert case["same"], case
        assert case["difference"] < 1e-6, case
    for case in found["without numbers"]:
        assert case["left"][1] > 0, case  # or the engine would read before the first
        assert 0 <= case["drawn"][1] < 1_000, case


def test_a_signal_that_does_not_end_a_wait_is_heard() -> None:
    program = """
import signal, sys, threading, time
from octoai.optimizer import kernels
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the other thread gets it: no call of this one is ended
print("here", flush=True)
try:
    kernels._run([["sleep", "60"]], 1)
except KeyboardInterrupt:
    sys.exit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 7
    finally:
        process.kill()
        process.communicate()
