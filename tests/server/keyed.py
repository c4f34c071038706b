"""Requests under Idempotency-Keys, and what the books have of them."""

from __future__ import annotations

from typing import Any

from octoai.server.store.requests import COLUMNS, RequestRow
from tests.running import InProcess
from tests.talking import is_idle, until

PATH = "/v1/chat/completions"
SLOW = tuple(step for number in range(40) for step in (f"w{number} ", 0.02))


def rows(service: InProcess) -> list[RequestRow]:
    query = f"SELECT {COLUMNS} FROM requests ORDER BY opened_us"
    return [RequestRow(*row) for row in service.read(lambda db: db.rows(query))]


def net_nanos(service: InProcess) -> int:
    """What all accounts were charged, less what was given back."""
    (total,) = service.read(lambda db: db.row("SELECT COALESCE(SUM(amount_nanos), 0) FROM entries")) or (0,)
    return -int(total)


def statuses(service: InProcess) -> list[str]:
    return sorted(row.status for row in rows(service))


def leave(service: InProcess, talk: Any, key: str) -> None:
    stream = talk(service, key)
    stream.until(b"w2 ")
    stream.close()
    until(lambda: is_idle(service))
