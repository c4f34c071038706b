"""Structured logs: one line of JSON per record on standard error. Prompts and answers are never in them.

Who reads them may stop, with a pipe that is full by then: nobody is served later for that, and no end waits for it.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

import orjson

MOST_A_SECOND = 10
MOST_WAITING_BYTES = 1 << 20  # of lines that nobody has read yet, beside those that are being written
TOGETHER_SECONDS = 0.02  # what comes in it is written together: each time the thread wakes up, it takes the loop's turn
FLUSH_SECONDS = 2.0
SAY_SECONDS = 1.0


class JsonLines(logging.Formatter):
    """`time`, `level`, `logger`, `message`, and whatever the record has in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:  # names that are not Unicode, integers of more than 64 bits
            return json.dumps(line, default=str)


class Bounded:
    """Lines of which a client can cause any number: of each kind so many a second, then the number of the rest."""

    def __init__(self, log: logging.Logger, most_a_second: int = MOST_A_SECOND) -> None:
        self._log = log
        self._most = most_a_second
        self._counts: dict[tuple[str | None, ...], int] = {}  # by kind, in the second that began with its first

    def info(self, message: str, kind: Mapping[str, str | None], fields: Callable[[], Mapping[str, object]]) -> None:
        """In the loop. `kind` is what lines are counted by, `fields` what there is to say beside it."""
        if not self._log.isEnabledFor(logging.INFO):
            return
        ident = (message, *kind.values())
        count = self._counts.get(ident, 0)
        self._counts[ident] = count + 1
        if not count:
            asyncio.get_running_loop().call_later(1.0, self._end_second, ident, message, kind)
        if count < self._most:
            self._log.info(message, extra={"fields": {**kind, **fields()}})

    def _end_second(self, ident: tuple[str | None, ...], message: str, kind: Mapping[str, str | None]) -> None:
        left_out = self._counts.pop(ident) - self._most
        if left_out > 0:
            self._log.info(message, extra={"fields": {**kind, "left_out": left_out}})


class Lines(logging.Handler):
    """Records written to a descriptor, by a thread of its own: that may take for ever. What finds no room meanwhile is
    counted, and said once there is room again. Formatted at once: what a record tells of may change."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._changed = threading.Condition(self.lock)  # which is held where a record comes here
        self._waiting: list[bytes] = []
        self._num_bytes = 0
        self._num_lost = 0
        self._is_writing = self._is_torn = False  # torn: the last line there has no end yet
        threading.Thread(target=self._write_on, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:  # noqa: BLE001  # as all handlers have it: of a log's own faults nobody ends
            self.handleError(record)
            return
        if self._num_bytes + len(line) > MOST_WAITING_BYTES:
            self._num_lost += 1
            return
        self._waiting.append(line)
        self._num_bytes += len(line)
        if len(self._waiting) == 1:
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, so long as somebody may still read it."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing), FLUSH_SECONDS)

    def _write_on(self) -> None:
        num_lost = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                lines, self._waiting = self._waiting, []
                num_lost += self._num_lost
                self._num_bytes = self._num_lost = 0
                self._is_writing = True
            num_lost += sum(map(self._num_lost_of, _blocks(lines)))
            if num_lost and not self._num_lost_of([self._line(_of_lost(num_lost))]):
                num_lost = 0
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
            time.sleep(TOGETHER_SECONDS)

    def _num_lost_of(self, block: Sequence[bytes]) -> int:
        """Write these lines, on a line of their own; returns how many are not there whole."""
        text = b"".join([b"\n" * self._is_torn, *block])
        left = bytearray(text)
        with suppress(OSError):  # nobody reads there any more, or there is no room
            write(self._descriptor, left)
        if written := text[: len(text) - len(left)]:
            self._is_torn = not written.endswith(b"\n")
        return left.count(b"\n") - left.startswith(b"\n")  # which is no line's, or ends one that is there

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode() + b"\n"


def _blocks(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """As many as a pipe takes in one piece: others of our processes write there as well."""
    block: list[bytes] = []
    for line in lines:
        if block and sum(map(len, block)) + len(line) > select.PIPE_BUF:
            yield block
            block = []
        block.append(line)
    if block:
        yield block


def _of_lost(number: int) -> logging.LogRecord:
    said = {"name": "octoai.logs", "levelno": logging.WARNING, "levelname": "WARNING"}
    return logging.makeLogRecord({**said, "msg": "lines of this log are lost", "fields": {"left_out": number}})


def set_up(level: str) -> None:
    """Everything the service and its HTTP server log, to standard error."""
    handler = logging.NullHandler() if sys.stderr is None else Lines(sys.stderr.fileno())
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """A body without its end is how a stream that failed is cut: the request's own line tells that."""
    return "returned without completing response" not in record.getMessage()


def say(line: str, stream: TextIO) -> None:
    """A line for a person. Raises OSError where they have gone or do not read: it is waited for no longer than a
    second, in a thread that is left behind."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # it is no file: nobody is waited for there
        stream.write(f"{line}\n")
        return
    text = bytearray(f"{line}\n".encode(stream.encoding, "backslashreplace"))
    failures: list[OSError] = [TimeoutError("nobody reads")]

    def attempt() -> None:
        try:
            write(descriptor, text)
            failures.clear()
        except OSError as error:
            failures[0] = error

    writing = threading.Thread(target=attempt, daemon=True)
    writing.start()
    writing.join(SAY_SECONDS)
    for failure in failures:
        raise failure


def tell(message: str) -> None:
    """A line on standard error, for the person who started the service. They may have gone, or read no more: it goes
    on, and ends, as it would with them."""
    if sys.stderr is not None:
        with suppress(OSError):
            say(f"octoai: {message}", sys.stderr)


def write(descriptor: int, left: bytearray) -> None:
    """All of it, however long that takes: also where somebody has made it a descriptor that does not block. What is
    written is taken out of it."""
    while left:
        try:
            del left[: os.write(descriptor, left)]
        except BlockingIOError:
            select.select([], [descriptor], [])


def without_password(url: str) -> str:
    """An address as it may be said: what is before an `@` in it is nobody's to read."""
    return re.sub("//[^/]*@", "//", url)
