"""What `octoai serve` says: where it cannot, one line, and a status of 1."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from octoai import _credentials
from octoai._credentials import Credentials
from octoai.server import accounts, tokens
from octoai.server.journal import Journal
from octoai.server.ledger.books import recover
from octoai.server.store import Place, connect
from tests.running import Serve
from tests.server.settling import settlement
from tests.talking import until

FAR = "[[models]]\nid = 'x'\nengine_url = 'http://127.0.0.1:9'"


def serve(place: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "octoai", "serve", "--port", "0", *arguments]
    said = os.environ | environ
    ran = subprocess.run(command, cwd=place, env=said, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    return ran.returncode, line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "'prot'; the nearest known one is 'port'"),
        (
            "[[models]]\nid = 'x'\nengine_urll = 'http://x'",
            "'models.0.engine_urll'; the nearest known one is 'engine_url'",
        ),
        ("[[models]]\nid = 'x'\nengine_url = 'http://x'\nengine_key_env = 'UNSET_KEY'", "UNSET_KEY is not set"),
        ("max_waiting = -1", "max_waiting: "),
        ("port = ", "not valid TOML"),
        ("[[models]]\nid = 'x'\nengine_url = 'http://[::1'", "expected http://host:port/v1"),
        ("[[models]]\nid = 'x'\nengine_url = 'http://h'\ninput_price = '5'", "give input_price and output_price"),
        (f"host = '{'a' * 300}'\n[[models]]\nid = 'x'\nengine_url = 'http://h'", "no name of a machine"),
        ("host = 'ä..b'\n[[models]]\nid = 'x'\nengine_url = 'http://h'", "no name of a machine"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "octoai.toml").write_text(text)
    status, line = serve(tmp_path)
    assert status == 1
    assert line.startswith("octoai: ")
    assert words in line


@pytest.mark.parametrize("model", ["~nobody-of-that-name", "~nobody-of-that-name/x.gguf", "a" * 5000])
def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, model: str) -> None:
    status, line = serve(tmp_path, "--model", model)
    assert status == 1
    assert "model" in line or "there is no file" in line


@pytest.mark.parametrize(
    "text",
    [
        "id = 'x'\nengine_url = 'http://user:secret@h:x'",
        "id = 'x'\nengine_url = 'http://user:secret@h/v1'\npath = '/x'",
        "engine_url = 'http://user:secret@h/v1'",
    ],
)
def test_a_password_in_an_engines_url_is_not_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "octoai.toml").write_text(f"[[models]]\n{text}")
    assert "secret" not in serve(tmp_path)[1]


@pytest.mark.parametrize("key", ["secret\nx-other: 1", "secret\x7f", "secretä"])
def test_an_engine_key_that_no_header_can_hold_is_refused_and_not_said(tmp_path: Path, key: str) -> None:
    (tmp_path / "octoai.toml").write_text(f"{FAR}\nengine_key_env = 'FAR_KEY'")
    status, line = serve(tmp_path, FAR_KEY=key)
    assert status == 1
    assert "engine_key_env: FAR_KEY holds more than a key" in line
    assert "secret" not in line


def test_weights_that_are_not_the_expected_ones_are_not_served(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF of somebody else")
    (tmp_path / "octoai.toml").write_text(f"[[models]]\nid = 'm'\npath = 'm.gguf'\nsha256 = '{'0' * 64}'")
    status, line = serve(tmp_path, OCTOAI_CACHE_DIR=str(tmp_path / "cache"))
    assert status == 1
    assert "the weights of 'm' are not the expected ones" in line


def test_what_is_no_model_is_one_line_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_text("not a model")
    status, line = serve(tmp_path, "--model", "junk.gguf", "--data-dir", "data")
    assert status == 1
    assert line == f"octoai: {tmp_path / 'junk.gguf'} is not a GGUF file, or cannot be read: give another"
    assert not (tmp_path / "data").exists()


def test_a_stand_in_that_the_command_line_leaves_out_is_told_how_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(f"stand_in = 'x'\n{FAR}")
    (tmp_path / "junk.gguf").write_text("not a model")
    status, line = serve(tmp_path, "--model", "junk.gguf")
    assert status == 1
    assert line.endswith(
        """stand_in: 'x' is not served; these are: junk; for none, stand_in = "" or an empty OCTOAI_STAND_IN"""
    )
    assert "is not a GGUF file" in serve(tmp_path, "--model", "junk.gguf", OCTOAI_STAND_IN="")[1]


def test_a_damaged_journal_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    async def abandoned() -> Path:
        journal = Journal.open(tmp_path / "data" / "journal")
        for number in range(3):
            await journal.append(settlement(number), soon=True)
        journal.close()
        return tmp_path / "data" / "journal" / f"{journal.instance}-000001.journal"

    path = asyncio.run(abandoned())
    damaged = bytearray(path.read_bytes())
    damaged[150] ^= 1
    path.write_bytes(damaged)
    (tmp_path / "octoai.toml").write_text(FAR)
    status, line = serve(tmp_path, "--data-dir", "data")
    assert status == 1
    assert f"{path.name} at byte" in line
    assert "move that journal's files" in line


def test_a_database_that_is_older_than_the_journal_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    async def abandoned() -> Journal:
        journal = Journal.open(tmp_path / "data" / "journal", segment_bytes=8192)
        for number in range(60):
            await journal.append(settlement(number), soon=True)
        journal.release(journal.durable)  # all that came before was in the database then
        journal.close()
        return journal

    journal = asyncio.run(abandoned())
    oldest = min(int(path.stem[-6:]) for path in journal.directory.glob("*.journal"))
    assert oldest > 1
    (tmp_path / "octoai.toml").write_text(FAR)
    status, line = serve(tmp_path, "--data-dir", "data")
    assert status == 1
    assert f"what was in the segments before {oldest} is in neither" in line
    assert "move that journal's files" not in line
    (journal.directory / f"{journal.instance}.incomplete").touch()
    recover(Place(tmp_path / "data"))
    assert list(journal.directory.iterdir()) == []


def test_a_configuration_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    status, line = serve(tmp_path, "--config", "missing.toml")
    assert status == 1
    assert "missing.toml" in line


def test_a_damaged_credentials_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    (tmp_path / "credentials.toml").write_text("token = [")
    status, line = serve(tmp_path, "--data-dir", "data", OCTOAI_CONFIG_DIR=str(tmp_path))
    assert status == 1
    assert "credentials.toml is not valid TOML" in line


def test_where_the_first_token_cannot_be_stored_it_is_printed_with_why(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    (tmp_path / "config").write_text("in the way")
    service = Serve(tmp_path)
    try:
        assert_works(service, printed_token(service))
        where = f"octoai: cannot store the credentials in {tmp_path / 'config' / 'credentials.toml'}: "
        (said,) = (line for line in service.lines if line.startswith(where))
        assert "set OCTOAI_CONFIG_DIR to a directory that can be written" in said
        assert f"set OCTOAI_BASE_URL={service.url} and OCTOAI_TOKEN" in said
    finally:
        assert service.stop() == 0


@pytest.mark.parametrize(
    ("endpoint", "is_kept"),
    [
        ("https://llm.example", True),
        ("http://10.0.0.7:8000", True),
        ("https://localhost:8443", True),
        ("http://127.0.0.1:1", False),
        ("http://localhost:1", False),
        ("http://[::1]:1", False),
        ("http://127.0.0.1:99999", False),
        ("http://127.0..1:1", False),
    ],
)
def test_a_start_renews_an_address_of_this_machine_and_leaves_all_others(
    tmp_path: Path, endpoint: str, is_kept: bool
) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    token = first_token(tmp_path / "data")
    file = _credentials.write(endpoint, token, tmp_path / "config" / "credentials.toml")
    service = Serve(tmp_path)
    service.stop()
    stored = _credentials.read(file)
    assert stored is not None
    assert (stored.endpoint, stored.token) == (endpoint if is_kept else service.url, token)


def test_a_second_service_leaves_the_address_that_the_first_is_reached_at(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    first = Serve(tmp_path)
    try:
        second = Serve(tmp_path)
        assert second.stop() == 0
        stored = _credentials.read(tmp_path / "config" / "credentials.toml")
        assert stored is not None
        assert stored.endpoint == first.url
        (said,) = (line for line in second.lines if "stays as it is" in line)
        assert f"for the service at {first.url}, which runs; to use this one set OCTOAI_BASE_URL={second.url}" in said
    finally:
        assert first.stop() == 0


class _NoServiceOfOurs(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_an_address_that_another_program_has_by_now_is_renewed(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    token = first_token(tmp_path / "data")
    with HTTPServer(("127.0.0.1", 0), _NoServiceOfOurs) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{other.server_port}"
        file = _credentials.write(endpoint, token, tmp_path / "config" / "credentials.toml")
        service = Serve(tmp_path)
        service.stop()
        other.shutdown()
    stored = _credentials.read(file)
    assert stored is not None
    assert stored.endpoint == service.url


_NOT_AS_ROOT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # by which root writes everywhere; it is gone with the next program
os.execv(sys.executable, [sys.executable, "-m", "octoai", "serve", "--port", "0", "--data-dir", "data"])
"""


def test_an_address_that_cannot_be_renewed_is_said(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    token = first_token(tmp_path / "data")
    file = _credentials.write("http://127.0.0.1:1", token, tmp_path / "config" / "credentials.toml")
    file.parent.chmod(0o500)
    environ = os.environ | {"OCTOAI_CONFIG_DIR": str(file.parent)}
    command = [sys.executable, "-c", _NOT_AS_ROOT]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        said, ready = service.stdout.readline(), service.stdout.readline()
        service.terminate()
    file.parent.chmod(0o700)
    url = ready.removeprefix("octoai ready on ").strip()
    assert said.startswith(f"octoai: cannot store the credentials in {file}: ")
    assert said.endswith(f"set OCTOAI_BASE_URL={url}\n")
    assert service.returncode == 0


def first_token(data_dir: Path) -> str:
    with closing(connect(Place(data_dir))) as db, db.transaction():
        accounts.ensure_default(db)
        return tokens.mint(db, "first").text


def printed_token(service: Serve) -> str:
    (token,) = (line.rpartition(" ")[2] for line in service.lines if "your API token, shown once" in line)
    return token


def assert_works(service: Serve, token: str) -> None:
    headers = {"authorization": f"Bearer {token}"}
    assert httpx.get(f"{service.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_goes_on_when_nobody_reads_its_lines(tmp_path: Path, workers: str) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    nobody, output = os.pipe()
    os.close(nobody)
    command = [sys.executable, "-m", "octoai", "serve", "--port", "0", "--workers", workers, "--data-dir", "data"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=subprocess.PIPE, text=True) as service:
        os.close(output)
        try:
            until(lambda: is_live(_credentials.read()), seconds=60)
            time.sleep(1)  # it says that it is ready a moment later
            assert service.poll() is None
        finally:
            service.terminate()
        _, said = service.communicate(timeout=30)
    assert service.returncode == 0, said
    assert "Traceback" not in said and "Exception" not in said


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_goes_on_and_ends_where_its_lines_are_not_read_any_more(tmp_path: Path, workers: str) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    reader, output = unread()
    command = [sys.executable, "-m", "octoai", "serve", "--port", "0", "--workers", workers, "--data-dir", "data"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output) as service:
        os.close(output)
        try:
            until(lambda: is_live(_credentials.read()), seconds=60)
            stored = _credentials.read()
            assert stored is not None
            for _ in range(24):  # each of which has a line in the log, in whichever process
                assert httpx.get(f"{stored.endpoint}/v1/models", timeout=10).status_code == 401
            service.terminate()
            assert service.wait(15) == 0
        finally:
            service.kill()
            os.close(reader)


def unread() -> tuple[int, int]:
    """A pipe that is full, since nobody reads it."""
    reader, output = os.pipe()
    os.set_blocking(output, False)
    with suppress(BlockingIOError):
        while True:
            os.write(output, b"x")
    os.set_blocking(output, True)
    return reader, output


@pytest.mark.parametrize("signalled", [False, True], ids=["by itself", "by a signal"])
def test_a_service_that_cannot_start_ends_where_nobody_reads_why(tmp_path: Path, signalled: bool) -> None:
    away = "database = 'postgresql://nobody@127.0.0.1:1/x'"
    (tmp_path / "octoai.toml").write_text(f"{away}\n{FAR}" if signalled else "prot = 1")
    reader, output = unread()
    command = [sys.executable, "-m", "octoai", "serve", "--port", "0", "--data-dir", "data"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output) as service:
        os.close(output)
        try:
            if signalled:
                time.sleep(4)
                service.terminate()
            assert service.wait(30) == (128 + signal.SIGTERM if signalled else 1)
        finally:
            service.kill()
            os.close(reader)


def is_live(stored: Credentials | None) -> bool:
    if stored is None:
        return False
    with suppress(httpx.TransportError):
        return httpx.get(f"{stored.endpoint}/health/live").status_code == 200
    return False


OTHERS = 'endpoint = "https://llm.example"\ntoken = "another service\'s"\n'


def test_the_credentials_of_another_service_stay(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "credentials.toml").write_text(OTHERS)
    service = Serve(tmp_path)
    try:
        token = printed_token(service)
        (kept,) = (line for line in service.lines if "stays as it is" in line)
        assert "for https://llm.example;" in kept
        assert f"set OCTOAI_BASE_URL={service.url}" in kept
        assert_works(service, token)
    finally:
        service.stop()
    assert (tmp_path / "config" / "credentials.toml").read_text() == OTHERS


def test_a_first_token_that_can_be_neither_stored_nor_printed_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(FAR)
    (tmp_path / "credentials.toml").write_text(OTHERS)
    command = [sys.executable, "-m", "octoai", "serve", "--port", "0", "--data-dir", "data"]
    environ = os.environ | {"OCTOAI_CONFIG_DIR": str(tmp_path)}
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=full, stderr=subprocess.PIPE, text=True) as service,
    ):
        _, said = service.communicate(timeout=60)
    assert service.returncode == 1
    (line,) = said.splitlines()
    assert "the first API token cannot be printed" in line
    with closing(connect(Place(tmp_path / "data"))) as db:
        assert tokens.is_empty(db)


def test_a_signal_while_the_database_is_waited_for_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text(f"database = 'postgresql://nobody@127.0.0.1:1/x'\n{FAR}")
    service = Serve(tmp_path, wait=False)
    until(lambda: "waiting for it" in service.log.read_text(), 60)
    assert service.stop() == 128 + signal.SIGTERM  # by its own will: as the first process of a container too
    assert service.log.read_text().splitlines()[1:] == ["octoai: stopped before it served"]


def test_a_signal_while_an_engine_is_waited_for_ends_the_start_without_a_word(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (tmp_path / "octoai.toml").write_text(FAR.replace(":9", f":{silent.getsockname()[1]}"))
        service = Serve(tmp_path, wait=False)
        silent.settimeout(60)
        with silent.accept()[0]:
            assert service.stop() == 0
    assert service.log.read_text() == ""
