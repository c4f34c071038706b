"""Several processes that cannot be started, and why."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load.places import serve
from tests.load.upstream import Upstream
from tests.running import Serve

FAR = '[[models]]\nid = "far"\nengine_url = "http://127.0.0.1:9/v1"\n'


@pytest.mark.parametrize(
    ("given", "config", "said"),
    [
        ("2", "", r"workers: 2 processes cannot share the engine of 'smollm2-135m-instruct'.*give the model an engine"),
        ("0", FAR, r"workers: input should be greater than or equal to 1, not '0'"),
        ("x", FAR, r"workers: input should be a valid integer.* not 'x'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path, given: str, config: str, said: str) -> None:
    (tmp_path / "octoai.toml").write_text(config)
    service = Serve(tmp_path, "--workers", given, wait=False)
    assert service.stop(signal.SIGCONT) == 1  # which does nothing
    (line,) = service.log.read_text().splitlines()
    assert re.match(r"octoai: .*" + said, line), line


@pytest.mark.slow
def test_a_port_that_another_service_has_is_refused_to_several_as_to_one(tmp_path: Path, upstream: Upstream) -> None:
    first = serve(tmp_path / "first", upstream, "--workers", "2")
    port = first.url.rsplit(":", 1)[1]
    second = serve(tmp_path / "second", upstream, "--workers", "2", "--port", port, wait=False)
    assert second.stop(signal.SIGCONT) == 1
    assert "it is in use" in second.log.read_text()
    assert first.stop() == 0


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_start_in_one_line(tmp_path: Path, upstream: Upstream) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "journal").write_text("in the way")
    service = serve(tmp_path, upstream, "--workers", "2", wait=False)
    assert service.stop(signal.SIGCONT) == 1
    (line,) = service.log.read_text().splitlines()
    assert line.startswith("octoai: cannot write a journal in ")
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, stdout=subprocess.DEVNULL).returncode == 1


def test_a_worker_that_meets_what_nobody_thought_of_says_so_and_ends(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "log").open("wb") as log:
        inherited = (theirs.fileno(), listener.fileno())
        command = [sys.executable, "-m", "octoai.server.workers.worker", *map(str, inherited)]
        worker = subprocess.Popen(command, pass_fds=inherited, stderr=log)
        theirs.close()
        try:
            with ours.makefile("rw") as said:
                print(json.dumps({"kind": "serve", "settings": {"workers": "nonsense"}}), file=said, flush=True)
                last = json.loads(said.readline())
            assert worker.wait(10) == 1
        finally:
            worker.kill()
            worker.wait()
    assert last == {"kind": "failed", "reason": "a fault of ours, which the log has: ValidationError"}
    assert "Traceback" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_they_serve_what_lies_in_a_directory_whose_name_is_not_unicode(tmp_path: Path, upstream: Upstream) -> None:
    data_dir = tmp_path / os.fsdecode(b"data\xff")
    service = serve(tmp_path, upstream, "--workers", "2", "--data-dir", str(data_dir))
    assert (data_dir / "octoai.db").exists()
    assert service.stop() == 0
