"""Documents that cannot rot: the README's programs are the examples; its and the guides' run."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from octoai import _credentials
from octoai.cli import account, ledger, price, token
from octoai.server.settings import ModelSettings, Settings
from tests.running import Serve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDES, re.S)


def test_the_samples_are_the_examples() -> None:
    programs = blocks("python")
    assert programs[0] == (ROOT / "examples/chat.py").read_text()
    assert programs[1] == (ROOT / "examples/chat_stream.py").read_text()


@pytest.mark.model
@pytest.mark.parametrize("number", range(2, len(blocks("python"))))
def test_the_other_programs_run(served: Serve, number: int) -> None:
    """With what the README has the shell export, from where the service really left it."""
    (exports,) = [block for block in blocks("sh") if "export " in block]
    exports = exports.replace("~/.config/octoai", shlex.quote(str(served.config_dir)))
    ran = subprocess.run(
        ["sh", "-c", f'{exports}exec "$@"', "sh", sys.executable, "-c", blocks("python")[number]],
        env=served.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def demo(place: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command, said = [sys.executable, str(ROOT / "examples/demo.py")], os.environ | environ
    return subprocess.run(command, cwd=place, env=said, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.model
def test_the_demo_runs_whatever_is_said_of_another_service(embedded_model: Path, tmp_path: Path) -> None:
    ran = demo(tmp_path, OCTOAI_WORKERS="2", OCTOAI_API_BASE="http://127.0.0.1:9")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(" completion tokens, ") == 2


@pytest.mark.model
def test_a_demo_that_fails_says_why(embedded_model: Path, tmp_path: Path) -> None:
    (tmp_path / "octoai.toml").write_text("workers = 2\n")
    ran = demo(tmp_path)
    assert ran.returncode == 1
    assert "the service did not start (exit status 1)" in ran.stderr
    assert "octoai: workers" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_commands_about_accounts_run(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks("sh") if "octoai account create" in block]
    for line in shown.strip().splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "octoai"
        ran = subprocess.run(
            [sys.executable, "-m", *command, "--data-dir", str(tmp_path)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ran.returncode, ran.stderr.count("\n") <= 1) == (0, True), (line, ran.stderr)


def test_every_setting_is_in_the_table() -> None:
    for key in Settings.model_fields:
        assert f"`{key}`" in GUIDES or key == "models"
    for key in ModelSettings.model_fields:
        assert re.search(rf"^{key} = |\b{key} = \{{|`{key}`", GUIDES, re.M), key


def test_every_variable_of_the_environment_is_named() -> None:
    places = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")
    for name in (*_credentials.TOKEN_VARIABLES, *_credentials.ENDPOINT_VARIABLES, *places):
        assert f"`{name}`" in GUIDES


@pytest.mark.parametrize("module", [account, ledger, price, token])
def test_every_action_of_a_command_is_in_the_table(module: ModuleType) -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    module.add_parsers(commands)
    ((command, parser),) = commands.choices.items()
    (actions,) = [each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `octoai {command} ")]
    assert {action for action in actions if not re.search(rf"\b{action}\b", row)} == set()


def test_the_configuration_shown_is_one_that_can_be_read() -> None:
    shown = [model for block in blocks("toml") for model in tomllib.loads(block)["models"]]
    assert len(shown) >= 3
    for model in shown:
        ModelSettings.model_validate(model)


def test_every_module_is_on_the_page_of_the_architecture() -> None:
    """By its name, but for those that stand there together: tables, commands, and what is kept for old code."""
    page, package = (ROOT / "ARCHITECTURE.md").read_text(), ROOT / "src" / "octoai"
    together = {package / name for name in ("cli", "core", "text_gen", "wire", "server/api/admin")}
    modules = [path for path in package.rglob("*.py") if together.isdisjoint(path.parents)]
    schema = (package / "server/store/schema.py").read_text()
    tables = set(re.findall(r"CREATE TABLE (\w+)", schema))
    missing = {path.stem for path in modules if not re.search(rf"\b{path.stem}\b", page)}
    assert missing - tables - {"__init__", "__main__", "base"} == set()


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)
