"""A minute counted by the second is what was asked in it, and takes no more steps for many requests than for few."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octoai.server.limits import _KINDS, _seconds_until
from octoai.server.store import Connection, Place, connect, rates, reservations
from octoai.server.store.accounts import Limits
from octoai.server.store.reservations import Reservation, _standing
from octoai.server.store.schema import MIGRATIONS, statements
from octoai.server.times import MINUTE_US
from tests.server.settling import num_steps

NOW = 1_793_491_197_500_000
SECOND = 1_000_000
COLUMNS = (("account", "acme"), ("account", "other"), ("token_id", "tok_1"), ("token_id", "tok_2"))
# Times at the very ends of windows and seconds, and anywhere.
_edges = st.sampled_from([0, 1, -1, SECOND, -SECOND, MINUTE_US, -MINUTE_US, MINUTE_US - 1, 1 - MINUTE_US, -499_999])
_times = st.one_of(_edges, st.integers(-2 * MINUTE_US, 2 * MINUTE_US), st.integers(-3 * SECOND, 3 * SECOND))
_tokens = st.integers(0, 50)
_asked = st.tuples(st.sampled_from(["acme", "other"]), st.sampled_from(["tok_1", "tok_2"]), _times, _tokens, _tokens)
_then = st.sampled_from(["stays", "ends", "ends twice", "never ran"])


def counted(db: Connection, column: str, payer: str, now_us: int) -> list[tuple[int, int, int]]:
    """The last minute's requests one by one: when, and their tokens."""
    query = (
        f"SELECT at_us, prompt_tokens, completion_tokens FROM reservations "
        f"WHERE {column} = ? AND at_us > ? AND at_us < ? ORDER BY at_us"
    )
    return [tuple(row) for row in db.rows(query, (payer, now_us - MINUTE_US, now_us + MINUTE_US))]


def grouped(db: Connection) -> list[tuple[Any, ...]]:
    """What is to be in `rates`."""
    columns = "COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), MAX(at_us)"
    return sorted(
        tuple(row)
        for payer in ("account", "token_id")
        for row in db.rows(f"SELECT {payer}, at_us / 1000000, {columns} FROM reservations GROUP BY 1, 2")
    )


def kept(db: Connection) -> list[tuple[Any, ...]]:
    return sorted(map(tuple, db.rows("SELECT * FROM rates WHERE num_requests > 0")))


def fill(db: Connection, asked: Sequence[tuple[tuple[str, str, int, int, int], str]]) -> None:
    with db.transaction():
        for number, ((account, token, offset, prompt, completion), then) in enumerate(asked):
            one = Reservation(f"id{number}", account, token, NOW + offset, 5, prompt, completion, NOW + MINUTE_US)
            reservations.hold(db, one)
            if then == "never ran":
                reservations.release(db, one.id)
            for _ in range({"ends": 1, "ends twice": 2}.get(then, 0)):
                reservations.close(db, one.id, prompt // 2, completion // 3)
        reservations.release(db, "nobody")
        reservations.close(db, "nobody", 1, 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(asked=st.lists(st.tuples(_asked, _then), max_size=25), moments=st.lists(_times, min_size=1, max_size=4))
def test_seconds_and_single_requests_come_to_the_same(place: Place, asked: list[Any], moments: list[int]) -> None:
    with closing(connect(place)) as db:
        with db.transaction():
            db.execute("DELETE FROM reservations")
            db.execute("DELETE FROM rates")
        fill(db, asked)
        assert kept(db) == grouped(db)
        for column, payer in COLUMNS:
            for offset in moments:
                now_us = NOW + offset
                singly = counted(db, column, payer, now_us)
                sums = [sum(column) for column in zip(*singly, strict=True)][1:] or [0, 0]
                query, parameters = rates.recent(column, payer, now_us)  # type: ignore[arg-type]
                newest = singly[-1][0] if singly else 0
                assert db.row(query, parameters) == (len(singly), *sums, newest)
                check_room(db, column, payer, now_us, singly)
        with db.transaction():
            while reservations.prune(db, NOW + MINUTE_US):
                pass
        assert all(second >= (NOW - MINUTE_US) // SECOND for _, second, *_ in kept(db))


def check_room(db: Connection, column: str, payer: str, now_us: int, singly: list[tuple[int, int, int]]) -> None:
    """There is room for so much more at the microsecond at which it is, going by one request after the other."""
    for number, kind in enumerate(_KINDS):
        counts = [(at_us, (1, prompt, completion)[number]) for at_us, prompt, completion in singly]
        for excess in {1, 2, 30, sum(count for _, count in counts)} - {0}:
            left, room_us = excess, now_us
            for at_us, count in counts:
                left, room_us = left - count, at_us
                if left <= 0:
                    break
            wanted = (room_us + MINUTE_US - now_us) / SECOND if left <= 0 else MINUTE_US / SECOND
            past = rates.past(db, column, payer, now_us)  # type: ignore[arg-type]
            assert _seconds_until(excess, past, kind, now_us) == wanted


@pytest.mark.parametrize("column", ["account", "token_id"])
def test_many_requests_are_counted_in_few_steps(tmp_path: Path, column: str) -> None:
    """Some ten steps of SQLite's for each request of the last minute: with 60,000 it took 75 ms, in which nobody else's
    limits were looked at."""
    payer = "acme" if column == "account" else "tok_1"

    def check(db: Connection) -> None:
        _standing(db, column, payer, Limits(), NOW, "2026-10")  # type: ignore[arg-type]
        _seconds_until(1000, rates.past(db, column, payer, NOW), _KINDS[0], NOW)  # type: ignore[arg-type]
        reservations.lapse(db, "acme", NOW)

    num = 20_000
    with closing(connect(Place(tmp_path))) as db:
        asked = [("acme", "tok_1", -number * MINUTE_US // num, 1, 1) for number in range(num)]
        fill(db, [(each, "ends") for each in asked])
        assert num_steps(db, lambda: check(db)) < num / 2


def test_old_requests_and_their_seconds_go_a_few_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2,000 requests a second, to delete those of ten seconds kept everybody else from writing for 0.2 s."""
    for table in (rates, reservations):
        monkeypatch.setattr(table, "PRUNED_AT_ONCE", 7)
    old = [("acme", f"tok_{number % 3}", -number * SECOND // 4, 1, 1) for number in range(40)]
    with closing(connect(place)) as db:
        fill(db, [(each, "ends") for each in old])
        while True:
            before, seconds = rows(db), kept(db)
            with db.transaction():
                is_more = reservations.prune(db, NOW + 3 * MINUTE_US)
            deleted = before - rows(db)
            assert len(deleted) <= 7 and max(deleted, default=(0,)) <= min(rows(db), default=(NOW + 1,))
            assert len(seconds) - len(kept(db)) <= 7
            assert len(kept(db)) == len(seconds) or not rows(db)  # no second goes before its requests
            if not is_more:
                break
        assert rows(db) == set() and kept(db) == []


def rows(db: Connection) -> set[tuple[int, str]]:
    return {(at_us, id_) for at_us, id_ in db.rows("SELECT at_us, id FROM reservations")}


def test_seconds_go_whole_with_their_requests(place: Place) -> None:
    with closing(connect(place)) as db:
        fill(db, [(("acme", "tok_1", offset, 3, 4), "ends") for offset in (-SECOND, -400_000, -100_000, 0, 400_000)])
        with db.transaction():
            assert not reservations.prune(db, NOW + 2 * MINUTE_US)
        assert len(rows(db)) == 4 and kept(db) == grouped(db)


def test_one_that_runs_is_not_old(place: Place) -> None:
    with closing(connect(place)) as db:
        fill(db, [(("acme", "tok_1", 0, 1, 1), "stays")])  # with a lease of a minute
        for minutes, num in ((3, 1), (24 * 60 + 1, 1), (24 * 60 + 1.01, 0)):  # what has lapsed is known for a day
            with db.transaction():
                reservations.prune(db, NOW + int(minutes * MINUTE_US))
            assert len(rows(db)) == num


def test_looking_for_old_ones_takes_few_steps_whatever_counts(tmp_path: Path) -> None:
    num = 5_000
    with closing(connect(Place(tmp_path))) as db:
        fill(db, [(("acme", f"tok_{number}", -number * MINUTE_US // num, 1, 1), "ends") for number in range(num)])
        assert num_steps(db, lambda: reservations.prune(db, NOW)) < num / 10


def test_those_of_the_minute_before_an_upgrade_are_counted(place: Place) -> None:
    dialect = "sqlite" if place.url is None else "postgres"
    with closing(connect(place)) as db:
        fill(db, [(("acme", "tok_1", -number * SECOND, 3, 4), "stays") for number in range(5)])
        before = kept(db)
        migrated = [each for migration in MIGRATIONS for each in statements(migration, dialect)]
        fillings = [each for each in migrated if each.startswith("INSERT INTO rates")]
        with db.transaction():
            db.execute("DELETE FROM rates")
            for each in fillings:
                db.execute(each)
        assert len(before) == 10 and kept(db) == before
