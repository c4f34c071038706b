"""Nothing that requests ask of the database, or that is done by the clock, goes through a table that only grows."""

from __future__ import annotations

import re
import time
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from octoai.server import accounts, tokens
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.journal import Journal
from octoai.server.ledger import books
from octoai.server.ledger.books import journal_dir, recover
from octoai.server.store import Place, connect, keys
from octoai.server.store.keys import PRUNED_AT_ONCE, KeyRow
from octoai.server.store.sqlite import SqliteConnection
from tests.running import InProcess
from tests.server.settling import run, settlement
from tests.talking import ask, request, until

# With every request ever made, with every answer that is kept, or with all that counts against limits.
GROWING = {"requests", "entries", "usage", "keys", "spending", "balances", "reservations", "rates"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The statements that SQLite was given from now on."""
    statements: set[str] = set()

    def recorded(name: str) -> Any:
        method = getattr(SqliteConnection, name)

        @wraps(method)
        def record(self: SqliteConnection, sql: str, *more: Any) -> Any:
            statements.add(sql)
            return method(self, sql, *more)

        return record

    for name in ("row", "rows", "stream", "execute", "execute_many"):
        monkeypatch.setattr(SqliteConnection, name, recorded(name))
    return statements


def has(statements: set[str], *parts: str) -> bool:
    return any(all(part in sql for part in parts) for sql in [*statements])


def scans(place: Place, statements: set[str]) -> list[str]:
    """Of these, the ones that go through all of a table that grows, and how."""
    found = []
    with closing(connect(place)) as db:
        for sql in sorted([*statements]):
            if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE)\b", sql) is None:
                continue
            aliases = {
                alias: table for table, alias in re.findall(r"(?:FROM|JOIN|UPDATE|INTO) (\w+)(?: AS)? (\w+)", sql)
            }
            plan = [row[3] for row in db.rows(f"EXPLAIN QUERY PLAN {sql}", (1,) * sql.count("?"))]
            tables = [step.split()[1] for step in plan if step.startswith("SCAN ")]
            if any(aliases.get(table, table) in GROWING for table in tables):
                found.append(f"{' '.join(sql.split())}: {plan}")
    return found


def test_no_request_and_no_clock_goes_through_all_there_ever_was(
    in_process: Any, asked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for requests whose process is not heard of any more took 0.2 s of each ten for half a million of them,
    in which nobody else could write."""
    monkeypatch.setattr(books, "KEEP_ORDER_SECONDS", 0.05)
    service: InProcess = in_process(ScriptedEngine())
    service.books(lambda db: accounts.create(db, "acme", plan="pro", is_prepaid=True))
    service.books(lambda db: accounts.credit(db, "acme", 10**12))
    limits = {"hard_budget_nanos": 10**12, "prompt_tokens_per_minute": 10**6, "concurrent_requests": 5}
    token = service.books(lambda db: tokens.mint(db, "t", "acme", limits=limits)).text
    asked.clear()
    for number in range(3):
        headers = {"idempotency_key": f"k{number % 2}", "x_request_id": f"mine-{number % 2}"}
        headers["authorization"] = f"Bearer {token}"
        status, _, _ = ask(service, "/v1/chat/completions", request(service, stream=number == 1), **headers)
        assert status == 200
    until(lambda: has(asked, "FROM requests", "lease_us < ?") and has(asked, "DELETE FROM rates"))
    service.read(lambda db: None)
    assert has(asked, "INSERT INTO rates") and has(asked, "INSERT INTO keys")
    assert scans(service.place, asked) == []


def test_what_a_process_left_behind_is_found_without_looking_through_all(tmp_path: Path, asked: set[str]) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        with closing(connect(place)) as db, db.transaction():
            accounts.ensure_default(db)
        journal = Journal.open(journal_dir(place))
        await journal.append(settlement(1), soon=True)
        journal.close()

    run(main())
    asked.clear()
    assert recover(place) == 0
    assert has(asked, "FROM keys", "journal = ?") and has(asked, "FROM requests", "journal = ?")
    assert scans(place, asked) == []


def test_old_keys_go_a_few_at_a_time_until_all_are_gone(in_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weekend there may be a million, with their answers: to delete them at once took a minute."""
    monkeypatch.setattr(books, "KEEP_ORDER_SECONDS", 0.05)
    monkeypatch.setattr(books, "REST_SECONDS", 0.01)
    num, now_us = 2 * PRUNED_AT_ONCE + 3, time.time_ns() // 1000
    day_us = int(books.KEEP_SECONDS * 1_000_000)
    deleted: list[bool] = []

    def prune(db: Any, *before_us: int, pruned: Any = keys.prune) -> bool:
        deleted.append(pruned(db, *before_us))
        return deleted[-1]

    monkeypatch.setattr(keys, "prune", prune)

    def claim(db: Any) -> None:
        for number in range(num):
            age_us = day_us + 1 if number else 0
            keys.claim(db, "acme", f"k{number}", KeyRow(b"", f"r{number}", "", "j", now_us - age_us))

    service: InProcess = in_process(ScriptedEngine())
    service.books(claim)
    until(lambda: service.books(lambda db: db.rows("SELECT key FROM keys")) == [("k0",)], 5)
    assert deleted.count(True) >= 2
