"""What happens when processes die or hang: the engine, the service, and requests in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.asking import CHAT, Client, Raw, is_ready
from tests.running import Serve
from tests.talking import until

pytestmark = pytest.mark.model

LONG = {**CHAT, "max_tokens": 3000, "ignore_eos": True}


def serving(place: Path) -> Iterator[Serve]:
    running = Serve(place, environ={"OCTOAI_ENGINE_STALL_SECONDS": "2"})
    yield running
    running.stop(signal.SIGKILL)


@pytest.fixture
def service(embedded_model: Path, tmp_path: Path) -> Iterator[Serve]:
    """One that may be ended."""
    yield from serving(tmp_path)


@pytest.fixture(scope="module")
def lasting(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """One for all that leave it as it was: its engine is started again."""
    yield from serving(tmp_path_factory.mktemp("lasting"))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_running_requests_end_with_an_error_when_the_engine_is_killed_and_later_ones_succeed(lasting: Serve) -> None:
    client = Client(lasting)
    stream = Raw(client, {**LONG, "stream": True})
    whole = Raw(client, LONG)
    stream.read_until(b'"content":"')
    time.sleep(0.5)
    (engine,) = lasting.children()
    os.kill(engine, signal.SIGKILL)

    answer = stream.read_to_the_end()
    last = answer.rstrip().rsplit(b"data: ", 1)[1]
    assert json.loads(last)["error"]["code"] == "engine_failed"
    assert b"[DONE]" not in answer
    assert not answer.endswith(b"0\r\n\r\n"), "the body must be cut, not ended"
    assert whole.read_to_the_end().startswith(b"HTTP/1.1 502 ")

    # The first to know of its death are those who were reading: the service may call itself ready a moment longer.
    until(lambda: lasting.children() not in ([], [engine]) and is_ready(client), 20)
    assert client.chat()["usage"]["completion_tokens"] == 12


def test_nothing_is_accepted_while_the_engine_is_away(lasting: Serve) -> None:
    client = Client(lasting)
    for _ in range(2):  # the back-off grows with each
        until(lambda: is_ready(client), 20)
        os.kill(lasting.children()[0], signal.SIGKILL)
        until(lambda: not is_ready(client), 2)
    status, headers, text = client.send("/v1/chat/completions", CHAT)
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert json.loads(text)["code"] == "engine_not_ready"
    until(lambda: is_ready(client), 20)


def test_an_engine_that_hangs_is_replaced(lasting: Serve) -> None:
    client = Client(lasting)
    stream = Raw(client, {**LONG, "stream": True})
    stream.read_until(b'"content":"')
    (engine,) = lasting.children()
    os.kill(engine, signal.SIGSTOP)
    began = time.monotonic()
    answer = stream.read_to_the_end()
    assert 1.5 < time.monotonic() - began < 8  # engine_stall_seconds is 2
    assert b'"code":"engine_failed"' in answer
    until(lambda: not is_alive(engine), 5)  # the kernel takes its time over a large process
    until(lambda: is_ready(client), 20)
    client.chat()


def test_the_engine_dies_with_the_service_even_when_that_is_killed(service: Serve) -> None:
    client = Client(service)
    stream = Raw(client, {**LONG, "stream": True})
    stream.read_until(b'"content":"')
    (engine,) = service.children()
    service.stop(signal.SIGKILL)
    until(lambda: not is_alive(engine), 3)
    stream.socket.close()


def test_the_engine_can_be_reached_by_the_service_alone(lasting: Serve) -> None:
    (engine,) = lasting.children()
    open_files = {os.readlink(each) for each in Path(f"/proc/{engine}/fd").iterdir()}
    known = [line.split() for line in Path(f"/proc/{engine}/net/unix").read_text().splitlines()]
    paths = {Path(fields[7]) for fields in known if len(fields) == 8 and f"socket:[{fields[6]}]" in open_files}
    assert [path.name for path in paths] == ["e.sock"]
    for path in paths:
        assert path.parent.stat().st_mode & 0o077 == 0
        with socket.socket(socket.AF_UNIX) as intruder:
            intruder.connect(str(path))
            intruder.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
            assert intruder.recv(100).startswith(b"HTTP/1.1 401")
    arguments = Path(f"/proc/{engine}/cmdline").read_bytes().split(b"\0")
    # A key on the command line would be seen by all.
    assert arguments[1:-1] == [b"-P", b"-m", b"octoai.server.engines.llama.child"]


def test_a_signal_drains_and_refuses_new_requests(service: Serve) -> None:
    client = Client(service)
    running = Raw(client, {**CHAT, "max_tokens": 250, "ignore_eos": True, "stream": True})
    running.read_until(b'"content":"')
    service.process.send_signal(signal.SIGTERM)
    until(lambda: not is_ready(client), 2)
    status, headers, text = client.send("/v1/chat/completions", CHAT)
    assert (status, json.loads(text)["code"]) == (503, "shutting_down")
    assert int(headers["retry-after"]) >= 1
    answer = running.read_to_the_end()
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert service.stop() == 0


@pytest.mark.slow
def test_a_drain_ends_after_its_time(embedded_model: Path, tmp_path: Path) -> None:
    service = Serve(tmp_path, "--drain-seconds", "1")
    stream = Raw(Client(service), {**LONG, "stream": True})
    stream.read_until(b'"content":"')
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    answer = stream.read_to_the_end()
    assert b'"error"' in answer, "what is cut off says so"
    assert b"[DONE]" not in answer
    assert service.stop() == 0
    assert 0.9 < time.monotonic() - began < 8


def test_a_second_signal_stops_at_once(service: Serve) -> None:
    stream = Raw(Client(service), {**LONG, "stream": True})
    stream.read_until(b'"content":"')
    (engine,) = service.children()
    service.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert service.process.poll() is None
    began = time.monotonic()
    service.stop(signal.SIGINT, seconds=10)
    assert time.monotonic() - began < 5
    until(lambda: not is_alive(engine), 3)
    stream.socket.close()


def serve_in_vain(place: Path, *arguments: str) -> tuple[int, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "octoai", "serve", "--port", "0", *arguments],
        env={**os.environ, "OCTOAI_CONFIG_DIR": str(place / "c"), "OCTOAI_DATA_DIR": str(place / "d")},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in ran.stderr + ran.stdout
    return ran.returncode, ran.stderr.strip().splitlines()[-1]


def test_weights_that_cannot_be_loaded_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 1000)
    status, line = serve_in_vain(tmp_path, "--model", str(broken))
    assert status == 1
    assert str(broken) in line


def test_a_missing_file_an_unknown_model_and_a_taken_port_are_one_line(tmp_path: Path, embedded_model: Path) -> None:
    assert serve_in_vain(tmp_path, "--model", "missing.gguf") == (1, "octoai: there is no file missing.gguf")
    status, line = serve_in_vain(tmp_path, "--model", "smollm")
    assert status == 1
    assert "smollm2-135m-instruct" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, line = serve_in_vain(tmp_path, "--port", str(taken.getsockname()[1]))
        assert status == 1
        assert "--port" in line


def test_a_token_made_while_the_service_runs_works_until_it_is_revoked(lasting: Serve) -> None:
    made = lasting.run("token", "create", "--name", "second")
    assert made.returncode == 0, made.stderr
    client = Client(lasting)
    client.headers["authorization"] = f"Bearer {made.stdout.splitlines()[-1]}"
    assert client.send("/v1/models")[0] == 200
    (row,) = [line for line in lasting.run("token", "list").stdout.splitlines() if line.endswith("second")]
    assert lasting.run("token", "revoke", row.split()[0]).returncode == 0
    until(lambda: client.send("/v1/models")[0] == 401, 1)


def test_many_clients_that_leave_at_random_moments_leak_nothing(lasting: Serve) -> None:
    client = Client(lasting)

    def leave(number: int) -> None:
        request = Raw(client, {**LONG, "stream": number % 2 == 0})
        time.sleep((number % 7) * 0.15)
        request.socket.close()

    threads = [threading.Thread(target=leave, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def gauges() -> list[float]:
        text = client.send("/metrics")[2].decode().splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return [float(line.rsplit(" ", 1)[1]) for line in text if line.startswith(names)]

    until(lambda: gauges() == [0, 0], 3)
    client.chat()
