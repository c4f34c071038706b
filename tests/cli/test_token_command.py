"""`octoai token …` and the outside of the `octoai` command, as processes, beside a service that runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octoai.cli import main
from octoai.cli.token import SCOPES
from octoai.server import tokens
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.tokens import is_well_formed
from tests.running import InProcess
from tests.talking import ask

# How long a service may take to see what another process has changed.
SEEN_SECONDS = 0.4


def octoai(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octoai", *arguments]
    encoding = environ.get("PYTHONIOENCODING")
    return subprocess.run(
        command,
        env={**os.environ, **environ},
        capture_output=True,
        encoding=encoding,
        text=True,
        timeout=30,
        check=False,
    )


def status_of(service: InProcess, token: str) -> int:
    return ask(service, "/v1/models", authorization=f"Bearer {token}")[0]


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
    (row,) = [line for line in listed.stdout.splitlines() if line.endswith("my laptop")]
    assert row.split()[1:6] == ["default", f"{token[:11]}…{token[-4:]}", "inference,usage", "all", "active"]
    token_id = row.split()[0]
    assert token_id in made.stderr

    revoked = octoai("token", "revoke", token_id, *place)
    time.sleep(SEEN_SECONDS)
    assert (revoked.returncode, status_of(service, token)) == (0, 401)
    (row,) = [line for line in octoai("token", "list", *place).stdout.splitlines() if line.endswith("my laptop")]
    assert "revoked" in row
    again = octoai("token", "revoke", token_id, *place)
    assert again.returncode == 1
    assert re.fullmatch(r"octoai: .*token list.*\n", again.stderr)
    assert status_of(service, service.token) == 200


Octoai = Callable[..., str]


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Octoai:
    """What a command prints, or the one line in which it says what is wrong."""

    def run(*arguments: str, status: int = 0) -> str:
        assert main([*arguments, "--data-dir", str(tmp_path / "data")]) == status
        said = capsys.readouterr()
        if status == 0:
            return said.out
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert said.err.startswith("octoai: ")
        return said.err

    return run


def listed(told: Octoai, *options: str) -> list[dict[str, Any]]:
    rows = json.loads(told("token", "list", "--json", *options))
    assert isinstance(rows, list)
    return rows


def test_a_token_is_made_as_asked_and_changed_as_asked(told: Octoai) -> None:
    told("account", "create", "acme")
    text = told(
        *("token", "create", "--name", "ci", "--account", "acme", "--scope", "usage", "--scope", "admin"),
        *("--model", "a", "--model", "b", "--expires", "30d", "--hard-budget", "2.5", "--requests-per-minute", "3"),
    )
    assert is_well_formed(text.strip())
    (row,) = listed(told)
    assert (row["account"], row["name"], row["scopes"], row["models"]) == ("acme", "ci", ["admin", "usage"], ["a", "b"])
    assert row["expires_at"] == pytest.approx(time.time() + 30 * 86400, abs=10)
    assert (row["hard_budget"], row["requests_per_minute"], row["soft_budget"]) == ("2.50", 3, None)
    changes = ("--model", "none", "--expires", "none", "--hard-budget", "none", "--name", "cd", "--scope", "inference")
    told("token", "update", row["id"], *changes)
    changed = {"models": None, "expires_at": None, "hard_budget": None, "name": "cd", "scopes": ["inference"]}
    assert listed(told) == [row | changed]
    told("token", "update", row["id"])
    told("token", "update", row["id"], "--expires", "2999-12-31T23:59:59Z")
    assert listed(told) == [row | changed | {"expires_at": 32503679999}]


def test_a_model_that_nobody_knows_is_allowed_and_said(
    told: Octoai, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "octoai.toml").write_text("[[models]]\nid = 'mine'\nengine_url = 'http://h'\naliases = ['ours']")
    config = ("--config", str(tmp_path / "octoai.toml"), "--data-dir", str(tmp_path / "data"))
    known = [word for name in ("mine", "OURS", "smollm2") for word in ("--model", name)]
    assert main(["token", "create", "--name", "x", *known, "--model", "smolm2", *config]) == 0
    said = capsys.readouterr()
    assert is_well_formed(said.out.strip())
    _, warning = said.err.splitlines()
    assert warning.startswith("octoai: --model: unknown model 'smolm2': the nearest are smollm2-135m-instruct, ")
    (row,) = listed(told)
    assert row["models"] == ["mine", "OURS", "smollm2", "smolm2"]
    assert main(["token", "update", row["id"], *known, *config]) == 0
    assert capsys.readouterr().err == ""
    assert main(["token", "update", row["id"], "--model", "mini", *config]) == 0
    assert "unknown model 'mini': the nearest are mi" in capsys.readouterr().err


def test_a_token_is_printed_before_all_else_that_there_is_to_say(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octoai", "token", "create", "--name", "x", "--model", "smolm2"]
    command += ["--data-dir", str(tmp_path)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=True)
    _, text, warning = ran.stdout.splitlines()
    assert is_well_formed(text)
    assert "smolm2" in warning


def test_tokens_are_listed_by_account_with_what_became_of_them(told: Octoai) -> None:
    for account in ("acme", "beta"):
        told("account", "create", account)
        told("token", "create", "--name", f"of {account}", "--account", account)
    told("account", "close", "beta")
    rows = {line.rsplit("of ")[-1]: line for line in told("token", "list").splitlines()[1:]}
    assert "active" in rows["acme"]
    assert "account closed" in rows["beta"]
    assert [row["name"] for row in listed(told, "--account", "acme")] == ["of acme"]


WRONG = [
    (("create", "--name", ""), "name"),
    (("create", "--name", "x", "--account", "nobody"), "nobody"),
    (("create", "--name", "x", "--model", ""), "models"),
    (("create", "--name", "x", "--expires", "2020-01-01"), "expires_at"),
    (("create", "--name", "x", "--expires", "0d"), "expires_at"),
    (("create", "--name", "x", "--expires", "soon"), "--expires"),
    (("create", "--name", "x", "--hard-budget", "much"), "--hard-budget"),
    (("list", "--account", "nobody"), "nobody"),
    (("update", "tok_1", "--name", "x"), "tok_1"),
    (("revoke", "tok_1"), "tok_1"),
    (("revoke", "\udcff"), "token list"),
]


def test_what_is_wrong_is_one_line(told: Octoai) -> None:
    for arguments, said in WRONG:
        assert said in told("token", *arguments, status=1), arguments
    assert listed(told) == []


def test_the_scopes_offered_are_those_there_are() -> None:
    assert SCOPES == tokens.SCOPES


def test_the_data_directory_may_come_from_the_environment(tmp_path: Path) -> None:
    made = octoai("token", "create", "--name", "x", OCTOAI_DATA_DIR=str(tmp_path / "there"))
    assert made.returncode == 0
    assert (tmp_path / "there" / "octoai.db").is_file()
    home = octoai("token", "create", "--name", "x", OCTOAI_DATA_DIR="~/there", HOME=str(tmp_path / "home"))
    assert home.returncode == 0
    assert (tmp_path / "home" / "there" / "octoai.db").is_file()


def test_what_the_terminal_cannot_show_is_shown_by_its_number(tmp_path: Path) -> None:
    place = {"OCTOAI_DATA_DIR": str(tmp_path), "PYTHONIOENCODING": "latin-1"}
    octoai("token", "create", "--name", "Łódź", **place)
    shown = octoai("token", "list", **place)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.rstrip().endswith("\\u0141ód\\u017a")


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
    "arguments",
    [
        *([], ["fly"], ["token"], ["token", "create"], ["serve", "--port", "x"], ["serve", "--nothing"]),
        ["token", "create", "--name", "x", "--scope", "root"],
    ],
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
for name in ("anyio", "httptools", "huggingface_hub", "orjson", "pip", "prometheus_client", "starlette",
             "tqdm", "uvicorn", "uvloop", "xllamacpp"):
    sys.modules[name] = None
from octoai.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments", [("serve",), ("pull", "smollm2"), ("--help",), ("token", "list"), ("models",), ("price", "list")]
)
def test_without_the_server_extra_a_command_works_or_says_what_to_install(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    environ = {**os.environ, "OCTOAI_DATA_DIR": str(tmp_path), "OCTOAI_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT, *arguments]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in ran.stderr
    if ran.returncode != 0:
        assert ran.returncode == 1
        assert "pip install 'octoai[server]>=1.12'" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config", "missing.toml"), "cannot read missing.toml"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--model", "missing.gguf"), "missing.gguf"),
        (("--port", "70000"), "octoai: --port: input should be less than or equal to 65535, not 70000"),
        (("--drain-seconds", "-1"), "octoai: --drain-seconds: input should be greater than or equal to 0, not -1"),
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
