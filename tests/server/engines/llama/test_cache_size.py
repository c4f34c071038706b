"""How many slots a model gets without a profile."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octoai.server.engines.llama import cache_size
from octoai.server.engines.llama.cache_size import cache_bytes_per_token, num_slots, slots_that_fit
from tests.server.headers import written


@pytest.mark.parametrize(
    ("groups", "head", "expected"),
    [
        (8, None, 32 * 8 * (128 + 128) * 2),  # 128 KiB, as Llama 3 8B has it
        (None, None, 32 * 32 * (128 + 128) * 2),  # every head has keys of its own
        (8, 64, 32 * 8 * (64 + 64) * 2),
        ([8] * 32, None, None),  # layer by layer
    ],
)
def test_of_a_file(tmp_path: Path, groups: int | list[int] | None, head: int | None, expected: int | None) -> None:
    assert cache_bytes_per_token(written(tmp_path / "x.gguf", groups=groups, head=head)) == expected


@pytest.mark.model
def test_of_the_shipped_model(embedded_model: Path) -> None:
    assert cache_bytes_per_token(embedded_model) == 30 * 3 * (64 + 64) * 2


def test_what_is_no_model_gets_few_slots(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert num_slots(tmp_path / "x.gguf", 8192) == 4
    (tmp_path / "x.gguf").write_bytes(b"no model")
    assert num_slots(tmp_path / "x.gguf", 8192) == 4
    assert num_slots(tmp_path / "missing.gguf", 8192) == 4


@pytest.mark.parametrize(("gibibytes", "expected"), [(64, 8), (63.9, 4), (8, 4)])
def test_many_slots_take_an_eighth_of_the_memory_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gibibytes: float, expected: int
) -> None:
    monkeypatch.setattr(cache_size, "memory_bytes", lambda: int(gibibytes * 2**30))
    assert num_slots(written(tmp_path / "x.gguf"), 8192) == expected  # of 1 GiB each


@pytest.mark.parametrize(
    ("gibibytes", "cache_type", "expected"),
    [
        (16, "f16", 8),
        (15.9, "f16", 4),
        (1, "f16", 4),
        (0, "f16", 4),
        (32, "f32", 8),
        (31.9, "f32", 4),
        (8.5, "q8_0", 8),
        (8.4, "q8_0", 4),
    ],
)
def test_slots_that_were_found_to_be_fast_are_fewer_where_half_of_the_memory_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gibibytes: float, cache_type: str, expected: int
) -> None:
    """A profile may be of a shorter context."""
    monkeypatch.setattr(cache_size, "memory_bytes", lambda: int(gibibytes * 2**30))
    path = written(tmp_path / "x.gguf")
    assert slots_that_fit(path, 8192, 8, cache_type) == expected  # of 1 GiB each in F16
    assert slots_that_fit(path, 8192, 2, cache_type) == 2
    assert slots_that_fit(tmp_path / "missing.gguf", 8192, 8, cache_type) == 8


@pytest.mark.parametrize(
    ("limit", "none"), [("memory.max", "max"), ("memory/memory.limit_in_bytes", str(2**63 - 4096))]
)
def test_a_container_may_have_less_memory_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, none: str
) -> None:
    """As both versions of cgroups say it."""
    whole = cache_size.memory_bytes()
    monkeypatch.setattr(cache_size, "_CGROUP", tmp_path)
    assert cache_size.memory_bytes() >= whole
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text(f"{none}\n")
    assert cache_size.memory_bytes() >= whole
    (tmp_path / limit).write_text("1048576\n")
    assert cache_size.memory_bytes() == 1048576


@pytest.mark.parametrize("item", [0, 8, 9, 12])  # u8, string, array, f64
def test_an_array_of_more_than_there_can_be_is_damage(tmp_path: Path, item: int) -> None:
    key = b"llama.numbers"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key
    (tmp_path / "x.gguf").write_bytes(head + struct.pack("<IIQ", 9, item, 2**64 - 1))
    assert num_slots(tmp_path / "x.gguf", 8192) == 4


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_one_of_which_nothing_is_known(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.gguf"
    whole = bytearray((path if path.exists() else written(path)).read_bytes()[:600])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(0, len(whole))) :]
    (tmp_path / "y.gguf").write_bytes(whole)
    found = cache_bytes_per_token(tmp_path / "y.gguf")
    assert found is None or found > 0
