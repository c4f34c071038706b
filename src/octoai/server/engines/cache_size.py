"""How many requests a model may serve at once before anything is known of it but its file: by the size of their caches.

A slot's KV cache takes memory from the start, whether it is used or not. How much is in the header of the GGUF file,
which is read here and not by llama.cpp's own code: that ends the process at some damaged files. Layout: ggml's gguf.md.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

MANY_SLOTS, FEW_SLOTS = 8, 4
MEMORY_PARTS = 8  # of one of which the caches of many slots must not take more
MAX_KEYS = 4096
MAX_STRING_BYTES = 64 * 1024
_NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F16_BYTES = 2
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

Value = str | float | None  # None: an array, which is not read


def num_slots(weights: Path, context_length: int) -> int:
    """As many as a burst of clients wants where the memory is there for it, otherwise few."""
    token_bytes = cache_bytes_per_token(weights)
    if token_bytes and MANY_SLOTS * context_length * token_bytes <= memory_bytes() // MEMORY_PARTS:
        return MANY_SLOTS
    return FEW_SLOTS


def cache_bytes_per_token(weights: Path) -> int | None:
    """What attention keeps of a token, in F16. None where the file does not say: it is of another kind, or damaged."""
    try:
        with weights.open("rb") as file:
            said = _metadata(file)
    except (OSError, ValueError, struct.error):
        return None

    def number(name: str, default: int = 0) -> int:
        found = said.get(f"{said.get('general.architecture')}.{name}", default)
        return found if isinstance(found, int) else 0

    num_heads = number("attention.head_count")
    head_length = number("embedding_length") // num_heads if num_heads > 0 else 0
    lengths = number("attention.key_length", head_length) + number("attention.value_length", head_length)
    size = number("block_count") * number("attention.head_count_kv", num_heads) * lengths * _F16_BYTES
    return size if size > 0 else None


def _metadata(file: BinaryIO) -> dict[str, Value]:
    """All that comes before the vocabulary. Raises ValueError or struct.error for what is no GGUF file."""
    if file.read(4) != b"GGUF":
        raise ValueError("not a GGUF file")
    _, _, num_keys = _unpacked(file, "IQQ")
    said: dict[str, Value] = {}
    for _ in range(min(int(num_keys), MAX_KEYS)):
        key = _string(file)
        if key.startswith("tokenizer."):
            break
        said[key] = _value(file, int(_unpacked(file, "I")[0]))
    return said


def _value(file: BinaryIO, kind: int) -> Value:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item, length = (int(each) for each in _unpacked(file, "IQ"))
        if item in _NUMBER_FORMATS:
            file.seek(length * struct.calcsize(f"<{_NUMBER_FORMATS[item]}"), os.SEEK_CUR)
        elif item == _STRING and length <= MAX_KEYS:
            for _ in range(length):
                _string(file)
        else:
            raise ValueError(f"an array of {length} values of type {item}")
        return None
    if kind not in _NUMBER_FORMATS:
        raise ValueError(f"a value of type {kind}")
    return _unpacked(file, _NUMBER_FORMATS[kind])[0]


def _string(file: BinaryIO) -> str:
    length = int(_unpacked(file, "Q")[0])
    if length > MAX_STRING_BYTES:
        raise ValueError(f"a string of {length} bytes")
    return file.read(length).decode("utf-8", "replace")


def _unpacked(file: BinaryIO, layout: str) -> tuple[float, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def memory_bytes() -> int:
    """Of the machine, or of the container that we are in. 0 where nobody says."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    try:
        return min(whole, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # "max": no limit
        return whole
