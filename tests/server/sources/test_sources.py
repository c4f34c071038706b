"""The store with files and without a network; `test_sources_pypi` and `test_sources_hub` have the others."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from octoai.server.catalogue import (
    EMBEDDED_MODEL_ID,
    Catalogue,
    FileSource,
    HfSource,
    Model,
    PypiSource,
    WheelPart,
)
from octoai.server.sources import PullFailed, WeightStore
from octoai.server.sources import store as store_module


def test_a_file_is_used_where_it_lies(tmp_path: Path) -> None:
    weights = tmp_path / "m.gguf"
    weights.write_bytes(b"GGUF")
    sha256 = hashlib.sha256(b"GGUF").hexdigest()
    model = Model("m", source=FileSource("file", weights), sha256=sha256)
    store = WeightStore(tmp_path / "cache")
    assert store.path(model) == store.pull(model) == weights
    assert not (tmp_path / "cache").exists()


def test_a_changed_file_is_refused_and_kept(tmp_path: Path) -> None:
    weights = tmp_path / "m.gguf"
    weights.write_bytes(b"GGUF")
    model = Model("m", source=FileSource("file", weights), sha256="0" * 64)
    with pytest.raises(PullFailed, match="not the expected ones"):
        WeightStore(tmp_path).pull(model)
    assert weights.exists()


def test_a_file_is_verified_before_it_is_used_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, digest, read = tmp_path / "m.gguf", hashlib.file_digest, list[str]()
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    weights.write_bytes(b"GGUF")
    model = Model("m", source=FileSource("file", weights), sha256=hashlib.sha256(b"GGUF").hexdigest())
    for _ in range(3):
        assert WeightStore(tmp_path / "cache").verified(model) == weights
    assert read == [str(weights)]
    weights.write_bytes(b"GGUG")
    for _ in range(2):
        with pytest.raises(PullFailed, match="not the expected ones"):
            WeightStore(tmp_path / "cache").verified(model)
    assert len(read) == 3


def test_where_nothing_can_be_kept_a_file_is_verified_every_time(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "cache").touch()
    model = Model("m", source=FileSource("file", tmp_path / "m.gguf"), sha256=hashlib.sha256(b"GGUF").hexdigest())
    for _ in range(2):
        assert WeightStore(tmp_path / "cache").verified(model) == tmp_path / "m.gguf"
    (tmp_path / "m.gguf").write_bytes(b"GGUG")
    with pytest.raises(PullFailed, match="not the expected ones"):
        WeightStore(tmp_path / "cache").verified(model)


def test_before_a_large_file_is_read_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    model = Model("m", source=FileSource("file", tmp_path / "m.gguf"), sha256=hashlib.sha256(b"GGUF").hexdigest())
    told, digest = list[str](), hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: told.append("read") or digest(file, kind))
    WeightStore(tmp_path / "small").verified(model, told.append)
    assert told == ["read"]
    monkeypatch.setattr(store_module, "LONG_BYTES", 3)
    for _ in range(2):
        WeightStore(tmp_path / "large").verified(model, told.append)
    assert told[1:] == [f"reading {tmp_path / 'm.gguf'} (0.0 GB) to verify its SHA-256", "read"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    model = Model("m", source=FileSource("file", tmp_path / "none.gguf"))
    store = WeightStore(tmp_path)
    assert store.path(model) is None
    with pytest.raises(PullFailed, match=r"not at .*none\.gguf: correct its `path`"):
        store.pull(model)


def test_a_model_without_a_source_is_refused(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    assert store.path(Model("m")) is None
    with pytest.raises(PullFailed, match=r"no source of weights is known for 'm'"):
        store.pull(Model("m"))


def test_a_full_disk_is_noticed_before_anything_is_fetched(tmp_path: Path) -> None:
    part = WheelPart("octoai-no-such-wheel==1", "0" * 64, "m")
    model = Model("m", source=PypiSource("pypi", (part,)), size_bytes=10**18)
    with pytest.raises(PullFailed, match=r"not enough disk space .* 2,000,000,000,0.. MB needed"):
        WeightStore(tmp_path).pull(model)
    assert not list((tmp_path / "partial").iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = Model("m", source=HfSource("hf", "a/b", "m.gguf"))
    with pytest.raises(PullFailed, match=r"cannot keep weights in .*: Not a directory"):
        WeightStore(tmp_path / "file" / "cache").pull(model)


def test_the_same_id_with_another_source_is_another_file(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    one, two = (Model("a/M", source=HfSource("hf", repo, "m.gguf")) for repo in ("a/b", "a/c"))
    (tmp_path / "models").mkdir()
    identity = hashlib.sha256(repr(one.source).encode()).hexdigest()[:12]
    (tmp_path / "models" / f"a-m-{identity}.gguf").touch()
    assert store.path(one) is not None
    assert store.path(two) is None


def test_heavy_libraries_are_not_imported_until_a_source_needs_them() -> None:
    program = "import octoai.server.sources, sys; print(*{'huggingface_hub', 'pip', 'tqdm'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.model
def test_the_embedded_model_comes_from_the_package_index(embedded_model: Path) -> None:
    model = Catalogue.load()[EMBEDDED_MODEL_ID]
    content = embedded_model.read_bytes()
    assert content[:4] == b"GGUF"
    assert len(content) == model.size_bytes
    assert hashlib.sha256(content).hexdigest() == model.sha256
