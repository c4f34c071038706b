"""Positions, lines and errors: records as bytes with a checksum, and back. Pure; knows no files.

JournalError
├── JournalFull      no room on the disk: the record is not kept; append it again once there is
├── JournalFailed    the disk refused, or the journal is closed: the record may yet be read back
├── JournalDamaged   records that were durable cannot be read
└── JournalGap       segments were given up that the database, which is older, does not have
"""

from __future__ import annotations

import errno
import zlib
from typing import NamedTuple

import orjson

BEGINS_BATCH, CONTINUES = b">", b" "
_CRC_LENGTH = 8
FRAME_BYTES = _CRC_LENGTH + len("> \n") - 1  # what a line has beside its record
HEADER_BYTES = 128  # no less than the first line of a segment


class JournalError(Exception):
    """What can go wrong with a journal."""


class JournalFull(JournalError):
    """There is no room, and the record is not kept. Whoever must not lose it appends it again."""


class JournalFailed(JournalError):
    """It is not known to be durable: the disk refused, or the journal is closed. It may be read back all the same."""


class JournalDamaged(JournalError):
    """Records that were durable cannot be read: a person has to look."""


class JournalGap(JournalError):
    """What lies between the database and the journal is in neither: a person has to choose."""


_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def refusal_of(failure: OSError | None) -> JournalError:
    """What to raise where a record could not be written; None: no file was to be had."""
    if failure is None or failure.errno in _NO_SPACE:
        return JournalFull("There is no room left for the journal.")
    return JournalFailed(f"The journal could not be written: {failure}")


class Position(NamedTuple):
    """Where a record ends: the number of its segment, and bytes into it. Later records have greater positions."""

    segment: int
    offset: int


START = Position(0, 0)


def line(payload: bytes, mark: bytes) -> bytes:
    return b"%08x%b%b\n" % (zlib.crc32(payload), mark, payload)


def payload_of(text: bytes) -> bytes | None:
    """The record in a line without its newline; None when it is not what was written."""
    payload = text[_CRC_LENGTH + 1 :]
    is_good = text[_CRC_LENGTH : _CRC_LENGTH + 1] in (BEGINS_BATCH, CONTINUES)
    return payload if is_good and text[:_CRC_LENGTH] == b"%08x" % zlib.crc32(payload) else None


def has_batch(data: bytes) -> bool:
    """Whether a good line in `data`, from its second line on, begins a batch: if so, the first was durable once."""
    texts = data.rstrip(b"\0").split(b"\n")[1:]
    return any(text[_CRC_LENGTH : _CRC_LENGTH + 1] == BEGINS_BATCH and payload_of(text) is not None for text in texts)


def header(after: Position) -> bytes:
    """The first line of a segment; it begins that segment's first batch."""
    return line(orjson.dumps({"after": list(after)}), BEGINS_BATCH)


def position_after(text: bytes) -> Position | None:
    """What a segment goes on after, by its first line; None when that was never written whole."""
    payload = payload_of(text)
    return None if payload is None else Position(*orjson.loads(payload)["after"])
