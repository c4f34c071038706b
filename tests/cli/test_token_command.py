"""`octoai token …` and the outside of the `octoai` command, as processes, beside a service that runs."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octoai.cli import main
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.tokens import is_well_formed
from tests.running import InProcess


def octoai(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octoai", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=30, check=False
    )


def status_of(service: InProcess, token: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=5)
    try:
        connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {token}"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_tokens_are_made_listed_and_revoked_while_the_service_runs(
    in_process: Callable[..., InProcess], tmp_path: Path
) -> None:
    service = in_process(ScriptedEngine())
    place = ("--data-dir", str(tmp_path / "data0"))

    made = octoai("token", "create", "--name", "my laptop", *place)
    assert made.returncode == 0, made.stderr
    token = made.stdout.splitlines()[-1]
    assert is_well_formed(token)
    assert made.stdout.count(token) == 1
    assert token not in made.stderr
    assert status_of(service, token) == 200

    listed = octoai("token", "list", *place)
    assert listed.returncode == 0
    assert token not in listed.stdout
    assert token[7:39] not in listed.stdout
    (row,) = [line for line in listed.stdout.splitlines() if "my laptop" in line]
    assert "active" in row
    token_id = row.split()[0]
    assert token_id in made.stderr

    revoked = octoai("token", "revoke", token_id, *place)
    assert (revoked.returncode, status_of(service, token)) == (0, 401)
    assert "revoked" in octoai("token", "list", *place).stdout.split("my laptop")[0].splitlines()[-1]
    again = octoai("token", "revoke", token_id, *place)
    assert again.returncode == 1
    assert re.fullmatch(r"octoai: .*token list.*\n", again.stderr)
    assert status_of(service, service.token) == 200


def test_the_data_directory_may_come_from_the_environment(tmp_path: Path) -> None:
    made = octoai("token", "create", "--name", "x", OCTOAI_DATA_DIR=str(tmp_path / "there"))
    assert made.returncode == 0
    assert (tmp_path / "there" / "octoai.db").is_file()
    home = octoai("token", "create", "--name", "x", OCTOAI_DATA_DIR="~/there", HOME=str(tmp_path / "home"))
    assert home.returncode == 0
    assert (tmp_path / "home" / "there" / "octoai.db").is_file()


@pytest.mark.parametrize("action", [("create", "--name", "x"), ("list",), ("revoke", "tok_1")])
def test_a_data_directory_that_cannot_be_used_is_one_line(
    action: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["token", *action, "--data-dir", str(tmp_path / "file")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"octoai: cannot use the database .*\n", said.err)


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["token", "--help"], ["token", "create", "-h"]])
def test_help_is_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "usage: octoai" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["token"], ["token", "create"], ["serve", "--port", "x"], ["serve", "--nothing"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: octoai" in capsys.readouterr().err


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"octoai \d+\.\d+.*\n", capsys.readouterr().out)


WITHOUT = """
import sys
for name in ("aiohttp", "anyio", "httptools", "huggingface_hub", "orjson", "pip", "prometheus_client", "starlette",
             "tqdm", "uvicorn", "uvloop", "xllamacpp"):
    sys.modules[name] = None
from octoai.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("arguments", [("serve",), ("pull", "smollm2"), ("--help",), ("token", "list"), ("models",)])
def test_without_the_server_extra_a_command_works_or_says_what_to_install(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    environ = {**os.environ, "OCTOAI_DATA_DIR": str(tmp_path), "OCTOAI_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT, *arguments]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in ran.stderr
    if ran.returncode != 0:
        assert ran.returncode == 1
        assert "octoai[server]" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config", "missing.toml"), "cannot read missing.toml"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--model", "missing.gguf"), "missing.gguf"),
        (("--port", "70000"), "port"),
        (("--drain-seconds", "-1"), "drain_seconds"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", "--data-dir", str(tmp_path), *arguments]) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("octoai: ")
    assert said in output.err
    assert output.out == ""


def test_a_typing_error_in_the_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "octoai.toml").write_text("prot = 8000\n")
    assert main(["serve", "--config", str(tmp_path / "octoai.toml")]) == 1
    assert "unknown key 'prot'; the nearest known one is 'port'" in capsys.readouterr().err
