"""Names for requests and answers: random, so that no two processes give the same one.

Later ones come later in order where an index of them is kept, so that it grows at its end. Whoever has such a name has
no right by it: tokens are made elsewhere.
"""

from __future__ import annotations

import os
import time

_NUM_AT_ONCE = 4096  # to ask the kernel for a few bytes takes as long as for a few thousand


class _Random:
    """Random bytes of the kernel's, each given once."""

    def __init__(self) -> None:
        self._text, self._next = "", 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._drop)

    def hex(self, num_bytes: int) -> str:
        start = self._next
        self._next = end = start + 2 * num_bytes
        text = self._text[start:end]
        if len(text) == 2 * num_bytes:
            return text
        self._text, self._next = os.urandom(_NUM_AT_ONCE).hex(), 2 * num_bytes
        return self._text[: 2 * num_bytes]

    def _drop(self) -> None:
        self._text = ""


_random = _Random()


def new_request_id() -> str:
    """What an answer is called, where the client has no name for it."""
    return f"req_{time.time_ns() // 1_000_000:012x}{_random.hex(10)}"


def new_record_id() -> str:
    """What a request is called in the ledger."""
    return f"{time.time_ns() // 1000:014x}{_random.hex(9)}"


def new_answer_id() -> str:
    return f"cmpl-{_random.hex(16)}"
