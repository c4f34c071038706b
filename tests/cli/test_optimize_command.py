"""`octoai optimize`, and `octoai serve` with what it found."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from octoai import OctoAI
from octoai.cli import optimize, serve
from octoai.optimizer.kernels import RECIPE
from octoai.optimizer.optimization import Optimized, Wish
from octoai.optimizer.outcome import Outcome
from octoai.optimizer.profile import Profile, Profiles, sha256
from octoai.optimizer.space import AS_GIVEN, Candidate
from octoai.server import app
from octoai.server import run as run_module
from octoai.server.catalogue import EMBEDDED_MODEL_ID
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.machine import idle
from octoai.server.router import Router
from octoai.server.settings import Settings, load
from tests.running import Serve
from tests.talking import until

pytestmark = pytest.mark.timeout(240)


def run(place: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "octoai", "optimize", *arguments],
        cwd=place,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def refused(place: Path, *arguments: str) -> str:
    ran = run(place, *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Traceback" not in ran.stderr
    return ran.stderr.splitlines()[-1]


@pytest.fixture
def cache(embedded_model: Path, tmp_path: Path) -> Path:
    """A cache of the test's own, with the model in it."""
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    shutil.copy(embedded_model, models)
    return tmp_path / "cache"


def profile_of(source: Path, profiles: Profiles, candidate: Candidate) -> Profile:
    return Profile(
        model_sha256=sha256(source),
        cpu=profiles.cpu,
        engine=profiles.engine,
        candidate=candidate,
        goal="balanced",
        max_loss=0.005,
        made="2026-11-22T23:00:00Z",
        ratios=(2.0, 1.2, 1.9),
    )


def test_a_model_of_another_server_is_refused(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text("[[models]]\nid = 'far'\naliases = ['away']\nengine_url = 'http://x/v1'\n")
    for arguments in ((), ("far",), ("AWAY",)):
        assert "far is served by http://x/v1: optimize it where that server runs" in refused(tmp_path, *arguments)


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    assert "unknown model 'no-such-model'" in refused(tmp_path, "no-such-model")
    assert "there is no file" in refused(tmp_path, "missing.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    assert "is not a GGUF file" in refused(tmp_path, "text.gguf", "--seconds", "5")


def test_a_stand_in_that_the_environment_names_need_not_be_a_model_of_the_configuration(tmp_path: Path) -> None:
    """It may be one of the command line of the service, which has this run as it is run itself."""
    (tmp_path / "text.gguf").write_text("not a model")
    ran = run(tmp_path, "text.gguf", "--seconds", "5", OCTOAI_STAND_IN="text")
    assert "is not a GGUF file" in ran.stderr


def test_a_plot_that_cannot_be_written_is_said_before_the_search(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("not a model")
    for path in (tmp_path / "missing" / "x.svg", tmp_path):
        said = refused(tmp_path, "model.gguf", "--plot", str(path))
        assert said.endswith(f"--plot: {path} cannot be written: give a file in a directory of yours")
    assert "is not a GGUF file" in refused(tmp_path, "model.gguf", "--seconds", "5", "--plot", "here.svg")


def test_what_serve_runs_while_idle_is_this_command(tmp_path: Path) -> None:
    config = tmp_path / "here.toml"
    config.write_text("[[models]]\nid = 'far'\nengine_url = 'http://x/v1'\n")
    settings = load(path=config, environ={})
    command = serve._optimization(settings, "far", argparse.Namespace(config=config, model=[]))
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "optimize it where that server runs" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seconds", "0"),
        ("--seconds", "nan"),
        ("--max-loss", "-1"),
        ("--max-loss", "nan"),
        ("--max-memory", "much"),
        ("--max-memory", "12"),
        ("--for", "fun"),
    ],
)
def test_arguments_are_bounded(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, *arguments)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("option", "said"), [("--max-loss", "expected 0 to 100 nats"), ("--seconds", "expected 1 to 86400 seconds")]
)
def test_what_is_no_number_is_told_what_would_be_one(tmp_path: Path, option: str, said: str) -> None:
    ran = run(tmp_path, option, "nonsense")
    assert ran.returncode == 2
    assert f"{said}, not 'nonsense'" in ran.stderr


def test_without_a_word_it_looks_for_two_minutes_and_loses_next_to_nothing() -> None:
    wish = Wish(context_length=512)
    assert (wish.goal, wish.seconds, wish.bounds.max_loss) == ("balanced", 120.0, 0.005)


_FINDS_NOTHING = """
import sys
from pathlib import Path
from octoai.cli import main
from octoai.optimizer import optimization
from octoai.optimizer.outcome import Outcome
from octoai.optimizer.space import Candidate
from octoai.optimizer.workload import Speed

pairs = [(Speed(9, 9, 9), Speed(9, 9, 9))] * int(sys.argv[1])
best = Candidate().tuned(kernels=Path("kernels.so") if "kernels" in sys.argv else None)
nothing = optimization.Optimized(Outcome(best=best, is_usable=True, pairs=pairs))
optimization.optimize = lambda *_: nothing
sys.exit(main(["optimize", "model.gguf"]))
"""


@pytest.mark.parametrize(("chore", "status"), [({}, 1), ({"OCTOAI_CHORE_OF": str(os.getpid())}, 0)])
@pytest.mark.parametrize(
    ("num_pairs", "said"),
    [
        (1, "nothing better was found than what a service does without a profile: nothing is stored"),
        (0, "what was found could not be compared with the defaults: nothing is stored; give it more --seconds"),
    ],
)
def test_where_nothing_better_is_found_that_is_said(
    tmp_path: Path, chore: dict[str, str], status: int, num_pairs: int, said: str
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-c", _FINDS_NOTHING, str(num_pairs)]
    environ = {**os.environ, **chore}
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == status
    assert ran.stderr.splitlines()[-1] == f"octoai: {said}"


def test_where_nothing_better_is_found_it_is_said_what_becomes_of_the_profile_there_was(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    program = _FINDS_NOTHING.replace("pairs=pairs)", "pairs=pairs), older='it stays'")
    for arguments in ([], ["--json"]):
        command = [sys.executable, "-c", program.replace('"model.gguf"]', f'"model.gguf", *{arguments}]'), "1"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 1
        assert ran.stderr.endswith(": nothing is stored\noctoai: it stays\n")
    assert json.loads(ran.stdout)["older"] == "it stays"


@pytest.mark.parametrize(
    ("num_pairs", "best", "status"),
    [(0, "kernels", idle.LATER), (1, "kernels", 0), (0, "no others", 0)],
)
def test_what_could_not_be_compared_is_searched_for_again_later(
    tmp_path: Path, num_pairs: int, best: str, status: int
) -> None:
    """What has no kernels is no faster than what a service does without a profile."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-c", _FINDS_NOTHING, str(num_pairs), best]
    environ = {**os.environ, "OCTOAI_CHORE_OF": str(os.getpid())}
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == status


_FINDS = """
import sys
from pathlib import Path
from octoai.cli import main
from octoai.optimizer import optimization
from octoai.optimizer.outcome import Outcome
from octoai.optimizer.profile import Profile
from octoai.optimizer.space import Candidate

best = Candidate()
profile = Profile("", "a CPU", "1.2.3", best, "balanced", 0.005, "now")
found = optimization.Optimized(Outcome(best, True), profile, Path("here"), no_plot="no room for the plot")
optimization.optimize = lambda *_: found
sys.exit(main(["optimize", "model.gguf", "--plot", "my.svg"]))
"""


def test_a_plot_that_is_asked_for_is_written_also_where_that_beside_the_profile_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-c", _FINDS]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0
    assert "\nstored in here\n" in ran.stdout
    assert ran.stderr.splitlines()[-1] == "octoai: no room for the plot"
    assert (tmp_path / "my.svg").read_text().startswith("<svg")


WITHOUT_STDERR = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable]


def test_without_standard_error_it_does_what_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    ran = subprocess.run([*WITHOUT_STDERR, "-c", _FINDS], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 0
    assert "\nstored in here\n" in ran.stdout


def test_without_standard_error_nothing_but_the_result_is_on_standard_output(tmp_path: Path) -> None:
    command = [*WITHOUT_STDERR, "-m", "octoai", "optimize", "missing.gguf", "--json"]
    ran = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")


_IS_INTERRUPTED_TWICE = """
import signal, sys
from octoai.cli import main, optimize
from octoai.optimizer import optimization
from octoai.optimizer.outcome import Outcome
from octoai.optimizer.space import Candidate

def shown(result):
    signal.raise_signal(signal.SIGINT)
    return "all of it"

optimize._shown = shown
optimization.optimize = lambda *_: optimization.Optimized(Outcome(Candidate(), is_interrupted=True))
status = main(["optimize", "model.gguf"])
signal.raise_signal(signal.SIGINT)
sys.exit(status)
"""


def test_a_second_interrupt_takes_nothing_from_what_the_first_ended(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-c", _IS_INTERRUPTED_TWICE]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (130, "all of it")
    assert "Traceback" not in ran.stderr


def test_who_has_a_service_running_is_told_when_it_uses_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    profile = profile_of(tmp_path / "model.gguf", Profiles(tmp_path), Candidate())
    shown = optimize._shown(Optimized(Outcome(best=Candidate()), profile, tmp_path))
    assert shown.endswith(
        f"\nstored in {tmp_path}; the plot is {tmp_path / 'profile.svg'}\n"
        "a service that runs already uses it from its next start on\n"
    )


@pytest.mark.slow
@pytest.mark.model
def test_a_short_search_ends_in_a_profile_that_serve_uses(cache: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    # A bound on memory that the start is over: what is found is another way to run it.
    bounded = ("--seconds", "50", "--max-memory", "1200M")
    ran = run(tmp_path, *bounded, "--json", "--plot", "here.svg", OCTOAI_CACHE_DIR=str(cache))
    assert ran.returncode == 0, ran.stderr
    assert time.monotonic() - began < 50 + 100  # a trial more, or a reading of the text for quality, on a busy machine
    result = json.loads(ran.stdout)
    assert result["profile"]["candidate"]["weights"] in {AS_GIVEN, "Q8_0"}
    for trial in result["trials"]:  # on a busy machine some may be too slow
        assert trial["note"] in {"", "too much memory"} or trial["speed"] is None or "a batch takes" in trial["note"]
    assert (tmp_path / "here.svg").read_text().startswith("<svg")
    assert not list((cache / "optimizing").glob("*.gguf"))
    service = Serve(tmp_path / "served", environ={"OCTOAI_CACHE_DIR": str(cache)})
    try:
        (line,) = [line for line in service.lines if "profile" in line]
        assert line.startswith(f"octoai: profile of {EMBEDDED_MODEL_ID}: {result['profile']['candidate']['weights']}, ")
    finally:
        assert service.stop() == 0


@pytest.mark.model
def test_one_search_at_a_time_and_what_runs_while_idle_comes_again_or_finds_the_profile(
    cache: Path, embedded_model: Path, tmp_path: Path
) -> None:
    (cache / "optimizing").mkdir()
    chore = {"OCTOAI_CACHE_DIR": str(cache), "OCTOAI_CHORE_OF": str(os.getpid())}
    with (cache / "optimizing" / f"{sha256(embedded_model)[:16]}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = run(tmp_path, **chore)
        assert ran.returncode == idle.LATER
        assert "is being optimized already" in ran.stderr
        profiles = Profiles(cache)
        profiles.note_in_vain(embedded_model, sha256(embedded_model), RECIPE)
        assert run(tmp_path, **chore).returncode == 0
        assert run(tmp_path, OCTOAI_CACHE_DIR=str(cache)).returncode == 1
        shutil.rmtree(cache / "searched")
        profiles.store(embedded_model, profile_of(embedded_model, profiles, Candidate(num_slots=2)), None)
        assert run(tmp_path, **chore).returncode == 0
        assert run(tmp_path, OCTOAI_CACHE_DIR=str(cache)).returncode == 1  # by hand it is another search


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(500)
def test_a_service_that_nobody_asks_makes_a_profile_and_uses_it(cache: Path, tmp_path: Path) -> None:
    environ = {"OCTOAI_CACHE_DIR": str(cache), "OCTOAI_OPTIMIZE_WHEN_IDLE": "on"}
    service = Serve(tmp_path / "served", environ=environ)
    chat = {"model": EMBEDDED_MODEL_ID, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}

    def profiles() -> list[str]:
        return [line for line in service.lines if line.startswith(f"octoai: profile of {EMBEDDED_MODEL_ID}: ")]

    try:
        with OctoAI(api_key=service.token, base_url=service.url, max_retries=0) as client:
            assert client.text_gen.create_chat_completion(**chat).usage.completion_tokens > 0
            assert not profiles()
            said = f"runs with the defaults; `octoai optimize {EMBEDDED_MODEL_ID}` is run while nobody asks"
            assert f"octoai: {EMBEDDED_MODEL_ID} {said}" in service.lines
            until(lambda: bool(profiles()), 400)
            # While the engine is another one, too.
            answers = [client.text_gen.create_chat_completion(**chat) for _ in range(20)]
            assert all(answer.usage.completion_tokens > 0 for answer in answers)
        assert "done while idle" in service.log.read_text()
        assert Profiles(cache).find(next((cache / "models").glob("*.gguf")))
    finally:
        assert service.stop() == 0
    service = Serve(tmp_path / "served", environ=environ)
    try:
        assert profiles()
    finally:
        assert service.stop() == 0


def interrupted(
    cache: Path, place: Path, number: int, has_begun: Callable[[], bool], **environ: str
) -> tuple[int, str]:
    """The status of a search that got a signal once `has_begun`, and what it wrote; nothing half done is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "octoai", "optimize", "--seconds", "100"],
        cwd=place,
        env={**os.environ, "OCTOAI_CACHE_DIR": str(cache), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until(has_begun, 200)  # some 15 s, on an idle machine
        os.killpg(process.pid, number)  # as a terminal does it
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "Traceback" not in output + errors
    assert not [path for path in (cache / "optimizing").iterdir() if path.is_dir()]
    assert not [path for path in (cache / "kernels").glob("*") if path.suffix != ".so"]
    if number == signal.SIGTERM:  # of who wants the machine back: nothing is stored
        assert output == ""
    else:
        assert "chosen: " in output or "nothing is stored" in errors
    return process.returncode, errors


SIGNALS = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
@SIGNALS
def test_an_interrupted_search_leaves_no_traceback_and_nothing_half_done(
    cache: Path, tmp_path: Path, number: int, status: int
) -> None:
    def has_begun() -> bool:
        return any((cache / "optimizing").glob("*/*"))

    assert interrupted(cache, tmp_path, number, has_begun, CXX="no-such-compiler")[0] == status


@pytest.mark.model
@pytest.mark.timeout(300)
@SIGNALS
def test_interrupted_while_it_compiles_it_leaves_no_compiler_running(
    cache: Path, tmp_path: Path, number: int, status: int
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/compilers\nexec sleep 100\n")
    compiler.chmod(0o700)

    def has_begun() -> bool:
        return (tmp_path / "compilers").exists()

    got, errors = interrupted(cache, tmp_path, number, has_begun, CC=str(compiler), CXX=str(compiler))
    assert got == status
    assert "compiling kernels for this CPU" in errors
    for pid in (tmp_path / "compilers").read_text().split():
        assert not is_running(pid)


def is_running(pid: str) -> bool:
    """Not counting one that is dead and that whoever takes in orphans has not looked at yet."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.model
def test_a_damaged_profile_is_one_line_and_the_defaults(cache: Path, embedded_model: Path, tmp_path: Path) -> None:
    profiles = Profiles(cache)
    place = profiles.store(embedded_model, profile_of(embedded_model, profiles, Candidate(num_slots=2)), None)
    (place / "profile.json").write_text("{")
    service = Serve(tmp_path / "served", environ={"OCTOAI_CACHE_DIR": str(cache)})
    try:
        assert not [line for line in service.lines if "profile of" in line and "damaged" not in line]
        assert "is damaged; the defaults are used" in service.log.read_text()
        said = f"runs with the defaults; `octoai optimize {EMBEDDED_MODEL_ID}` finds what is fastest here"
        assert f"octoai: {EMBEDDED_MODEL_ID} {said}" in service.lines
    finally:
        assert service.stop() == 0


@pytest.mark.parametrize("is_in_vain", [False, True])
def test_a_search_that_found_nothing_is_not_made_again_for_a_damaged_profile(tmp_path: Path, is_in_vain: bool) -> None:
    (source := tmp_path / "m.gguf").write_bytes(b"GGUF")
    profiles = Profiles(tmp_path)
    place = profiles.store(source, profile_of(source, profiles, Candidate(num_threads=1)), None)
    (place / "profile.json").write_text("{")
    if is_in_vain:
        profiles.note_in_vain(source, sha256(source), RECIPE)
    settings = load(path=None, environ={"OCTOAI_CACHE_DIR": str(tmp_path)})
    assert optimize._is_searched(settings, source) == is_in_vain


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Settings, Router, LlamaEngine]:
    """A service's engine of `m.gguf`, without a child."""

    async def nothing(_: LlamaEngine) -> None:
        pass

    monkeypatch.setattr(LlamaEngine, "_spawn", nothing)
    (tmp_path / "m.gguf").write_bytes(b"GGUF of one")
    settings = load(path=None, environ={"OCTOAI_CACHE_DIR": str(tmp_path)}, models=[str(tmp_path / "m.gguf")])
    router = app.router(settings, app.catalogue(settings), {"m": tmp_path / "m.gguf"})
    engine = router.deployments[0].engine
    assert isinstance(engine, LlamaEngine)
    return settings, router, engine


def test_an_end_does_not_wait_until_what_was_found_while_idle_is_hashed(
    served: tuple[Settings, Router, LlamaEngine],
) -> None:
    """Files of tens of GB take minutes."""
    hashing = threading.Event()

    async def main() -> None:
        search = run_module.Search("m", [], lambda: hashing.wait(10) and None)
        using = asyncio.create_task(run_module._use(search, *served[:2]))
        await asyncio.sleep(0.1)
        assert not using.done()
        using.cancel()

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 5
    hashing.set()


def test_what_looks_up_what_was_found_may_fail(served: tuple[Settings, Router, LlamaEngine]) -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_module._use(run_module.Search("m", [], lambda: 1 // 0), *served[:2]))


@pytest.mark.parametrize("how", ["it stays", "another file", "written over"])
def test_what_was_found_while_idle_is_used_only_where_the_file_is_the_one_that_is_served(
    served: tuple[Settings, Router, LlamaEngine], tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Otherwise it was found for the other one, which was put there for the next start."""
    settings, router, engine = served
    weights, made = tmp_path / "m.gguf", tmp_path / "made.gguf"
    os.utime(weights, ns=(1, 1))
    made.write_bytes(b"GGUF in another format")

    async def main() -> None:
        await engine.start()
        try:
            if how == "written over":
                weights.write_bytes(b"GGUF of two")
            elif how == "another file":
                (tmp_path / "new.gguf").write_bytes(b"GGUF of two")
                (tmp_path / "new.gguf").replace(weights)
            found = (made, Candidate(num_slots=2).options)
            await run_module._use(run_module.Search("m", [], lambda: found), settings, router)
            assert engine.weights == (made if how == "it stays" else weights)
        finally:
            await engine.close()

    asyncio.run(main())
    said = f"m: {weights} may be another file than the one that was loaded: what was found while idle is used from"
    assert (said in caplog.text) == (how != "it stays")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_that_python_ignores_comes_once_more(number: int, status: int) -> None:
    program = f"""
import signal, time
from octoai.cli import signals
signals.hear()
class Going:
    def __del__(self): signal.raise_signal({int(number)})
going = Going()
del going
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=15, check=False)
    assert done.returncode == status
    assert "ignored" not in done.stderr
