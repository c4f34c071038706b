"""A request's head, and how one is known that its connection has had before.

A client that keeps its connection sends the same head with every request, but for the length of the body. One that is
that byte for byte means what it meant when it was parsed. Knows nothing of connections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hmac import compare_digest

_END = b"\r\n\r\n"
_FEW_BYTES = 512  # of which a request has 18 at least
_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]{1,9})(?=\r\n)", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class Head:
    """`headers` are by their names in lower case, of several with one name the first."""

    path: str
    headers: Mapping[bytes, bytes]
    keep_alive: bool
    expects_continue: bool
    takes_chunks: bool = True  # HTTP/1.0 does not know them: there a body ends with its connection
    token_hash: bytes | None = None  # once that token has been found to be good

    def header(self, name: bytes) -> str | None:
        """The first header of that name, which is given in lower case."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


@dataclass(slots=True)
class KnownHead:
    """What stands before and behind the length of the body."""

    head: Head
    begins: bytes
    ends: bytes

    def read(self, data: bytes) -> tuple[int, int] | None:
        """The length of the body and where it begins, in what begins with such a head."""
        end = data.find(_END) + len(_END)
        first, last = len(self.begins), end - len(self.ends)
        length = data[first:last]
        # It has a token in it: how long it takes to compare must not tell how much of one is right.
        if not (
            0 < len(length) < 10
            and length.isdigit()
            and compare_digest(data[:first], self.begins)
            and compare_digest(data[last:end], self.ends)
        ):
            return None
        return int(length), end


def few(data: bytes) -> bytes:
    """What of it may be parsed at once: all of it, where one head at most ends in it; never more than ends 28."""
    end = data.find(_END) + len(_END)
    if data.find(b"\n", end) < 0 or data.find(_END, end) < 0:  # mostly the first, which takes no time
        return data
    return data[: max(end, _FEW_BYTES)]


def length_of_offer(method: bytes, headers: Sequence[tuple[bytes, bytes]]) -> int:
    """The length of the body behind a head that offers another protocol, as Java's client does by itself. It is
    answered in this one. Raises ValueError where no length is said: what follows cannot be told from a request then."""
    lengths = [value for name, value in headers if name == b"content-length"] or [b"0"]
    is_chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if is_chunked or method == b"CONNECT" or not lengths[0].isdigit():
        raise ValueError("a body of unknown length")
    return int(lengths[0])


def known(head: Head, num_lines: int, data: bytes) -> KnownHead | None:
    """How to know a head again, of so many header lines, that was parsed from `data`; None where `data` is not one head
    and what is there of its body, or where more than a length may differ the next time."""
    if not head.keep_alive or head.expects_continue or b"upgrade" in head.headers:
        return None
    end = data.find(_END) + len(_END)
    lengths = [*_LENGTH.finditer(data, 0, end)]
    # Line ends tell that this is where it ended to the parser as well.
    if len(lengths) != 1 or data.count(b"\n", 0, end) != num_lines + 2 or len(data) > end + int(lengths[0][1]):
        return None
    start, stop = lengths[0].span(1)
    return KnownHead(head, data[:start], data[stop:end])
