"""llama.cpp's own C library, as the wheel of `xllamacpp` carries it: number formats, rows in them, GGUF headers.

Only functions of its public interface are called, with plain numbers and pointers, so that no layout of a structure
has to be known here; decision 0007 says why this and not another library. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class BadFile(Exception):
    """Not a GGUF file that llama.cpp can read; the text is one line that says why."""


@functools.cache
def library() -> Any:
    """The loaded library, silent: what it says goes nowhere."""
    found = importlib.util.find_spec("xllamacpp.xllamacpp")
    if found is None or found.origin is None:
        raise ImportError("xllamacpp is missing: pip install 'octoai[server]>=1.12'")
    loaded = ctypes.CDLL(found.origin)
    loaded.llama_log_set.argtypes = [_LOG, ctypes.c_void_p]
    loaded.llama_log_set(_SILENT, None)
    return loaded


_SILENT = _LOG(lambda _level, _text, _data: None)


def function(name: str, answer: Any, *arguments: Any) -> Any:
    """The function of that name, with its types."""
    found = getattr(library(), name)
    found.restype, found.argtypes = answer, list(arguments)
    return found


@dataclass(frozen=True, slots=True)
class Format:
    """A format of numbers: `block_length` numbers take `block_bytes`."""

    id: int
    name: str
    block_length: int
    block_bytes: int

    def num_bytes(self, num_numbers: int) -> int:
        return num_numbers // self.block_length * self.block_bytes


@functools.cache
def formats() -> dict[str, Format]:
    """Every format that llama.cpp has by its name, as in `Q4_0`, `Q4_K`, `F16`."""
    import xllamacpp

    length = function("ggml_blck_size", ctypes.c_int64, ctypes.c_int)
    size = function("ggml_type_size", ctypes.c_size_t, ctypes.c_int)
    named = {name.removeprefix("GGML_TYPE_"): int(number) for name, number in xllamacpp.ggml_type.__members__.items()}
    count = named.pop("COUNT")
    known = (Format(each, name, length(each), size(each)) for name, each in named.items() if 0 <= each < count)
    return {each.name: each for each in known if each.block_length > 0}


@functools.cache
def _to_floats(name: str) -> Any | None:
    """What makes floats of a row in that format, or None."""
    special = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    symbol = special.get(name, f"dequantize_row_{name.lower()[:-2]}_K" if name.endswith("_K") else None)
    try:
        return function(
            symbol or f"dequantize_row_{name.lower()}", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
        )
    except AttributeError:
        return None


def can_read(name: str) -> bool:
    """Whether numbers in the format can be made floats."""
    return name == "F32" or (name in formats() and _to_floats(name) is not None)


def converted(rows: bytearray, source: Format, target: Format, row_length: int) -> bytes | bytearray:
    """Whole rows of one format in another one. The caller has asked `can_read`, and rows are whole blocks of both."""
    num_numbers = len(rows) // source.block_bytes * source.block_length
    if source == target:
        return rows
    if source.name == "F32":
        floats = (ctypes.c_float * num_numbers).from_buffer(rows)
    else:
        floats = (ctypes.c_float * num_numbers)()
        read = _to_floats(source.name)
        assert read is not None
        read((ctypes.c_uint8 * len(rows)).from_buffer(rows), floats, num_numbers)
    if target.name == "F32":
        return bytes(floats)
    return _quantized(floats, num_numbers, target, row_length)


def _quantized(floats: Any, num_numbers: int, target: Format, row_length: int) -> bytearray:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    written = bytearray(target.num_bytes(num_numbers))
    view = (ctypes.c_uint8 * len(written)).from_buffer(written)
    if target.name == "IQ4_NL":  # a tenth of the time of the thorough one, for 3 % more error
        function("quantize_row_iq4_nl_ref", None, pointer, pointer, number)(floats, view, num_numbers)
        return written
    quantize = function(
        "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer, number, number, number, pointer
    )
    num_bytes = quantize(target.id, floats, view, 0, num_numbers // row_length, row_length, None)
    assert num_bytes == len(written), f"{target.name}: {num_bytes} bytes of {len(written)}"
    return written


@dataclass(frozen=True, slots=True)
class Tensor:
    """Numbers in a file. `offset` is from the beginning of the file, `shape` as GGUF has it: row length first."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int

    @property
    def num_numbers(self) -> int:
        return functools.reduce(lambda product, side: product * side, self.shape, 1)

    @property
    def num_bytes(self) -> int:
        return self.format.num_bytes(self.num_numbers)


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class Header:
    """The header of a GGUF file: its metadata and what it says of its tensors. Made by `open_header`."""

    def __init__(self, handle: int, context: int) -> None:
        self._handle = handle
        self._context = context

    def tensors(self, begin: int | None = None) -> list[Tensor]:
        """In the order of the file, where their data begin at `begin` (None: where they do in the file read)."""
        if begin is None:
            begin = self._call("gguf_get_data_offset", ctypes.c_size_t)
        return [self._tensor(each, begin) for each in range(self._call("gguf_get_n_tensors", ctypes.c_int64))]

    def _tensor(self, position: int, begin: int) -> Tensor:
        at = (ctypes.c_int64, position)
        name = self._call("gguf_get_tensor_name", ctypes.c_char_p, at).decode("utf-8", "replace")
        number = self._call("gguf_get_tensor_type", ctypes.c_int, at)
        sides = self._call("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), at)
        known = next((each for each in formats().values() if each.id == number), None)
        if known is None:
            raise BadFile(f"{name} is in a format that this llama.cpp does not have (number {number})")
        return Tensor(
            name,
            known,
            (sides[0], sides[1], sides[2], sides[3]),
            begin + self._call("gguf_get_tensor_offset", ctypes.c_size_t, at),
        )

    def number(self, key: str, default: int = 0) -> int:
        """A whole number of the metadata."""
        found = self._call("gguf_find_key", ctypes.c_int64, (ctypes.c_char_p, key.encode()))
        if found < 0:
            return default
        kind = self._call("gguf_get_kv_type", ctypes.c_int, (ctypes.c_int64, found))
        if kind not in _NUMBERS:
            return default
        name, answer = _NUMBERS[kind]
        return int(self._call(f"gguf_get_val_{name}", answer, (ctypes.c_int64, found)))

    def set_number(self, key: str, value: int, *, bits: int = 32) -> None:
        """As an unsigned number."""
        kind = {16: ctypes.c_uint16, 32: ctypes.c_uint32}[bits]
        self._call(f"gguf_set_val_u{bits}", None, (ctypes.c_char_p, key.encode()), (kind, value))

    def append(self, other: Header) -> None:
        """The tensors of another one behind those that are there."""
        tensor = function("ggml_get_first_tensor", ctypes.c_void_p, ctypes.c_void_p)(other._context)
        following = function("ggml_get_next_tensor", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        while tensor:
            self._call("gguf_add_tensor", None, (ctypes.c_void_p, tensor))
            tensor = following(other._context, tensor)

    def set_format(self, tensor: Tensor, to: Format) -> None:
        """What comes behind it in the file moves."""
        self._call("gguf_set_tensor_type", None, (ctypes.c_char_p, tensor.name.encode()), (ctypes.c_int, to.id))

    def written(self) -> bytes:
        """As it stands in a file, up to where the first tensor begins."""
        buffer = ctypes.create_string_buffer(self._call("gguf_get_meta_size", ctypes.c_size_t))
        self._call("gguf_get_meta_data", None, (ctypes.c_void_p, ctypes.addressof(buffer)))
        return buffer.raw

    def close(self) -> None:
        self._call("gguf_free", None)
        function("ggml_free", None, ctypes.c_void_p)(self._context)

    def _call(self, name: str, answer: Any, *arguments: tuple[Any, Any]) -> Any:
        kinds, values = [kind for kind, _ in arguments], [value for _, value in arguments]
        return function(name, answer, ctypes.c_void_p, *kinds)(self._handle, *values)


_NUMBERS = {  # of gguf_type
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
}


@contextmanager
def open_header(path: Path) -> Iterator[Header]:
    """The header of the file, read by the code that the engine reads it with. Raises BadFile."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise BadFile(f"{path} is not a GGUF file")
    context = ctypes.c_void_p()
    handle = function("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _Parameters)(
        os.fsencode(path), _Parameters(True, ctypes.addressof(context))
    )
    if not handle:
        raise BadFile(f"{path} is a GGUF file that llama.cpp cannot read: damaged, cut off, or newer than it")
    header = Header(handle, context.value or 0)
    try:
        yield header
    finally:
        header.close()
