"""Names for requests and answers: random, so that no two processes give the same one.

Later ones come later in order where an index of them is kept, so that it grows at its end. Whoever has such a name has
no right by it: tokens are made elsewhere.
"""

from __future__ import annotations

import os
import time

_NUM_AT_ONCE = 256  # to ask the kernel for a few bytes takes as long as for a few thousand


class _Random:
    """Random bytes of the kernel's in hexadecimal, so many at a time, each given once."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._texts: list[str] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._texts.clear)

    def hex(self) -> str:
        if not self._texts:
            text, length = os.urandom(_NUM_AT_ONCE * self._num_bytes).hex(), 2 * self._num_bytes
            self._texts += [text[start : start + length] for start in range(0, len(text), length)]
        return self._texts.pop()


_of_request, _of_record, _of_answer = _Random(10), _Random(9), _Random(16)


def new_request_id() -> str:
    """What an answer is called, where the client has no name for it."""
    return f"req_{time.time_ns() // 1_000_000:012x}{_of_request.hex()}"


def new_record_id() -> str:
    """What a request is called in the ledger."""
    return f"{time.time_ns() // 1000:014x}{_of_record.hex()}"


def new_answer_id() -> str:
    return f"cmpl-{_of_answer.hex()}"
