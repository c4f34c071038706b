"""Server-sent events: bytes in, events out, however the bytes are cut.

Follows the WHATWG rules for event streams: LF, CRLF or CR, a byte order mark, comments, several `data` lines.
Knows nothing of what the data means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_EVENT_BYTES = 16 * 1024 * 1024
_LITTLE_BYTES = 4 * 1024
_BOM = b"\xef\xbb\xbf"
_FIELDS = frozenset({b"", b"data", b"event", b"id", b"retry"})
_LF, _CR = b"\n\r"  # as numbers: `in` takes several times as long to find bytes in bytes


class EventTooLargeError(ValueError):
    """An event has not ended within the size allowed."""


class Event(NamedTuple):
    """One event: its data, lines joined by LF, and its type ("" is the default type)."""

    data: bytes
    name: str = ""


class EventDecoder:
    """Feed it blocks as they come; it answers with the events they complete."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._begun = False
        self._after_cr = False

    def feed(self, block: bytes) -> list[Event]:
        return [event for text in self.split(block) if (event := parsed(text)) is not None]

    def split(self, block: bytes) -> list[bytes]:
        """The events that a block completes, as their lines were received but for line ends: for a reader who knows
        the common shape by its first bytes, and asks `parsed` about the others."""
        if not self._begun:
            block = self._without_bom(block)
        if self._after_cr or _CR in block:
            block = self._with_lf_only(block)
        if self._rest:
            if len(self._rest) < _LITTLE_BYTES:
                block = self._rest + block
            elif not (block := self._with_rest(block)):
                return []
        texts = block.split(b"\n\n")
        self._rest = texts.pop()
        if len(self._rest) > self._max_bytes:
            raise self._too_large()
        return texts

    def rest(self) -> bytes:
        """At the end of the stream: the lines of an event whose closing blank line never came. The rules discard it."""
        rest, self._rest = self._rest, b""
        return bytes(rest)

    def _with_rest(self, block: bytes) -> bytes:
        """What has come of a large event, and the block that ends it; nothing while it goes on. To look for the end in
        all of it again, or to copy it, at every block would take the square of its size."""
        rest: Any = self._rest
        ends = block.find(b"\n\n") >= 0 or (rest[-1] == _LF and block.startswith(b"\n"))
        if ends:
            return bytes(rest) + block
        if isinstance(rest, bytes):
            self._rest = rest = bytearray(rest)  # type: ignore[assignment]  # which grows in place
        rest += block
        if len(rest) > self._max_bytes:
            raise self._too_large()
        return b""

    def _too_large(self) -> EventTooLargeError:
        return EventTooLargeError(f"an event of more than {self._max_bytes} bytes")

    def _without_bom(self, block: bytes) -> bytes:
        block, self._rest = self._rest + block, b""
        if len(block) < len(_BOM) and _BOM.startswith(block):
            self._rest = block
            return b""
        self._begun = True
        return block.removeprefix(_BOM)

    def _with_lf_only(self, block: bytes) -> bytes:
        """A CR ends its line at once, so that no event waits for a LF that may never come; the LF is dropped then."""
        if not block:
            return block
        if self._after_cr and block[:1] == b"\n":
            block = block[1:]
        # An empty rest was the LF of a CRLF cut in two: what follows it begins a new line.
        self._after_cr = block[-1:] == b"\r"
        return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def parsed(text: bytes) -> Event | None:
    """The event that some lines are; None if they hold no data."""
    if text.startswith(b"data: ") and _LF not in text:  # the shape of nearly every event there is
        return Event(text[6:])
    lines: list[bytes] = []
    name = b""
    for line in text.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            lines.append(value)
        elif field == b"event":
            name = value
    return Event(b"\n".join(lines), name.decode(errors="replace")) if lines else None


def is_foreign(text: bytes) -> bool:
    """Whether some lines are not of an event stream: neither comments nor one of the fields that it has."""
    return any(line.partition(b":")[0] not in _FIELDS for line in text.split(b"\n"))
