"""Which slot of an engine holds which prompt, and which slot a new prompt goes to.

Pure. Prompts are packed tokens (`packed`): two of them are compared as bytes. Which tokens an engine has generated
behind a prompt is not known here; a conversation is found again by its prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

TOKEN_BYTES = 4


def packed(tokens: Sequence[int]) -> bytes:
    """Raises OverflowError for what is no token."""
    return array("I", tokens).tobytes()


def num_common(one: bytes, other: bytes) -> int:
    """How many tokens two packed prompts begin with in common."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:  # the first `low` are equal
        middle = (low + high + 1) // 2
        part = slice(low * TOKEN_BYTES, middle * TOKEN_BYTES)
        if one[part] == other[part]:
            low = middle
        else:
            high = middle - 1
    return low


class Slots:
    """`take` a slot for a prompt, `put_back` with what it holds then. Never more are out than there are."""

    def __init__(self, num_slots: int) -> None:
        self._held = [b""] * num_slots
        self._free = list(range(num_slots))  # who was put back last comes last

    @property
    def num_taken(self) -> int:
        return len(self._held) - len(self._free)

    def take(self, prompt: bytes, num_saved: int) -> tuple[int, int]:
        """A free slot, and how many tokens of the prompt it holds. `num_saved` of them can be had for any slot.

        A slot that holds more than that, and little else, is taken as it is: it is the same conversation. Otherwise
        it is the one that nobody has used for the longest time.
        """
        common = {slot: num_common(self._held[slot], prompt) for slot in self._free}
        best = max(self._free, key=lambda slot: (common[slot], -len(self._held[slot])))
        is_its_own = common[best] > num_saved and 2 * common[best] * TOKEN_BYTES >= len(self._held[best])
        slot = best if is_its_own else self._free[0]
        self._free.remove(slot)
        return slot, common[slot]

    def put_back(self, slot: int, held: bytes) -> None:
        self._held[slot] = held
        self._free.append(slot)
