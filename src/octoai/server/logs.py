"""Structured logs: one line of JSON per record on standard error. Prompts and answers are never in them."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime

import orjson


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
