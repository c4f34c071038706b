"""Idempotency-Keys: the same key with the same request is answered once, however often it is asked.

While an answer is being given it is recorded, and who asks again joins it; afterwards the record is the answer. The
database keeps it for a day, or as long as the settings say. Knows heads and bodies, not what is in them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import orjson

from octoai.server.errors import BadRequest
from octoai.server.times import now_us

KEEP_SECONDS = 24 * 3600.0
MAX_STORED_BYTES = 1024 * 1024
LONG_BYTES = 128 * 1024  # is compressed beside the loop; what is shorter takes a millisecond, and can always be kept
MAX_RECENT_BYTES = 32 * 1024 * 1024
OVERHEAD_BYTES = 2048  # of a recording beside its body: the objects that it is, its head and its key
_KEY = re.compile(r"[\x21-\x7e]{1,255}")

Head = tuple[int, Sequence[tuple[bytes, bytes]]]
"""A status and headers."""


@dataclass(frozen=True, slots=True)
class Key:
    """An Idempotency-Key and a hash of the request that came with it."""

    value: str
    body_hash: bytes

    @classmethod
    def of(cls, value: str, path: str, body: bytes) -> Key:
        if not _KEY.fullmatch(value):
            raise BadRequest(
                "Idempotency-Key: 1 to 255 visible ASCII characters, such as a UUID", param="Idempotency-Key"
            )
        return cls(value, hashlib.sha256(path.encode() + b"\0" + body).digest())


@dataclass(eq=False, slots=True)
class Recording:
    """An answer under a key: as far as it has been given, and then whole. `num_readers` connections wait for it. It is
    kept for `keep_seconds` after `ended_us`."""

    key: Key
    request_id: str
    head: Head | None = None
    blocks: list[bytes] = field(default_factory=list)
    num_readers: int = 1
    is_done: bool = False
    error: BaseException | None = None
    is_abandoned: bool = False  # nobody was left to read it; it is being ended
    ended_us: int = 0
    keep_seconds: float = KEEP_SECONDS
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    _abandon: Callable[[], None] | None = None

    @property
    def size_bytes(self) -> int:
        """Of memory, once it is whole."""
        return OVERHEAD_BYTES + sum(map(len, self.blocks))

    def is_over_age(self, at_us: int) -> bool:
        return self.is_done and at_us - self.ended_us >= self.keep_seconds * 1_000_000

    def begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.head = (status, headers)
        self.tell()

    def add(self, block: bytes) -> None:
        self.blocks.append(block)
        self.tell()

    def end(self, block: bytes) -> None:
        """Its last block: it is whole."""
        self.is_done, self.ended_us = True, now_us()
        self.add(block)
        self.blocks = [b"".join(self.blocks)]  # who reads the list of before has its end in that
        self._abandon = None

    def fail(self, error: BaseException) -> None:
        """It will not be whole: those who joined get the same error."""
        if not self.is_done:
            self.error, self.is_done = error, True
            self.tell()

    def join(self) -> None:
        self.num_readers += 1

    def leave(self, abandon: Callable[[], None] | None = None) -> None:
        """A connection has gone. `abandon` ends the work; it is called when nobody is left to read the answer."""
        self._abandon = abandon or self._abandon
        self.num_readers -= 1
        if self.num_readers <= 0 and not self.is_done and self._abandon is not None:
            self.is_abandoned = True
            self._abandon()

    async def over(self) -> None:
        """Return when it is whole, or will never be."""
        while not self.is_done:
            self._more.clear()
            await self._more.wait()

    async def replayed(self) -> AsyncIterator[Head | bytes]:
        """The head, and every block from the first on. Raises what ended the answer before it was whole."""
        blocks: Sequence[bytes] | None = None
        sent = 0
        while True:
            if blocks is None and self.head is not None:
                blocks = self.blocks  # this list to the end: a whole recording gets another
                yield self.head
            while blocks is not None and sent < len(blocks):
                yield blocks[sent]
                sent += 1
            if self.is_done:
                break
            self._more.clear()
            await self._more.wait()
        if self.error is not None:
            raise self.error

    async def packed(self, last: bytes) -> str | None:
        """The answer for the database, with `last` as the end of its body; None where it is too large to keep."""
        assert self.head is not None
        return await pack(*self.head, [*self.blocks, last])

    def tell(self) -> None:
        self._more.set()


async def pack(status: int, headers: Sequence[tuple[bytes, bytes]], blocks: Sequence[bytes]) -> str | None:
    """An answer for the database, whose body these are; None where it is too large to keep."""
    said = {"status": status, "headers": [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]}
    parts = [orjson.dumps(said), b"\n", *blocks]
    if sum(map(len, blocks)) > LONG_BYTES:
        return await asyncio.to_thread(_packed, parts)
    return base64.b64encode(zlib.compress(b"".join(parts), level=1)).decode()


def _packed(parts: Sequence[bytes]) -> str | None:
    """In pieces: what comes to more than is kept is not compressed to its end."""
    whole, compressor, packed = memoryview(b"".join(parts)), zlib.compressobj(level=1), bytearray()
    for start in range(0, len(whole), MAX_STORED_BYTES):
        packed += compressor.compress(whole[start : start + MAX_STORED_BYTES])
        if len(packed) > MAX_STORED_BYTES:
            return None
    packed += compressor.flush()
    return base64.b64encode(packed).decode() if len(packed) <= MAX_STORED_BYTES else None


def unpacked(key: Key, request_id: str, packed: bytes, ended_us: int) -> Recording:
    """The inverse: a recording that is done."""
    head, _, body = zlib.decompress(packed).partition(b"\n")
    said = orjson.loads(head)
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in said["headers"]]
    return Recording(key, request_id, (said["status"], headers), [body], 0, is_done=True, ended_us=ended_us)


class Recordings:
    """Those of this process, by account and key: the running ones, and the latest that are done, oldest first."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], Recording] = {}
        self._done: OrderedDict[tuple[str, str], Recording] = OrderedDict()
        self._done_bytes = 0

    def find(self, account: str, key: Key) -> Recording | None:
        ident = (account, key.value)
        if ident in self._running:
            return self._running[ident]
        found = self._done.get(ident)
        if found is None or not found.is_over_age(now_us()):
            return found
        self._forget(ident)
        return None

    def forget_old(self) -> None:
        """Those whose time is over, whether or not anybody asks for them again: they are text of users. All are looked
        at: one that another process gave ended before others that were put here earlier."""
        at_us = now_us()
        for ident in [ident for ident, each in self._done.items() if each.is_over_age(at_us)]:
            self._forget(ident)

    def begin(self, account: str, recording: Recording) -> None:
        """Where `find` found none."""
        self._running[account, recording.key.value] = recording

    def replace(self, account: str, recording: Recording, stored: Recording) -> None:
        """What was to be recorded has an answer already; who joined in the meantime is given that."""
        recording.head, recording.blocks, recording.request_id = stored.head, stored.blocks, stored.request_id
        recording.ended_us, recording.is_done = stored.ended_us, True
        recording.tell()
        self.end(account, recording)

    def end(self, account: str, recording: Recording) -> None:
        """Kept for a while where it is whole, forgotten where it is not."""
        ident = (account, recording.key.value)
        if self._running.get(ident) is not recording:
            return
        del self._running[ident]
        if recording.error is not None or not recording.is_done:
            return
        self._done[ident] = recording
        self._done_bytes += recording.size_bytes
        while self._done_bytes > MAX_RECENT_BYTES:
            self._forget(next(iter(self._done)))

    def _forget(self, ident: tuple[str, str]) -> None:
        self._done_bytes -= self._done.pop(ident).size_bytes
