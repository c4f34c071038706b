"""HTTP/1.1 as a client reads it: bytes in, the head and the body out, however the bytes are cut.

Knows no sockets, and only what an answer to our own requests may be: no upgrades, no trailers worth keeping.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

_MAX_HEAD_BYTES = 256 * 1024
_MAX_LINE_BYTES = 16 * 1024
_HEAD_END = re.compile(rb"\r?\n\r?\n")  # a lone LF ends a line as well (RFC 9112, 2.2)
_LINE_END = re.compile(r"\r?\n")
_CONTINUED = re.compile(r"\r?\n[ \t]+")
_DIGITS = frozenset(b"0123456789abcdefABCDEF")


class ProtocolError(ValueError):
    """The peer does not speak HTTP/1.1, or broke off."""


class ResponseParser:
    """One answer. `status` is 0 until its head is complete; `done` once its body is."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self.begun = False
        self._keep_alive = True
        self._chunked = False
        self._left: int | None = 0  # of the chunk, or of the body; None: until the connection closes
        self._in_body = False
        self._after_chunk = False
        self._in_trailer = False
        self._trailer_bytes = 0
        self._before_chunk = False  # with nothing buffered
        self._buffer = b""

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return self.done and self._keep_alive and not self._buffer

    def feed(self, block: bytes) -> bytes:
        """The part of the body in this block; empty while the head is incomplete."""
        if self._before_chunk:
            # A token that comes alone is nearly always one whole chunk.
            end = block.find(b"\r\n")
            line = block[:end]
            is_whole = line.isalnum() and len(line) < 16 and block.endswith(b"\r\n")
            if is_whole and 0 < _number(line) == len(block) - end - 4:
                return block[end + 2 : -2]
        self.begun = True
        if self.done:
            self._keep_alive = False  # bytes nobody asked for
            return b""
        if not self._in_body:
            self._buffer += block
            if not self._read_head():
                return b""
            block, self._buffer = self._buffer, b""
        return self._dechunked(block) if self._chunked else self._counted(block)

    def end(self) -> None:
        """The peer closed. Raises unless that is how this body ends."""
        if self._in_body and not self._chunked and self._left is None:
            self.done = True
        if not self.done:
            where = "within its body" if self._in_body else "before an answer"
            raise ProtocolError(f"the service closed the connection {where}")

    def _read_head(self) -> bool:
        while True:
            start, end = _end_of_head(self._buffer)
            if not end:
                self._refuse_nonsense()
                return False
            head, self._buffer = self._buffer[:start], self._buffer[end:]
            self._parse_head(head)
            if self.status >= 200:
                return True
            self.status = 0

    def _refuse_nonsense(self) -> None:
        start = self._buffer[:5]
        if not b"HTTP/".startswith(start) or len(self._buffer) > _MAX_HEAD_BYTES:
            raise ProtocolError("the answer is not HTTP/1.1")

    def _parse_head(self, head: bytes) -> None:
        first, *lines = _lines(head.decode("latin-1"))
        version, _, rest = first.partition(" ")
        code = rest.lstrip()[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not (
            code.isascii() and code.isdigit() and len(code) == 3 and code >= "100"
        ):
            raise ProtocolError("the answer is not HTTP/1.1")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name[0] in " \t":
                raise ProtocolError("a header line of the answer is malformed")
            name, value = name.strip().lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        self.status, self.headers = int(code), headers
        self._frame(version, headers)

    def _frame(self, version: str, headers: Mapping[str, str]) -> None:
        """How the body ends (RFC 9112, 6.3)."""
        if self.status < 200:  # an answer before the answer: it has no body, whatever it says
            return
        connection = headers.get("connection", "").lower()
        self._keep_alive = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        self._in_body = True
        self._chunked = False
        length = headers.get("content-length")
        if self.status in (204, 304):
            self._left, self.done = 0, True
        elif "transfer-encoding" in headers:
            self._chunked = headers["transfer-encoding"].lower().rpartition(",")[2].strip() == "chunked"
            self._left = 0 if self._chunked else None
            self._keep_alive = self._keep_alive and self._chunked and length is None
        elif length is not None:
            lengths = {part.strip() for part in length.split(",")}
            text = lengths.pop()
            if lengths or not text.isdigit() or not text.isascii() or len(text) > 18:
                raise ProtocolError("the content-length of the answer is malformed")
            self._left = int(text)
            self.done = self._left == 0
        else:
            self._left, self._keep_alive = None, False

    def _counted(self, block: bytes) -> bytes:
        if self._left is None:
            return block
        if len(block) > self._left:
            block, self._keep_alive = block[: self._left], False
        self._left -= len(block)
        self.done = self._left == 0
        return block

    def _dechunked(self, block: bytes) -> bytes:
        if self._buffer:
            block, self._buffer = self._buffer + block, b""
        parts: list[bytes] = []
        at, size, left = 0, len(block), self._left or 0
        while at < size and not self.done:
            if not left:
                end = block.find(b"\r\n", at)
                if end < 0:
                    if size - at > _MAX_LINE_BYTES or block.find(b"\n", at) >= 0:
                        raise ProtocolError("a chunk of the answer has no size")
                    break
                left = self._chunk_line(block[at:end])
                at = end + 2
                if not left:
                    continue
            part = block[at : at + left]
            parts.append(part)
            at += len(part)
            left -= len(part)
            # Nearly always the line end is in the same block.
            self._after_chunk = left > 0 or not block.startswith(b"\r\n", at)
            if not self._after_chunk:
                at += 2
        self._left = left
        self._buffer = block[at:]
        self._before_chunk = not (left or self._buffer or self._after_chunk or self._in_trailer)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk_line(self, line: bytes) -> int:
        """The line before a chunk, after one, or after the last."""
        if self._in_trailer:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MAX_LINE_BYTES or b"\n" in line:
                raise ProtocolError("what follows the last chunk of the answer is malformed")
            self.done = not line
            return 0
        if self._after_chunk:
            if line:
                raise ProtocolError("a chunk of the answer is longer than its size")
            self._after_chunk = False
            return 0
        digits = line if line.isalnum() else _before_extensions(line)
        if not digits or len(digits) > 15:
            raise ProtocolError("the size of a chunk of the answer is malformed")
        left = _number(digits)
        self._in_trailer = left == 0
        return left


def _end_of_head(data: bytes) -> tuple[int, int]:
    """Where the empty line after the head begins and ends; zeros where there is none. To look for one that is as it
    should be, and for none that is not, takes a fraction of what a regular expression does."""
    end = data.find(b"\r\n\r\n")
    if end >= 0 and data.find(b"\n\n", 0, end) < 0 and data.find(b"\n\r\n", 0, end + 3) < 0:
        return end, end + 4
    found = _HEAD_END.search(data)
    return found.span() if found else (0, 0)


def _lines(head: str) -> list[str]:
    if "\n " in head or "\n\t" in head or head.count("\n") != head.count("\r\n"):
        return _LINE_END.split(_CONTINUED.sub(" ", head))
    return head.split("\r\n")


def _before_extensions(line: bytes) -> bytes:
    return b"" if b"\n" in line else line.partition(b";")[0].strip()


@functools.lru_cache(maxsize=512)  # the events of a stream are nearly all of a few sizes
def _number(digits: bytes) -> int:
    if not _DIGITS.issuperset(digits):
        raise ProtocolError("the size of a chunk of the answer is malformed")
    return int(digits, 16)
