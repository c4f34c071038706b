"""Which slot of an engine holds which prompt, and which slot a new prompt goes to.

Pure. Prompts are packed tokens (`packed`): two of them are compared as bytes. Which tokens an engine has generated
behind a prompt is not known here; a conversation is found again by its prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

TOKEN_BYTES = 4
CHEAP_TOKENS = 256  # read again in the time that neighbours save each other in an answer or two


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
        self._num_own = [0] * num_slots  # tokens held that would have to be read again
        self._free = list(range(num_slots))  # who was put back last comes last

    @property
    def num_taken(self) -> int:
        return len(self._held) - len(self._free)

    def take(self, prompt: bytes, num_saved: int) -> tuple[int, int]:
        """A free slot, and how many tokens of the prompt it holds. `num_saved` of them can be had for any slot.

        A slot that holds more than that, and little else, is taken as it is: it is the same conversation.
        """
        common = {slot: num_common(self._held[slot], prompt) for slot in self._free}
        best = max(self._free, key=lambda slot: (common[slot], -len(self._held[slot])))
        is_its_own = common[best] > num_saved and 2 * common[best] * TOKEN_BYTES >= len(self._held[best])
        slot = best if is_its_own else self._spare()
        self._free.remove(slot)
        return slot, common[slot]

    def _spare(self) -> int:
        """Beside slots that are taken: llama.cpp computes tokens together only where their slots are neighbours, and
        two streams apart take twice as long. But what would take long to read again is left alone while there is
        anything else, and where there is not, the younger half of it. Of equals, the slot unused for longest.
        """
        cheap = [slot for slot in self._free if self._num_own[slot] <= CHEAP_TOKENS]
        return max(cheap or self._free[: (len(self._free) + 1) // 2], key=self._num_taken_beside)

    def _num_taken_beside(self, slot: int) -> int:
        return sum(0 <= each < len(self._held) and each not in self._free for each in (slot - 1, slot + 1))

    def put_back(self, slot: int, held: bytes, num_saved: int = 0) -> None:
        """Of what it holds, the first `num_saved` tokens can be had for any slot."""
        self._held[slot] = held
        self._num_own[slot] = len(held) // TOKEN_BYTES - num_saved
        self._free.append(slot)
