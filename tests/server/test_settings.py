"""octoai.toml, the environment and the command line: what each may say, and who wins."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octoai.server import app
from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue
from octoai.server.engines.llama import cache_size
from octoai.server.engines.llama.options import LlamaOptions, LlamaTuning
from octoai.server.machine import places
from octoai.server.settings import BadSettings, Settings, load
from tests.server.headers import written


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home"), "OCTOAI_CONFIG_DIR": str(tmp_path / "config")}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "octoai.toml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(tmp_path: Path, text: str, environ: dict[str, str], **more: Any) -> str:
    path = write(tmp_path, text)
    with pytest.raises(BadSettings) as caught:
        load(path=path, environ=environ, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_said_is_the_embedded_model_standing_in(environ: dict[str, str], tmp_path: Path) -> None:
    settings = load(path=None, environ=environ)
    assert (settings.host, settings.port, settings.drain_seconds) == ("127.0.0.1", 8000, 30.0)
    assert [model.id for model in settings.models] == [EMBEDDED_MODEL_ID]
    assert settings.stand_in == EMBEDDED_MODEL_ID
    assert settings.data_dir == places.data_dir(environ) == tmp_path / "home/.local/share/octoai"
    assert settings.cache_dir == places.cache_dir(environ)


def test_every_key_may_be_said_in_the_file(environ: dict[str, str], tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        host = "0.0.0.0"
        port = 9000
        data_dir = "data"
        cache_dir = "/cache"
        drain_seconds = 1.5
        engine_stall_seconds = 2
        max_waiting = 3
        log_level = "debug"
        stand_in = "OWN"
        [[models]]
        id = "acme"
        aliases = ["own"]
        engine_url = "http://127.0.0.1:8001/v1"
        upstream_model = "Acme/Acme-7B"
        engine_key_env = "ACME_KEY"
        dialect = "vllm"
        context_length = 4096
        num_slots = 8
        num_threads = 2
        licence = "mit"
        input_price = "0.15"
        cached_input_price = "0.05"
        output_price = "0.20"
        [[models]]
        id = "smollm2"
        [[models]]
        id = "file"
        path = "weights.gguf"
        sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
        [[models]]
        id = "hub"
        engine_url = "unix:/run/engine.sock"
        [[models]]
        id = "pulled"
        source = { kind = "hf", repo = "acme/model", filename = "m.gguf" }
        """,
    )
    settings = load(path=path, environ={**environ, "ACME_KEY": "k"})
    assert settings.port == 9000
    assert (settings.data_dir, settings.cache_dir) == (tmp_path / "data", Path("/cache"))
    assert settings.stand_in == "OWN"
    assert [model.id for model in settings.models] == ["acme", EMBEDDED_MODEL_ID, "file", "hub", "pulled"]
    assert settings.models[2].path == tmp_path / "weights.gguf"
    catalogue = Catalogue.load()
    described = settings.models[0].described(catalogue)
    assert (described.input_price_nanos, described.cached_input_price_nanos, described.output_price_nanos) == (
        150,
        50,
        200,
    )
    assert described.names == ("acme", "own")


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("prot = 1", "prot", "port"),
        ("dataDir = 'x'", "dataDir", "data_dir"),
        ("drain_second = 1", "drain_second", "drain_seconds"),
        ("[model]\nid = 'x'", "model", "models"),
        ("[[models]]\nid = 'smollm2'\nalias = ['x']", "models.0.alias", "aliases"),
        (
            "[[models]]\nid = 'smollm2'\n[[models]]\nid = 'x'\nengineurl = 'http://x'",
            "models.1.engineurl",
            "engine_url",
        ),
        ("zzz = 1", "zzz", ""),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    environ: dict[str, str], tmp_path: Path, text: str, key: str, nearest: str
) -> None:
    said = complaint(tmp_path, text, environ)
    assert f"unknown key '{key}'" in said
    assert f"'{nearest}" in said
    assert "octoai.toml" in said


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("port = 'high'", "port"),
        ("port = 65536", "port"),
        ("port = -1", "port"),
        ("port = 1.5", "port"),
        ("port = true", "port"),
        ("max_waiting = false", "max_waiting"),
        ("drain_seconds = true", "drain_seconds"),
        ("drain_seconds = nan", "drain_seconds"),
        ("drain_seconds = inf", "drain_seconds"),
        ("drain_seconds = -1", "drain_seconds"),
        ("engine_stall_seconds = 0", "engine_stall_seconds"),
        ("host = 5", "host"),
        ("host = ['a']", "host"),
        ("log_level = 'loud'", "log_level"),
        ("data_dir = 5", "data_dir"),
        ("stand_in = 'nobody'", "stand_in"),
        ("stand_in = true", "stand_in"),
        ("models = []", "models"),
        ("models = 'x'", "models"),
        ("models = [1]", "models.0"),
        ("[models]\nid = 'x'", "models"),
        ("[[models]]\naliases = []", "models.0.id"),
        ("[[models]]\nid = ''", "models.0.id"),
        ("[[models]]\nid = 5", "models.0.id"),
        ("[[models]]\nid = 'x y'\nengine_url = 'http://x/v1'", "id"),
        ("[[models]]\nid = 'x'\nengine_url = 'ftp://x'", "models.0.engine_url"),
        ("[[models]]\nid = 'x'\nengine_url = 'http://x'\ndialect = 'klingon'", "models.0.dialect"),
        ("[[models]]\nid = 'x'\nengine_url = 'http://x'\nnum_slots = 0", "models.0.num_slots"),
        ("[[models]]\nid = 'x'\nengine_url = 'http://x'\naliases = 'y'", "models.0.aliases"),
        ("[[models]]\nid = 'x'\nengine_url = 'http://x'\ninput_price = 'free'", "price"),
        ("[[models]]\nid = 'x'\nengine_url = 'http://x'\npath = 'y.gguf'", "engine_url"),
        ("[[models]]\nid = 'smollm2'\ndialect = 'vllm'", "dialect"),
        ("[[models]]\nid = 'smollm2'\nengine_key_env = 'K'", "engine_key_env"),
        ("[[models]]\nid = 'smollm2'\nupstream_model = 'x'", "upstream_model"),
        ("[[models]]\nid = 'x'\nsource = { kind = 'torrent' }", "source"),
        ("[[models]]\nid = 'no-such-model'", "no-such-model"),
        ("[[models]]\nid = 'meta-llama-3-8b-instruct'", "meta-llama-3-8b-instruct"),
        ("[[models]]\nid = 'a'\nengine_url = 'http://x'\n[[models]]\nid = 'a'\nengine_url = 'http://y'", "a"),
        (
            "[[models]]\nid = 'a'\nengine_url = 'http://x'\n[[models]]\nid = 'b'\naliases = ['A']\nengine_url = 'http://y'",
            "A",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(
    environ: dict[str, str], tmp_path: Path, text: str, key: str
) -> None:
    assert key in complaint(tmp_path, text, environ)


@pytest.mark.parametrize("content", [b"port = ", b"port = 1\nport = 2", b"\xff\xfe", b"[[models]\n"])
def test_what_is_not_toml_is_said(environ: dict[str, str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "octoai.toml"
    path.write_bytes(content)
    with pytest.raises(BadSettings, match="not valid TOML"):
        load(path=path, environ=environ)


def test_a_file_that_was_named_must_be_there(environ: dict[str, str], tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(BadSettings, match="cannot read"):
            load(path=path, environ=environ)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    environ: dict[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path, "port = 1\nhost = 'file'\nmax_waiting = 1\n")
    environ |= {"OCTOAI_PORT": "2", "OCTOAI_HOST": "env", "OCTOAI_DRAIN_SECONDS": "2.5"}
    settings = load(path=path, environ=environ, overrides={"port": 3, "host": None})
    assert (settings.port, settings.host, settings.max_waiting, settings.drain_seconds) == (3, "env", 1, 2.5)


def test_an_empty_variable_says_nothing_and_a_wrong_one_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    assert load(path=None, environ={**environ, "OCTOAI_PORT": ""}).port == 8000
    with pytest.raises(BadSettings, match=r"^OCTOAI_PORT: "):
        load(path=None, environ={**environ, "OCTOAI_PORT": "high"})
    for path in (None, write(tmp_path, "workers = 2")):
        with pytest.raises(BadSettings, match=r"^--workers: .* not 'many'$"):
            load(path=path, environ={**environ, "OCTOAI_WORKERS": "3"}, overrides={"workers": "many"})
    with pytest.raises(BadSettings, match=r"^OCTOAI_DATABASE: expected postgresql://user@host/name$"):
        load(path=None, environ={**environ, "OCTOAI_DATABASE": "mysql://user:secret@host/name"})


def test_variables_of_the_sdk_are_no_settings(environ: dict[str, str]) -> None:
    assert load(path=None, environ={**environ, "OCTOAI_TOKEN": "x", "OCTOAI_BASE_URL": "y"}).port == 8000


@pytest.mark.parametrize("chosen", ["~/d", "/d", "d"])
def test_the_service_keeps_its_data_where_the_other_commands_look_for_it(environ: dict[str, str], chosen: str) -> None:
    environ |= {"OCTOAI_DATA_DIR": chosen, "OCTOAI_CACHE_DIR": chosen}
    settings = load(path=None, environ=environ)
    assert settings.data_dir == places.data_dir(environ)
    assert settings.cache_dir == places.cache_dir(environ)


def test_a_file_is_found_here_and_then_in_the_configuration_directory(environ: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    (config / "octoai.toml").write_text("port = 1")
    assert load(path=None, environ=environ).port == 1
    write(tmp_path, "port = 2")
    assert load(path=None, environ=environ).port == 2


_WHERE_NOBODY_MAY_ENTER = """
import ctypes, os, sys
if sys.platform == "linux":
    for capability in (1, 2):  # by which root enters everywhere; they are gone with the next program
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.chmod(".", 0)
load = "import os; from octoai.server.settings import load; print(load(path=None, environ=os.environ).port)"
os.execv(sys.executable, [sys.executable, "-P", "-c", load])
"""


def test_where_we_may_not_enter_is_no_file(environ: dict[str, str], tmp_path: Path) -> None:
    closed, config = tmp_path / "closed", tmp_path / "config"
    closed.mkdir()
    config.mkdir()
    (config / "octoai.toml").write_text("port = 1")
    command = [sys.executable, "-c", _WHERE_NOBODY_MAY_ENTER]
    said = os.environ | environ
    ran = subprocess.run(command, cwd=closed, env=said, capture_output=True, text=True, timeout=60, check=False)
    closed.chmod(0o700)
    assert (ran.stderr, ran.stdout) == ("", "1\n")


def test_models_of_the_command_line_replace_those_of_the_file(environ: dict[str, str], tmp_path: Path) -> None:
    weights = tmp_path / "Mine.GGUF"
    weights.touch()
    path = write(tmp_path, "[[models]]\nid = 'x'\nengine_url = 'http://x/v1'\n")
    settings = load(path=path, environ=environ, models=[str(weights), "smollm2"])
    assert [(model.id, model.path) for model in settings.models] == [("mine", weights), (EMBEDDED_MODEL_ID, None)]
    with pytest.raises(BadSettings, match="there is no file"):
        load(path=None, environ=environ, models=["missing.gguf"])
    with pytest.raises(BadSettings, match="smollm2-135m-instruct"):
        load(path=None, environ=environ, models=["smollm3"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-3.2_1B.Q4", "llama-3.2_1b.q4"),
        ("my model", "my-model"),
        ("llama (1)", "llama-1"),
        ("modèle a+b", "mod-le-a-b"),
        ("_tiny", "tiny"),
        ("模型", "model"),
        ("x" * 210, "x" * 128),
    ],
)
def test_any_name_of_a_file_makes_an_id(environ: dict[str, str], tmp_path: Path, name: str, expected: str) -> None:
    weights = tmp_path / f"{name}.gguf"
    weights.touch()
    (model,) = load(path=None, environ=environ, models=[str(weights)]).models
    assert (model.id, model.path) == (expected, weights)


def test_only_a_configuration_that_says_so_has_a_stand_in(environ: dict[str, str], tmp_path: Path) -> None:
    own = "[[models]]\nid = 'x'\naliases = ['y']\nengine_url = 'http://x/v1'\n"
    assert load(path=write(tmp_path, own), environ=environ).stand_in == ""
    assert load(path=write(tmp_path, "stand_in = 'y'\n" + own), environ=environ).stand_in == "y"
    assert load(path=write(tmp_path, "port = 1"), environ=environ).stand_in == EMBEDDED_MODEL_ID
    assert load(path=write(tmp_path, "stand_in = ''"), environ=environ).stand_in == ""
    assert load(path=None, environ=environ | {"OCTOAI_STAND_IN": ""}).stand_in == ""
    assert load(path=None, environ=environ | {"OCTOAI_LOG_LEVEL": ""}).log_level == "info"  # of others it says nothing


def test_settings_are_frozen(environ: dict[str, str]) -> None:
    settings = load(path=None, environ=environ)
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert isinstance(settings, Settings)


def test_a_home_that_nobody_has_is_a_name_like_any(environ: dict[str, str], tmp_path: Path) -> None:
    text = "data_dir = '~nobody-of-that-name/y'\n[[models]]\nid = 'x'\npath = '~nobody-of-that-name/z'"
    settings = load(path=write(tmp_path, text), environ=environ)
    assert settings.data_dir == tmp_path / "~nobody-of-that-name/y"
    assert settings.models[0].path == tmp_path / "~nobody-of-that-name/z"


@pytest.mark.parametrize("cached", ["", "cached_input_price = '1'"])
@pytest.mark.parametrize("price", ["input_price", "output_price"])
def test_half_a_price_is_refused(environ: dict[str, str], tmp_path: Path, price: str, cached: str) -> None:
    text = f"[[models]]\nid = 'x'\nengine_url = 'http://h'\n{price} = '5'\n{cached}"
    assert "give input_price and output_price" in complaint(tmp_path, text, environ)


FOUND = LlamaOptions(context_length=0, num_slots=8, num_threads=3, tuning=LlamaTuning(num_batch_threads=4))


@pytest.mark.parametrize(
    ("said", "num_batch_threads", "expected"),
    [("", 4, (3, 4)), ("num_threads = 2", 4, (2, 2)), ("num_threads = 6", 4, (6, 4)), ("num_threads = 2", 0, (2, 0))],
)
def test_threads_of_the_configuration_go_before_those_of_a_profile(
    environ: dict[str, str], tmp_path: Path, said: str, num_batch_threads: int, expected: tuple[int, int]
) -> None:
    """Those that read prompts too."""
    path = write(tmp_path, f"[[models]]\nid = '{EMBEDDED_MODEL_ID}'\n{said}")
    settings = load(path=path, environ=environ)
    (chosen,) = settings.models
    found = replace(FOUND, tuning=replace(FOUND.tuning, num_batch_threads=num_batch_threads))
    used = app.options(settings, chosen, app.catalogue(settings)[chosen.id], tmp_path / "x.gguf", found)
    assert (used.num_threads, used.tuning.num_batch_threads) == expected


@pytest.mark.parametrize(("cache_type", "num_slots"), [("f16", 8), ("f32", 4)])
def test_slots_of_a_profile_are_counted_with_the_caches_it_has(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_type: str, num_slots: int
) -> None:
    monkeypatch.setattr(cache_size, "memory_bytes", lambda: 16 * 2**30)
    weights = written(tmp_path / "x.gguf")  # 1 GiB a slot in F16
    text = "[[models]]\nid = 'x'\npath = 'x.gguf'\ncontext_length = 8192"
    settings = load(path=write(tmp_path, text), environ=environ)
    (chosen,) = settings.models
    found = replace(FOUND, tuning=replace(FOUND.tuning, cache_type=cache_type))
    used = app.options(settings, chosen, app.catalogue(settings)["x"], weights, found)
    assert used.num_slots == num_slots


@pytest.mark.parametrize(
    ("said", "nanos"), [("", 7000), ("cached_input_price = '1'", 1000), ("cached_input_price = '0'", 0)]
)
def test_a_cached_token_of_a_shipped_model_costs_what_is_said_or_what_any_other_does(
    environ: dict[str, str], tmp_path: Path, said: str, nanos: int
) -> None:
    path = write(tmp_path, f"[[models]]\nid = 'smollm2'\ninput_price = '7'\noutput_price = '8'\n{said}")
    model = load(path=path, environ=environ).models[0].described(Catalogue.load())
    prices = (model.input_price_nanos, model.cached_input_price_nanos, model.output_price_nanos)
    assert prices == (7000, nanos, 8000)


def test_only_what_is_said_of_a_shipped_models_price_changes(environ: dict[str, str], tmp_path: Path) -> None:
    shipped = Catalogue.load()
    known = shipped[EMBEDDED_MODEL_ID]
    for key in ("cached_input_price", "output_price"):
        path = write(tmp_path, f"[[models]]\nid = 'smollm2'\n{key} = '7'")
        changed = replace(known, **{f"{key}_nanos": 7000})
        assert load(path=path, environ=environ).models[0].described(shipped) == changed
