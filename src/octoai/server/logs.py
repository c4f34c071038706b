"""Structured logs: one line of JSON per record on standard error. Prompts and answers are never in them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import orjson

MOST_A_SECOND = 10


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


def set_up(level: str) -> None:
    """Everything the service and its HTTP server log, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
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


def without_password(url: str) -> str:
    """An address as it may be said: what is before an `@` in it is nobody's to read."""
    return re.sub("//[^/]*@", "//", url)
