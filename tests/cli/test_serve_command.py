"""What `octoai serve` says when it cannot: one line, and a status of 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def serve(place: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "octoai", "serve", "--port", "0", *arguments]
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60, check=False)
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
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "octoai.toml").write_text(text)
    status, line = serve(tmp_path)
    assert status == 1
    assert line.startswith("octoai: ")
    assert words in line


def test_a_configuration_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    status, line = serve(tmp_path, "--config", "missing.toml")
    assert status == 1
    assert "missing.toml" in line
