"""`verify` finds whatever is changed by hand in the books, says where, and does so while the service writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from octoai.server import accounts, tokens
from octoai.server.store import Connection, Place, connect, requests
from octoai.server.store.audit import BrokenBooks, Verified, verify
from octoai.server.store.entries import COLUMNS, Entry, post, row_of

NOW = 1_793_491_197_000_000  # 2026-10-31 23:59:57 UTC: the books below are of two months
SECOND = 1_000_000


def record(kind: str, number: int, account: str, token_id: str, **more: Any) -> dict[str, Any]:
    at_us = NOW + number * SECOND
    return {
        "kind": kind,
        "id": f"id{number}",
        "request_id": f"req_{number}",
        "account": account,
        "token_id": token_id,
        "model": "small",
        "served_model": "small-q4",
        "input_nanos": 150,
        "cached_input_nanos": 75,
        "output_nanos": 600,
        "opened_us": at_us,
        "journal": "j1",
        "is_reserved": False,
        "lease_us": at_us + 60 * SECOND,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 20 + number,
        "outcome": "ok",
        "settled_us": at_us + SECOND,
        **more,
    }


@pytest.fixture
def db(place: Place) -> Iterator[Connection]:
    with closing(connect(place)) as connection:
        write_books(connection)
        yield connection


def write_books(db: Connection) -> None:
    """Two accounts, two months; requests that are open, settled, interrupted, corrected and refunded."""
    with db.transaction():
        for account in ("acme", "zeta"):
            accounts.create(db, account, plan="unlimited")
            post(db, [Entry(NOW - SECOND, account, "grant", 5_000_000, note="welcome")])
        acme, zeta = tokens.mint(db, "a", "acme").id, tokens.mint(db, "z", "zeta").id
        settled = [
            record("settlement", number, "acme" if number < 3 else "zeta", acme if number < 3 else zeta)
            for number in range(6)
        ]
        left = [record(kind, number, "acme", acme) for number in (6, 7, 8) for kind in ("intent", "checkpoint")]
        requests.apply(db, settled + left, NOW)
        lost = [row for row in (requests.of_id(db, "id6"), requests.of_id(db, "id7")) if row is not None]
        requests.interrupt(db, lost, NOW + 90 * SECOND)
        requests.apply(db, [record("settlement", 7, "acme", acme, completion_tokens=99)], NOW + 95 * SECOND)
        for number in (2, 7):
            row = requests.of_id(db, f"id{number}")
            assert row is not None
            requests.refund(db, row, "sorry", NOW + 99 * SECOND)


def test_books_that_nobody_touched_are_whole(db: Connection) -> None:
    assert verify(db) == Verified(num_entries=13, num_requests=9, num_open=1, num_accounts=2)


def test_empty_books_are_whole(place: Place) -> None:
    with closing(connect(place)) as connection:
        assert verify(connection) == Verified(0, 0, 0, 0)


# Where each value of the books is changed, and what is said of it.
ENTRY = r"^entry 5 of account \w+: "
CHANGES = [
    ("entries", "seq", "99", "seq = 5", "^entry 6 of account .*: it follows entry 4"),
    ("entries", "seq", "99", "seq = 13", "^entry 99 of account .*: it follows entry 12"),
    ("entries", "at_us", "at_us + 1", "seq = 5", ENTRY + "its hash"),
    ("entries", "account", "'zeta'", "seq = 5", ENTRY + "its hash"),
    ("entries", "token_id", "'tok_other'", "seq = 5", ENTRY + "its hash"),
    ("entries", "token_id", "NULL", "seq = 5", ENTRY + "its hash"),
    ("entries", "kind", "'correction'", "seq = 5", ENTRY + "its hash"),
    ("entries", "amount_nanos", "amount_nanos + 1", "seq = 5", ENTRY + "its hash"),
    ("entries", "request", "'id0'", "seq = 5", ENTRY + "its hash"),
    ("entries", "request", "NULL", "seq = 5", ENTRY + "its hash"),
    ("entries", "model", "'large'", "seq = 5", ENTRY + "its hash"),
    ("entries", "prompt_tokens", "0", "seq = 5", ENTRY + "its hash"),
    ("entries", "cached_tokens", "0", "seq = 5", ENTRY + "its hash"),
    ("entries", "completion_tokens", "0", "seq = 5", ENTRY + "its hash"),
    ("entries", "note", "'x'", "seq = 5", ENTRY + "its hash"),
    ("entries", "hash", "''", "seq = 5", ENTRY + "its hash"),
    ("entries", "hash", "''", "seq = 13", "^entry 13 of account .*: its hash"),
    ("head", "id", "2", "1 = 1", "^head is at entry 13, but the last entry is 13"),
    ("head", "seq", "12", "1 = 1", "^head is at entry 12, but the last entry is 13"),
    ("head", "at_us", "0", "1 = 1", "^head"),
    ("head", "hash", "''", "1 = 1", "^head"),
    ("balances", "nanos", "nanos + 1", "account = 'acme'", "^balance of account acme: the row says .*, entries"),
    ("balances", "account", "'other'", "account = 'acme'", "^balance of account acme: there is no row"),
    (
        "spending",
        "payer",
        "'other'",
        "payer = 'acme' AND month = '2026-10'",
        "^spending of acme in 2026-10: there is no row",
    ),
    ("spending", "month", "'2020-01'", "payer = 'zeta' AND month = '2026-11'", "^spending of zeta in 2026-11"),
    (
        "spending",
        "nanos",
        "nanos - 1",
        "payer = 'zeta' AND month = '2026-11'",
        "^spending of zeta in 2026-11: the row says",
    ),
    (
        "usage",
        "minute_at",
        "minute_at + 60",
        "account = 'zeta'",
        "^usage of account zeta, token tok_.*, model small in the minute 2026-",
    ),
    ("usage", "minute_at", "9223372036854775000", "account = 'zeta'", "^usage of account zeta"),
    ("usage", "account", "'other'", "account = 'zeta'", "^usage of account (zeta|other)"),
    ("usage", "token_id", "'other'", "account = 'zeta'", "^usage of account zeta"),
    ("usage", "model", "'other'", "account = 'zeta'", "^usage of account zeta"),
    *(
        ("usage", name, f"{name} + 1", "account = 'zeta'", f"^usage of account zeta.* {name}$")
        for name in ("num_requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")
    ),
    ("requests", "id", "'other'", "id = 'id4'", r"^entry \d+ of account zeta: its request id4 is missing"),
    (
        "requests",
        "account",
        "'acme'",
        "id = 'id4'",
        r"^request req_4 \(id id4\) of account acme: its entries are of another",
    ),
    ("requests", "token_id", "'other'", "id = 'id4'", "^request req_4 .*: its entries are of another"),
    ("requests", "model", "'other'", "id = 'id4'", "^request req_4 .*: its entries are of another"),
    ("requests", "status", "'lost'", "id = 'id4'", "^request req_4 .*: there is no status 'lost'"),
    ("requests", "status", "'open'", "id = 'id4'", "^request req_4 .*: it is open and was charged once"),
    ("requests", "status", "'refunded'", "id = 'id4'", "^request req_4 .*: it is refunded and was refunded never"),
    ("requests", "status", "'settled'", "id = 'id2'", "^request req_2 .*: it is settled and was refunded once"),
    ("requests", "status", "'settled'", "id = 'id8'", "^request req_8 .*: it is settled and was charged never"),
    (
        "requests",
        "input_nanos",
        "input_nanos + 1",
        "id = 'id4'",
        "^request req_4 .*: it cost .*, but its tokens are worth",
    ),
    ("requests", "cached_input_nanos", "0", "id = 'id4'", "^request req_4 .*: it cost"),
    ("requests", "output_nanos", "0", "id = 'id4'", "^request req_4 .*: it cost"),
    ("requests", "prompt_tokens", "11", "id = 'id4'", "^request req_4 .*: entries say 10 prompt tokens, the row 11"),
    ("requests", "cached_tokens", "5", "id = 'id4'", "^request req_4 .*: entries say 4 cached tokens, the row 5"),
    (
        "requests",
        "completion_tokens",
        "0",
        "id = 'id4'",
        "^request req_4 .*: entries say 24 completion tokens, the row 0",
    ),
    (
        "requests",
        "cost_nanos",
        "cost_nanos + 1",
        "id = 'id4'",
        r"^request req_4 .*: entries say \d+ nano-dollars, the row",
    ),
    ("requests", "waived_nanos", "1", "id = 'id4'", "^request req_4 .*: it cost .* and waived 1, but"),
    ("requests", "settled_us", "NULL", "id = 'id4'", "^request req_4 .*: it is settled and was never settled"),
    ("requests", "settled_us", "1", "id = 'id8'", "^request req_8 .*: it is open and was settled"),
    ("requests", "cached_tokens", "99", "id = 'id8'", "^request req_8 .*: 99 of its 10 prompt tokens were cached"),
]
# What a request says beyond its tokens and its price: nothing adds up to it.
NO_SUM = {"request_id", "served_model", "outcome", "opened_us", "journal", "is_reserved", "lease_us"}


@pytest.mark.parametrize(("table", "column", "value", "where", "said"), CHANGES)
def test_a_changed_value_is_found(db: Connection, table: str, column: str, value: str, where: str, said: str) -> None:
    assert db.execute(f"UPDATE {table} SET {column} = {value} WHERE {where}") > 0
    with pytest.raises(BrokenBooks, match=said) as caught:
        verify(db)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", ["entries", "head", "balances", "spending", "usage", "requests"])
def test_every_column_of_the_books_is_among_the_changed(tmp_path: Path, table: str) -> None:
    with closing(connect(Place(tmp_path))) as connection:
        columns = {row[1] for row in connection.rows(f"PRAGMA table_info({table})")}
    changed = {column for each, column, *_ in CHANGES if each == table}
    assert changed == columns - (NO_SUM if table == "requests" else set())


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM entries WHERE seq = 1", "^entry 2 of account .*: it follows entry 0"),
        ("DELETE FROM entries WHERE seq = 13", "^head is at entry 13, but the last entry is 12"),
        ("DELETE FROM entries", "^head is at entry 13, but the last entry is 0"),
        ("DELETE FROM head", "^head is missing"),
        ("INSERT INTO head VALUES (2, 0, 0, '')", "^head"),
        ("DELETE FROM balances WHERE account = 'zeta'", "^balance of account zeta: there is no row"),
        ("INSERT INTO balances VALUES ('other', 0)", "^balance of account other"),
        ("DELETE FROM spending WHERE payer = 'acme' AND month = '2026-11'", "^spending of acme in 2026-11"),
        ("INSERT INTO spending VALUES ('other', '2026-11', 0)", "^spending of other in 2026-11"),
        ("INSERT INTO spending VALUES ('acme', '2026-12', 0)", "^spending of acme in 2026-12: there are no entries"),
        ("DELETE FROM usage WHERE account = 'zeta'", "^usage of account zeta.*: there is no row"),
        ("INSERT INTO usage VALUES (60, 'acme', 't', 'm', 0, 0, 0, 0, 0)", "^usage of account acme, token t, model m"),
        ("DELETE FROM requests WHERE id = 'id1'", "^entry .* of account acme: its request id1 is missing"),
        (
            f"INSERT INTO requests ({requests.COLUMNS}) SELECT 'idx', 'req_x', account, token_id, model, served_model, "
            "0, 0, 0, opened_us, journal, is_reserved, lease_us, status, outcome, 0, 0, 0, 0, 0, settled_us "
            "FROM requests WHERE id = 'id1'",
            "^request req_x .*: it is settled and was charged never",
        ),
    ],
)
def test_a_row_that_was_taken_away_or_put_in_is_found(db: Connection, statement: str, said: str) -> None:
    assert db.execute(statement) > 0
    with pytest.raises(BrokenBooks, match=said):
        verify(db)


def test_a_chain_made_anew_over_a_changed_entry_does_not_add_up(db: Connection) -> None:
    """Who can compute hashes can forge the chain; what follows from the entries gives it away all the same."""
    forge(db, lambda entry: entry._replace(amount_nanos=entry.amount_nanos - 1) if entry.seq == 4 else entry)
    with pytest.raises(BrokenBooks, match=r"^balance of account acme"):
        verify(db)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"at_us": NOW - 100 * SECOND}, "^entry 5 of account .*: it is from 2026-10-31 .*, before entry 4"),
        ({"kind": "gift"}, "^entry 5 of account .*: there is no kind 'gift'"),
        ({"kind": "grant"}, "^entry 5 of account .*: a grant with a request"),
        ({"request": None}, "^entry 5 of account .*: a charge without a request"),
    ],
)
def test_an_entry_that_cannot_be_is_found(db: Connection, change: dict[str, Any], said: str) -> None:
    forge(db, lambda entry: entry._replace(**change) if entry.seq == 5 else entry)
    with pytest.raises(BrokenBooks, match=said):
        verify(db)


def test_a_second_charge_for_one_request_is_found(db: Connection) -> None:
    row = requests.of_id(db, "id1")
    assert row is not None
    with db.transaction():
        post(db, [Entry(NOW, row.account, "charge", 0, row.token_id, row.id, row.model)])
    with pytest.raises(BrokenBooks, match=r"^request req_1 .*: it is settled and was charged 2 times"):
        verify(db)


def test_it_holds_while_others_write(place: Place) -> None:
    """Each reading is of one moment, and writers go on meanwhile."""
    done = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        with closing(connect(place)) as connection:
            while not done.is_set():
                some = [record("settlement", written + each, f"acc{each % 3}", f"tok_{each % 5}") for each in range(20)]
                with connection.transaction():
                    requests.apply(connection, some, NOW)
                written += len(some)

    with closing(connect(place)) as connection:
        thread = threading.Thread(target=write)
        thread.start()
        try:
            found = [0]
            while len(found) < 30 or found[-1] < 200:
                found.append(verify(connection).num_requests)
        finally:
            done.set()
            thread.join()
        assert found == sorted(found) and len(set(found)) > 3
        assert verify(connection).num_requests == written


def forge(db: Connection, changed: Any) -> None:
    """Entries as `changed` makes them, in a chain that fits."""
    before = ""
    for row in db.rows(f"SELECT {COLUMNS} FROM entries ORDER BY seq"):
        entry = changed(row_of(row))
        before = entry.chained(before)
        db.execute(
            "UPDATE entries SET at_us = ?, kind = ?, amount_nanos = ?, request = ?, hash = ? WHERE seq = ?",
            (entry.at_us, entry.kind, entry.amount_nanos, entry.request, before, entry.seq),
        )
    db.execute("UPDATE head SET hash = ?", (before,))
