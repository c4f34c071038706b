"""How many requests a model may serve at once before anything is known of it but its file: by the size of their caches.

A slot's KV cache takes memory from the start, whether it is used or not. How much is in the header of the GGUF file.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from octoai.server.engines.llama.header import metadata

MANY_SLOTS, FEW_SLOTS = 8, 4
MEMORY_PARTS = 8  # of one of which the caches of many slots must not take more
FOUND_MEMORY_PARTS = 2  # the same of as many slots as were found to be fast, and to fit, with some context
_TYPE_BYTES = {"f16": 2.0, "f32": 4.0, "q8_0": 34 / 32}  # of a number in a cache of that type
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # the second is of the first version of cgroups


def num_slots(weights: Path, context_length: int) -> int:
    """As many as a burst of clients wants where the memory is there for it, otherwise few."""
    token_bytes = cache_bytes_per_token(weights)
    if token_bytes and MANY_SLOTS * context_length * token_bytes <= memory_bytes() // MEMORY_PARTS:
        return MANY_SLOTS
    return FEW_SLOTS


def slots_that_fit(weights: Path, context_length: int, wanted: int, cache_type: str) -> int:
    """Fewer than were found to be fast where their caches take too much of the memory: the context may have been
    shorter then. Not fewer than a model has of which nothing was found."""
    token_bytes = cache_bytes_per_token(weights, cache_type) or 0
    while wanted > FEW_SLOTS and wanted * context_length * token_bytes > memory_bytes() // FOUND_MEMORY_PARTS:
        wanted = max(FEW_SLOTS, wanted // 2)
    return wanted


def cache_bytes_per_token(weights: Path, cache_type: str = "f16") -> int | None:
    """What attention keeps of a token. None where the file does not say: it is of another kind, or damaged."""
    said = metadata(weights)

    def number(name: str, default: int = 0) -> int:
        found = said.get(f"{said.get('general.architecture')}.{name}", default)
        return found if isinstance(found, int) else 0

    num_heads = number("attention.head_count")
    head_length = number("embedding_length") // num_heads if num_heads > 0 else 0
    lengths = number("attention.key_length", head_length) + number("attention.value_length", head_length)
    size = number("block_count") * number("attention.head_count_kv", num_heads) * lengths * _TYPE_BYTES[cache_type]
    return int(size) if size > 0 else None


def memory_bytes() -> int:
    """Of the machine, or of the container that we are in. 0 where nobody says."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    for limit in _LIMITS:
        with suppress(OSError, ValueError):  # "max": no limit
            return min(whole, int((_CGROUP / limit).read_text()))
    return whole
