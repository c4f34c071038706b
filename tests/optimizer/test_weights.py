"""Weights made over into other formats. What we write is read by another library: `gguf`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from octoai.optimizer.affine import as_q8_0
from octoai.optimizer.ggml import converted, formats
from octoai.optimizer.weights import UNCHANGED, Recipe, UnusableWeights, num_bytes, recipes, requantize

Q8_0 = Recipe("Q8_0", (("*", "Q8_0"),))
MATRICES = {
    "token_embd.weight": (96, 256),
    "blk.0.attn_q.weight": (256, 96),
    "blk.0.ffn_down.weight": (96, 512),
    "output.weight": (96, 256),
}
MAX_ERRORS = {"Q8_0": 0.01, "Q4_0": 0.12, "Q4_1": 0.11, "Q5_0": 0.06, "Q5_1": 0.06, "IQ4_NL": 0.11, "Q4_K": 0.11}
"""Root mean square error as a share of normally distributed weights."""


def model(path: Path, *, kind: str = "F16", extra: Callable[[GGUFWriter], None] | None = None, **options: Any) -> Path:
    """A small made-up model, with a tokenizer's arrays and a chat template."""
    writer = GGUFWriter(path, "llama", **options)
    writer.add_file_type(1)
    writer.add_string("tokenizer.chat_template", "{{ 'Grüße' }}\n")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "\u2581b", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 1e-7, 3.0])
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    random = np.random.default_rng(3)
    for name, shape in MATRICES.items():
        data = random.standard_normal(shape, np.float32)
        to = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(data, to), raw_dtype=to)
    writer.add_tensor("blk.0.attn_norm.weight", random.standard_normal(256, np.float32))
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path: Path) -> dict[str, Any]:
    return {each.name: each for each in GGUFReader(path).tensors}


def floats(tensor: Any) -> npt.NDArray[np.float32]:
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def metadata(path: Path) -> dict[str, bytes]:
    """Every value as its bytes in the file."""
    fields = GGUFReader(path).fields
    return {
        name: b"".join(bytes(part) for part in field.parts)
        for name, field in fields.items()
        if not name.startswith("GGUF.")
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "given.gguf")


@pytest.mark.parametrize("name", MAX_ERRORS)
def test_weights_stay_what_they_were_but_for_the_rounding_of_the_format(
    source: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "made.gguf"
    requantize(source, target, Recipe(name, (("*", name),)))
    before, after = tensors(source), tensors(target)
    assert list(after) == list(before)
    for each, tensor in after.items():
        assert tensor.shape.tolist() == before[each].shape.tolist()
        fits = each in MATRICES and MATRICES[each][1] % formats()[name].block_length == 0
        assert tensor.tensor_type.name == (name if fits else before[each].tensor_type.name)
        error = np.sqrt(np.mean((floats(tensor) - floats(before[each])) ** 2))
        assert error <= (MAX_ERRORS[name] if fits else 0), each


def test_metadata_and_what_is_not_made_over_are_kept_byte_for_byte(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "made.gguf"
    requantize(source, target, Q8_0)
    before, after = metadata(source), metadata(target)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {"general.file_type"}
    assert GGUFReader(target).fields["general.file_type"].contents() == 7  # mostly Q8_0
    name = "blk.0.attn_norm.weight"
    assert bytes(tensors(target)[name].data) == bytes(tensors(source)[name].data)


def test_as_given_is_the_same_file(source: Path, tmp_path: Path) -> None:
    requantize(source, tmp_path / "made.gguf", UNCHANGED)
    assert (tmp_path / "made.gguf").read_bytes() == source.read_bytes()


def test_the_first_rule_that_fits_the_rows_counts(source: Path, tmp_path: Path) -> None:
    recipe = Recipe("mixed", (("output.weight", "Q8_0"), ("*", "Q4_K"), ("*", "Q4_0")))
    requantize(source, tmp_path / "made.gguf", recipe)
    found = {name: each.tensor_type.name for name, each in tensors(tmp_path / "made.gguf").items()}
    assert found["output.weight"] == "Q8_0"
    assert found["blk.0.ffn_down.weight"] == "Q4_K"
    assert found["blk.0.attn_q.weight"] == "Q4_0"  # rows of 96: no whole block of 256
    assert found["blk.0.attn_norm.weight"] == "F32"


def test_the_recipes_of_a_file_make_different_files_of_it(source: Path, tmp_path: Path) -> None:
    found = recipes(source)
    assert found[0] is UNCHANGED
    assert len({each.name for each in found}) == len(found) > 3
    q8 = tmp_path / "q8.gguf"
    requantize(source, q8, Q8_0)
    assert "Q8_0" not in {each.name for each in recipes(q8)}
    assert num_bytes(q8, UNCHANGED) == sum(int(each.n_bytes) for each in tensors(q8).values())
    assert num_bytes(source, Q8_0) == num_bytes(q8, UNCHANGED)


def test_a_model_in_several_files_becomes_one(source: Path, tmp_path: Path) -> None:
    model(tmp_path / "parts.gguf", split_max_tensors=2)
    first = tmp_path / "parts-00001-of-00003.gguf"
    requantize(first, tmp_path / "made.gguf", Q8_0)
    requantize(source, tmp_path / "whole.gguf", Q8_0)
    made, whole = tensors(tmp_path / "made.gguf"), tensors(tmp_path / "whole.gguf")
    assert {name: bytes(each.data) for name, each in made.items()} == {
        name: bytes(each.data) for name, each in whole.items()
    }
    assert GGUFReader(tmp_path / "made.gguf").fields["split.count"].contents() == 0
    with pytest.raises(UnusableWeights, match="name the first one"):
        requantize(tmp_path / "parts-00002-of-00003.gguf", tmp_path / "x.gguf", Q8_0)


def refused(source: Path, target: Path, recipe: Recipe = Q8_0) -> str:
    with pytest.raises(UnusableWeights) as raised:
        requantize(source, target, recipe)
    text = str(raised.value)
    assert "\n" not in text
    assert list(target.parent.iterdir()) == []
    return text


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder that must stay so."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_what_is_not_usable_is_refused_in_a_line_and_leaves_nothing(
    source: Path, tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = empty / "made.gguf"
    assert "No such file" in refused(tmp_path / "missing.gguf", target)
    (tmp_path / "text.gguf").write_text("Once upon a time")
    assert "not a GGUF file" in refused(tmp_path / "text.gguf", target)
    (tmp_path / "damaged.gguf").write_bytes(source.read_bytes()[:200])
    assert "cannot read" in refused(tmp_path / "damaged.gguf", target)
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-4096])
    assert "fetch it again" in refused(tmp_path / "cut.gguf", target)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "not enough disk space" in refused(source, target)


def test_a_format_that_cannot_be_read_is_refused(tmp_path: Path, empty: Path) -> None:
    def whole_numbers(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_up.weight", np.ones((4, 64), np.int8))

    source = model(tmp_path / "given.gguf", extra=whole_numbers)
    assert "blk.1.ffn_up.weight is in I8" in refused(source, empty / "made.gguf")


@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing_and_what_was_there(
    source: Path, empty: Path, ending: type[BaseException]
) -> None:
    target = empty / "made.gguf"
    target.write_bytes(b"as before")

    def interrupt(_done: int, _total: int) -> None:
        raise ending

    with pytest.raises(UnusableWeights if ending is OSError else ending):
        requantize(source, target, Q8_0, on_progress=interrupt)
    assert [(each.name, each.read_bytes()) for each in empty.iterdir()] == [("made.gguf", b"as before")]


def test_progress_ends_with_everything(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    requantize(source, tmp_path / "made.gguf", Q8_0, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    done, total = seen[-1]
    assert total - 64 < done <= total == (tmp_path / "made.gguf").stat().st_size  # what aligns tensors is not counted


PEAK = """
import resource, sys
from pathlib import Path
from octoai.optimizer.weights import Recipe, requantize
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
requantize(Path(sys.argv[1]), Path(sys.argv[3]), Recipe("Q8_0", (("*", "Q8_0"),)), num_threads=2)
before = peak()
requantize(Path(sys.argv[2]), Path(sys.argv[3]), Recipe("Q8_0", (("*", "Q8_0"),)), num_threads=2)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(source: Path, tmp_path: Path) -> None:
    def large(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_up.weight", np.ones((4096, 16384), np.float16))  # 134 MB

    large_model = model(tmp_path / "large.gguf", extra=large)
    command = [sys.executable, "-c", PEAK, str(source), str(large_model), str(tmp_path / "made.gguf")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 48  # MiB: a few pieces of 1 Mi numbers for each of two threads


def blocks(name: str) -> st.SearchStrategy[bytes]:
    """A block: spacing and lowest number as weights have them, any levels."""
    size = formats()[name].block_bytes
    spacing = st.floats(2**-10, 0.5, width=16)
    shift = st.floats(-12, 2)
    return st.tuples(spacing, shift, st.binary(min_size=size, max_size=size)).map(
        lambda drawn: (
            np.float16(drawn[0]).tobytes()
            + (np.float16(drawn[0] * drawn[1]).tobytes() if name.endswith("_1") else b"")
            + drawn[2]
        )[:size]
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_evenly_spaced_levels_become_q8_0_with_no_more_loss_than_rounding(name: str, data: st.DataObject) -> None:
    rows = bytearray(data.draw(blocks(name)))
    source = dequantize(np.frombuffer(rows, np.uint8), GGMLQuantizationType[name])
    ours = dequantize(np.frombuffer(as_q8_0(rows, name), np.uint8), GGMLQuantizationType.Q8_0)
    if name.endswith("_0"):
        assert (ours == source).all()
    else:
        # Half a step of the coarsest grid that is ever better than none, and what 16 bits of the spacing round.
        spacing = abs(float(np.frombuffer(rows[:2], np.float16)[0]))
        assert np.abs(ours - source).max() <= 0.5 * spacing * 0.5 + 0.002 * np.abs(source).max()


def test_on_many_blocks_the_loss_is_half_that_of_rounding() -> None:
    given_ = quantize(np.random.default_rng(1).standard_normal((64, 1024), np.float32), GGMLQuantizationType.Q4_1)
    source = dequantize(given_, GGMLQuantizationType.Q4_1)
    rounded = converted(bytearray(given_.tobytes()), formats()["Q4_1"], formats()["Q8_0"], 1024)

    def error(made: bytes | bytearray) -> float:
        floats = dequantize(np.frombuffer(made, np.uint8).reshape(64, -1), GGMLQuantizationType.Q8_0)
        return float(np.sqrt(np.mean((floats - source) ** 2)))

    assert error(as_q8_0(bytearray(given_.tobytes()), "Q4_1")) < 0.55 * error(rounded)


@pytest.mark.parametrize("constant", [0.0, 0.37])
def test_a_block_of_equal_numbers_stays_one(constant: float) -> None:
    rows = bytearray(np.float16(0).tobytes() + np.float16(constant).tobytes() + bytes(16))
    made = dequantize(np.frombuffer(as_q8_0(rows, "Q4_1"), np.uint8), GGMLQuantizationType.Q8_0)
    assert np.allclose(made, constant, rtol=0.01)
