"""What the header of a GGUF file says of a model, read here and not by llama.cpp's own code: that ends the process at
some damaged files. Layout: ggml's gguf.md. Knows nothing of what it is good for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_KEYS = 4096
MAX_TOKENS = 4 * 1024 * 1024
MAX_STRING_BYTES = 64 * 1024
_NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAGIC = b"GGUF"
_OF_VOCABULARY = "tokenizer."

Value = str | float | Sequence[str] | Sequence[float]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`kind` is the tokenizer's, as "gpt2"; `types` are llama.cpp's of its tokens. `has_end`: something is put behind a
    text. `ends` are the tokens that end an answer: special to llama.cpp whatever type the file says. `begin` is the
    token that a text begins with, where there is one."""

    kind: str
    tokens: Sequence[str]
    types: Sequence[float]
    has_end: bool
    ends: Set[int] = frozenset()
    begin: int | None = None


def is_gguf(weights: Path) -> bool:
    """Whether it begins as one; what comes then may still be damaged. Not where it cannot be read."""
    try:
        with weights.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def metadata(weights: Path) -> dict[str, Value]:
    """All that comes before the vocabulary. Nothing of what is no GGUF file, or damaged."""
    return _read(weights, to_vocabulary=True)


def vocabulary(weights: Path) -> Vocabulary | None:
    """None where the file does not have one, or not as we know it."""
    said = _read(weights, to_vocabulary=False)
    kind, tokens, types = (said.get(f"tokenizer.ggml.{name}") for name in ("model", "tokens", "token_type"))
    if not isinstance(kind, str) or not isinstance(tokens, list) or not isinstance(types, tuple):
        return None
    has_end = any(said.get(f"tokenizer.ggml.add_{name}_token") for name in ("eos", "sep"))
    ids = [said.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = {int(id_) for id_ in ids if isinstance(id_, int | float)}
    begin = said.get("tokenizer.ggml.bos_token_id")
    if not isinstance(begin, int) or not 0 <= begin < len(tokens):
        begin = None
    return Vocabulary(kind, tokens, types, has_end, ends, begin)


def _read(weights: Path, *, to_vocabulary: bool) -> dict[str, Value]:
    try:
        with weights.open("rb") as file:
            return _values(file, to_vocabulary)
    except (OSError, ValueError, struct.error):
        return {}


def _values(file: BinaryIO, to_vocabulary: bool) -> dict[str, Value]:
    """Raises ValueError or struct.error for what is no GGUF file."""
    if file.read(4) != _MAGIC:
        raise ValueError("not a GGUF file")
    _, _, num_keys = _unpacked(file, "IQQ")
    said: dict[str, Value] = {}
    for _ in range(min(int(num_keys), MAX_KEYS)):
        key = _string(file)
        if to_vocabulary and key.startswith(_OF_VOCABULARY):
            break
        said[key] = _value(file, int(_unpacked(file, "I")[0]), MAX_KEYS if to_vocabulary else MAX_TOKENS)
    return said


def _value(file: BinaryIO, kind: int, max_strings: int) -> Value:
    if kind == _STRING:
        return _string(file, MAX_TOKENS)  # a chat's template is long
    if kind == _ARRAY:
        item, length = (int(each) for each in _unpacked(file, "IQ"))
        if item == _STRING and length <= max_strings:
            return [_string(file) for _ in range(length)]
        if item not in _NUMBER_FORMATS:
            raise ValueError(f"an array of {length} values of type {item}")
        if length <= MAX_TOKENS:
            return _unpacked(file, f"{length}{_NUMBER_FORMATS[item]}")
        file.seek(length * struct.calcsize(f"<{_NUMBER_FORMATS[item]}"), os.SEEK_CUR)
        return ()
    if kind not in _NUMBER_FORMATS:
        raise ValueError(f"a value of type {kind}")
    return _unpacked(file, _NUMBER_FORMATS[kind])[0]


def _string(file: BinaryIO, max_bytes: int = MAX_STRING_BYTES) -> str:
    length = int(_unpacked(file, "Q")[0])
    if length > max_bytes:
        raise ValueError(f"a string of {length} bytes")
    return file.read(length).decode("utf-8", "replace")


def _unpacked(file: BinaryIO, layout: str) -> tuple[float, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))
