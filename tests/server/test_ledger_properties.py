"""Whatever happens in whatever order: every request is charged exactly once, everything adds up, and nobody spends
more than a hard limit allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octoai.server import accounts, tokens
from octoai.server.accounts import Caller
from octoai.server.billing import Price
from octoai.server.errors import OutOfCredit
from octoai.server.limits import reserve, standings
from octoai.server.store import Connection, Place, connect, requests, reservations
from octoai.server.store.audit import verify
from octoai.server.store.entries import Entry, balance_nanos, post, spent_nanos
from octoai.server.store.requests import NotRefundable, RequestRow
from octoai.server.store.reservations import Reservation

SECOND = 1_000_000
LEASE = 60 * SECOND
START = 1_793_491_140_000_000  # 2026-10-31 23:59:00 UTC: months end while it runs
PRICE = Price(input_nanos=3, cached_input_nanos=1, output_nanos=10)
BUDGET = 900  # about what three requests cost
TABLES = ["entries", "balances", "spending", "usage", "requests", "reservations", "rates", "keys", "tokens", "accounts"]
COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(slots=True)
class Running:
    """A request as its own process sees it, and what the books must say of it."""

    id: str
    caller: Caller
    opened_us: int
    prompt_tokens: int
    cached_tokens: int
    reservation: Reservation | None
    completion_tokens: int = 0
    is_open: bool = True
    pending: list[dict[str, Any]] = field(default_factory=list)  # written, and not yet in the books
    written: list[dict[str, Any]] = field(default_factory=list)  # in the books, in order
    status: str | None = None
    counts: tuple[int, int, int] = (0, 0, 0)

    def record(self, kind: str, now_us: int) -> dict[str, Any]:
        return {
            **{"kind": kind, "id": self.id, "request_id": f"req_{self.id}", "account": self.caller.account.id},
            **{"token_id": self.caller.token.id, "model": "small", "served_model": "small"},
            **{"input_nanos": 3, "cached_input_nanos": 1, "output_nanos": 10, "opened_us": self.opened_us},
            **{"journal": "j", "is_reserved": self.reservation is not None, "lease_us": now_us + LEASE},
            "held_nanos": None if self.reservation is None else self.reservation.nanos,
            **{"prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens},
            **{"completion_tokens": self.completion_tokens, "outcome": "ok", "settled_us": now_us},
        }

    def expect(self, record: dict[str, Any]) -> None:
        """What must be in the books after this record."""
        kind, counts = record["kind"], tuple(record[name] for name in COUNTS)
        if self.status is None:
            self.status = "open"
        if kind == "checkpoint" and self.status == "open":
            self.counts = counts  # type: ignore[assignment]
        if kind == "settlement" and self.status in ("open", "interrupted"):
            self.status, self.counts = "settled", counts  # type: ignore[assignment]


class Ledger(RuleBasedStateMachine):
    """Processes that run requests, a clock that may go back, and the books."""

    def __init__(self, db: Connection) -> None:
        super().__init__()
        self.db = db
        self.now_us = self.pruned_us = START
        self.running: list[Running] = []
        self.chosen: list[Caller] = []
        empty(db)
        with db.transaction():
            self.callers = [
                self.caller("prepaid", is_prepaid=True),
                self.caller("budget", hard_budget_nanos=BUDGET),
                self.caller("both", is_prepaid=True, hard_budget_nanos=BUDGET),
                self.caller("unlimited"),
                self.caller("token", token_budget=BUDGET),
            ]
            self.callers.append(replace(self.callers[0], token=self.token("prepaid", BUDGET // 2)))

    def caller(self, name: str, *, token_budget: int | None = None, is_prepaid: bool = False, **limits: int) -> Caller:
        row = accounts.create(self.db, name, plan="unlimited", is_prepaid=is_prepaid, limits=limits)
        return Caller(row, self.token(name, token_budget))

    def token(self, account: str, budget: int | None) -> Any:
        return tokens.find(self.db, tokens.mint(self.db, "t", account, limits={"hard_budget_nanos": budget}).id)

    # ── what happens ──────────────────────────────────────────────────────────────────────────────────────────────

    @initialize(chosen=st.sets(st.integers(0, 5), min_size=1, max_size=2), portion=st.sampled_from([1, 2, 512]))
    def choose(self, chosen: set[int], portion: int) -> None:
        """Few callers at a time: they are to be in each other's way."""
        self.db.portion = portion
        self.chosen = [self.callers[which] for which in sorted(chosen)]

    @rule(data=st.data(), nanos=st.sampled_from([1, 100, BUDGET, 1500]))
    def grant(self, data: st.DataObject, nanos: int) -> None:
        account = data.draw(st.sampled_from(self.chosen)).account
        with self.db.transaction():
            post(self.db, [Entry(self.now_us, account.id, "grant", nanos)])

    @rule(data=st.data(), prompt=st.integers(0, 10), cached=st.integers(0, 10), most=st.sampled_from([0, 10, 45, 85]))
    def begin(self, data: st.DataObject, prompt: int, cached: int, most: int) -> None:
        caller = data.draw(st.sampled_from(self.chosen))
        new = Running(f"id{len(self.running)}", caller, self.now_us, prompt, min(cached, prompt), None)
        if caller.is_limited:
            ids = (new.id, caller.account.id, caller.token.id)
            wanted = Reservation(*ids, self.now_us, PRICE.most(prompt, most), prompt, most, self.now_us + LEASE)
            before = standings(self.db, caller, self.now_us)
            bounds = [each.left_nanos for each in (before.account, before.token)]
            left = min(each for each in bounds if each is not None)
            try:
                with self.db.transaction():
                    reserve(self.db, caller, wanted)
            except OutOfCredit:
                assert wanted.nanos > left
                return
            assert wanted.nanos <= left
            new.reservation = wanted
        self.running.append(new)
        new.pending.append(new.record("intent", self.now_us))

    @precondition(lambda self: any(each.is_open for each in self.running))
    @rule(data=st.data(), more=st.sampled_from([0, 1, 10, 45, 85]))
    def generate(self, data: st.DataObject, more: int) -> None:
        """It may come to more than was reserved: an engine that counts in another way."""
        one = data.draw(st.sampled_from([each for each in self.running if each.is_open]))
        one.completion_tokens += more
        one.pending.append(one.record("checkpoint", self.now_us))

    @precondition(lambda self: any(each.is_open for each in self.running))
    @rule(data=st.data(), found_cached=st.booleans())
    def end(self, data: st.DataObject, found_cached: bool) -> None:
        """In the end more of the prompt may turn out to have been cached: it comes to less than it was billed for."""
        one = data.draw(st.sampled_from([each for each in self.running if each.is_open]))
        if found_cached:
            one.cached_tokens = one.prompt_tokens
        one.is_open = False
        one.pending.append(one.record("settlement", self.now_us))

    @precondition(lambda self: any(each.is_open and not each.written for each in self.running))
    @rule(data=st.data())
    def never_run(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from([each for each in self.running if each.is_open and not each.written]))
        one.is_open = False
        one.pending.clear()
        with self.db.transaction():
            reservations.release(self.db, one.id)

    @rule(data=st.data(), num=st.integers(1, 12))
    def write(self, data: st.DataObject, num: int) -> None:
        """Some of what is pending, in any order across requests; each one's own in order."""
        batch = []
        for _ in range(num):
            some = [each for each in self.running if each.pending]
            if not some:
                break
            one = data.draw(st.sampled_from(some))
            batch.append(one.pending.pop(0))
            one.written.append(batch[-1])
            one.expect(batch[-1])
        self.apply(batch)

    @precondition(lambda self: any(each.written for each in self.running))
    @rule(data=st.data())
    def write_again(self, data: st.DataObject) -> None:
        """What is in the books already, from anywhere, as it comes."""
        records = [record for each in self.running for record in each.written]
        start = data.draw(st.integers(0, len(records) - 1))
        batch = records[start : start + data.draw(st.integers(1, 20))]
        self.apply(data.draw(st.permutations(batch)) if data.draw(st.booleans()) else batch)

    @rule(seconds=st.sampled_from([0.000001, 0.5, 20, 59.999999, 60, 61, 3600]))
    def wait(self, seconds: float) -> None:
        self.now_us += round(seconds * SECOND)

    @rule(seconds=st.sampled_from([0.000001, 1, 45, 90, 4000]))
    def clock_goes_back(self, seconds: float) -> None:
        self.now_us = max(START, self.now_us - round(seconds * SECOND))

    @rule()
    def expire(self) -> None:
        with self.db.transaction():
            self.interrupt(requests.expired(self.db, self.now_us))

    @rule()
    def process_dies(self) -> None:
        """What it had written is found by who comes after; what it had not is lost."""
        for each in self.running:
            each.is_open = False
        with self.db.transaction():
            self.interrupt(requests.open_of_journal(self.db, "j"))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.running))
        with self.db.transaction():
            found = requests.named(self.db, f"req_{one.id}")
            assert [row.id for row in found] == ([one.id] if one.status else [])
            for row in found:
                try:
                    requests.refund(self.db, row, "sorry", self.now_us)
                    one.status = "refunded"
                except NotRefundable:
                    assert one.status in ("open", "refunded")

    @rule()
    def tidy(self) -> None:
        with self.db.transaction():
            reservations.prune(self.db, self.now_us)
        self.pruned_us = max(self.pruned_us, self.now_us)

    def apply(self, batch: list[dict[str, Any]]) -> None:
        with self.db.transaction():
            requests.apply_in_portions(self.db, batch, self.now_us)

    def interrupt(self, rows: list[RequestRow]) -> None:
        requests.interrupt(self.db, rows, self.now_us)
        ids = {row.id for row in rows}
        for each in self.running:
            if each.id in ids:
                assert each.status == "open"
                each.status = "interrupted"

    # ── what holds ────────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def the_books_are_whole(self) -> None:
        """Balances are the sum of entries, usage and requests are what entries say, each is charged exactly once."""
        report = verify(self.db)
        assert report.num_requests == sum(each.status is not None for each in self.running)
        assert report.num_open == sum(each.status == "open" for each in self.running)

    @invariant()
    def every_request_is_as_it_was_written(self) -> None:
        names = ", ".join(COUNTS)
        found = {row[0]: row[1:] for row in self.db.rows(f"SELECT id, status, {names} FROM requests")}
        assert found == {each.id: (each.status, *each.counts) for each in self.running if each.status}

    @invariant()
    def tokens_add_up_to_usage(self) -> None:
        used = self.db.row(f"SELECT {', '.join(f'COALESCE(SUM({name}), 0)' for name in COUNTS)} FROM usage")
        ended = [each.counts for each in self.running if each.status not in (None, "open")]
        assert used == tuple(map(sum, zip(*ended, strict=True))) or (not ended and used == (0, 0, 0))

    @invariant()
    def nobody_is_over_a_hard_limit(self) -> None:
        for caller in self.callers:
            if caller.account.is_prepaid:
                assert balance_nanos(self.db, caller.account.id) >= 0
            for payer in (caller.account, caller.token):
                budget = payer.limits.hard_budget_nanos
                if budget is not None:
                    spent = self.db.rows("SELECT nanos FROM spending WHERE payer = ?", (payer.id,))
                    assert all(nanos <= budget for (nanos,) in spent)

    @invariant()
    def without_limits_nothing_is_waived(self) -> None:
        query = "SELECT SUM(waived_nanos) FROM requests WHERE account = 'unlimited' AND status <> 'refunded'"
        assert self.db.row(query) in ((0,), (None,))

    @invariant()
    def each_second_counts_what_was_asked_in_it(self) -> None:
        sums = "COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), MAX(at_us)"
        query = f"SELECT account, at_us / {SECOND}, {sums} FROM reservations GROUP BY 1, 2"
        pruned = (self.pruned_us - 120 * SECOND) // SECOND
        asked = {tuple(row) for row in self.db.rows(query) if row[1] > pruned}
        accounts = {caller.account.id for caller in self.callers}
        kept = self.db.rows("SELECT * FROM rates WHERE num_requests > 0 AND second > ?", (pruned,))
        assert {tuple(row) for row in kept if row[0] in accounts} == asked

    @invariant()
    def what_ended_holds_nothing(self) -> None:
        ended = (
            "SELECT r.id FROM requests r JOIN reservations v ON v.id = r.id WHERE r.status <> 'open' AND v.is_open = 1"
        )
        assert self.db.rows(ended) == []


def empty(db: Connection) -> None:
    with db.transaction():
        for table in TABLES:
            db.execute(f"DELETE FROM {table}")
        db.execute("UPDATE head SET seq = 0, at_us = 0, hash = ''")


def run(place: Place, **limits: int) -> None:
    with closing(connect(place)) as db:
        db.set_durable(False)
        machine: Callable[[], RuleBasedStateMachine] = lambda: Ledger(db)  # noqa: E731
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        chosen = settings(deadline=None, suppress_health_check=checks, **limits)  # type: ignore[arg-type]
        run_state_machine_as_test(machine, settings=chosen)  # type: ignore[no-untyped-call]


def test_any_interleaving_keeps_the_books(tmp_path: Path) -> None:
    run(Place(tmp_path), max_examples=60, stateful_step_count=40)


def test_any_interleaving_keeps_the_books_in_postgres(tmp_path: Path, postgres_url: str) -> None:
    run(Place(tmp_path, postgres_url), max_examples=10, stateful_step_count=30)


# ── what was thought of, by hand ──────────────────────────────────────────────────────────────────────────────────────


class Table:
    """One account and its requests, each worth ten nano-dollars a completion token."""

    def __init__(self, place: Place, *, budget: int | None = BUDGET, credit: int | None = None) -> None:
        self.db = connect(place)
        with self.db.transaction():
            limits = {"hard_budget_nanos": budget}
            row = accounts.create(self.db, "a", plan="unlimited", is_prepaid=credit is not None, limits=limits)
            token = tokens.find(self.db, tokens.mint(self.db, "t", "a").id)
            post(self.db, [Entry(START, "a", "grant", credit)] if credit else [])
        self.caller = Caller(row, token)

    def begin(self, name: str, at_us: int, most: int = BUDGET // 10) -> Running:
        """Reserved and open in the books."""
        ids = (name, "a", self.caller.token.id)
        held = Reservation(*ids, at_us, 10 * most, 0, most, at_us + LEASE)
        with self.db.transaction():
            reserve(self.db, self.caller, held)
        new = Running(name, self.caller, at_us, 0, 0, held)
        self.write(new, "intent", at_us)
        return new

    def write(self, one: Running, kind: str, at_us: int, completion_tokens: int = 0, now_us: int | None = None) -> None:
        one.completion_tokens = completion_tokens
        self.apply([one.record(kind, at_us)], at_us if now_us is None else now_us)

    def apply(self, records: list[dict[str, Any]], now_us: int) -> None:
        with self.db.transaction():
            requests.apply(self.db, records, now_us)

    def expire(self, now_us: int) -> None:
        with self.db.transaction():
            requests.interrupt(self.db, requests.expired(self.db, now_us), now_us)

    def row(self, name: str) -> tuple[str, int, int]:
        """Its status, its cost and what was waived; the books are whole."""
        verify(self.db)
        found = requests.of_id(self.db, name)
        assert found is not None
        return (found.status, found.cost_nanos, found.waived_nanos)

    def spent(self, month: str) -> int:
        return spent_nanos(self.db, "a", month)


@pytest.fixture
def table(place: Place) -> Iterator[Callable[..., Table]]:
    made: list[Table] = []

    def make(**limits: int | None) -> Table:
        made.append(Table(place, **limits))
        return made[-1]

    yield make
    for each in made:
        each.db.close()


LATER = START + LEASE + 1  # when a lease of START is over


def test_money_that_went_to_another_is_waived(table: Callable[..., Table]) -> None:
    books = table()
    late, quick = books.begin("late", START), books.begin("quick", LATER)
    books.write(late, "settlement", LATER, 50)
    assert books.row("late") == ("settled", 0, 500)
    books.write(quick, "settlement", LATER, 90)
    assert books.row("quick") == ("settled", 900, 0)


def test_what_is_late_pays_where_there_is_money(table: Callable[..., Table]) -> None:
    books = table()
    late = books.begin("late", START)
    books.begin("quick", LATER, 60)
    books.write(late, "settlement", LATER, 50)
    assert books.row("late") == ("settled", 300, 200)


def test_a_late_sign_of_life_takes_nothing_back(table: Callable[..., Table]) -> None:
    books = table()
    late, quick = books.begin("late", START), books.begin("quick", LATER)
    books.write(late, "checkpoint", LATER, 80)
    books.write(late, "settlement", LATER + 1, 90)
    books.write(quick, "settlement", LATER + 2, 90)
    assert (books.row("late"), books.row("quick")) == (("settled", 0, 900), ("settled", 900, 0))


def test_a_clock_that_goes_back_brings_no_lease_to_life(table: Callable[..., Table]) -> None:
    books = table()
    late, quick = books.begin("late", START), books.begin("quick", LATER)
    books.write(late, "settlement", START + 1, 90)
    books.write(quick, "settlement", START + 2, 90)
    assert (books.row("late"), books.row("quick")) == (("settled", 0, 900), ("settled", 900, 0))


def test_what_was_held_from_a_month_is_charged_to_none_before(table: Callable[..., Table]) -> None:
    """October is used up, November is not; then the clock goes back."""
    books = table()
    books.write(books.begin("first", START), "settlement", START, 90)
    second = books.begin("second", START + LEASE)
    books.write(second, "settlement", START + 1, 90)
    assert books.row("second") == ("settled", 900, 0)
    assert (books.spent("2026-10"), books.spent("2026-11")) == (900, 900)


def test_a_settlement_that_comes_in_late_is_bounded_by_its_own_month(table: Callable[..., Table]) -> None:
    """The database was away over midnight: what was settled in October is October's."""
    books = table()
    first, second = books.begin("first", START, 45), books.begin("second", START, 45)
    books.write(first, "settlement", START + 1, 90, now_us=LATER)
    books.write(second, "settlement", START + 2, 45, now_us=LATER)
    assert (books.row("first"), books.row("second")) == (("settled", 900, 0), ("settled", 0, 450))
    assert (books.spent("2026-10"), books.spent("2026-11")) == (900, 0)


def test_more_than_was_reserved_is_charged_where_there_is_room(table: Callable[..., Table]) -> None:
    books = table(budget=None, credit=1000)
    first, second = books.begin("first", START, 10), books.begin("second", START, 80)
    books.write(first, "settlement", START, 50)
    assert books.row("first") == ("settled", 200, 300)
    books.write(second, "settlement", START, 90)
    assert books.row("second") == ("settled", 800, 100)
    assert balance_nanos(books.db, "a") == 0


def test_several_settlements_of_one_batch_see_each_other(table: Callable[..., Table]) -> None:
    books = table(budget=None, credit=1000)
    some = [books.begin(name, START, 30) for name in ("x", "y", "z")]
    for one in some:
        one.completion_tokens = 50
    books.apply([one.record("settlement", LATER) for one in some], LATER)
    assert [books.row(name)[1] for name in ("x", "y", "z")] == [500, 500, 0]
    assert balance_nanos(books.db, "a") == 0


def test_a_correction_to_less_gives_back_what_was_charged(table: Callable[..., Table]) -> None:
    books = table()
    one = books.begin("one", START)
    books.write(one, "checkpoint", START, 50)
    books.expire(LATER + LEASE)
    assert books.row("one") == ("interrupted", 500, 0)
    books.write(one, "settlement", LATER + LEASE, 20)
    assert books.row("one") == ("settled", 200, 0)


def test_a_correction_to_less_takes_from_what_was_waived_first(table: Callable[..., Table]) -> None:
    books = table()
    one = books.begin("one", START)
    books.write(one, "checkpoint", START, 50)
    books.begin("two", LATER, 60)
    books.expire(LATER)
    assert books.row("one") == ("interrupted", 300, 200)
    books.write(one, "settlement", LATER, 40)
    assert books.row("one") == ("settled", 300, 100)


def test_a_corrected_request_is_refunded_whole(table: Callable[..., Table]) -> None:
    books = table()
    one = books.begin("one", START)
    books.write(one, "checkpoint", START, 50)
    books.expire(LATER)
    books.write(one, "settlement", LATER, 70)
    assert books.row("one") == ("settled", 700, 0)
    with books.db.transaction():
        (row,) = requests.named(books.db, "req_one")
        requests.refund(books.db, row, "sorry", LATER)
    assert books.row("one") == ("refunded", 0, 700)
    assert balance_nanos(books.db, "a") == 0
    books.write(one, "settlement", LATER, 70)
    assert books.row("one") == ("refunded", 0, 700)


def test_a_reservation_that_is_not_there_holds_nothing(table: Callable[..., Table]) -> None:
    """It was admitted while the database was away."""
    books = table()
    one = books.begin("one", START)
    reservations.release(books.db, "one")
    books.begin("two", START, 50)
    books.write(one, "settlement", START, 90)
    assert books.row("one") == ("settled", 400, 500)


@pytest.mark.parametrize("last", ["settlement", "checkpoint"])
def test_what_a_database_lost_with_its_reservation_is_charged_as_it_was_held(
    table: Callable[..., Table], last: str
) -> None:
    """It went back to before the request, and to before its budget was raised."""
    books = table(budget=0)
    one = Running(
        "one", books.caller, START, 0, 0, Reservation("one", "a", books.caller.token.id, START, 900, 0, 90, 0)
    )
    one.completion_tokens = 50
    written = [one.record(kind, START) for kind in dict.fromkeys(("intent", "checkpoint", last))]
    for number in range(1, len(written) + 1):
        for _ in range(2):  # read again, it changes nothing
            books.apply(written[:number], LATER)
    assert standings(books.db, books.caller, LATER).account.held_nanos == (900 if last == "checkpoint" else 0)
    books.expire(LATER + LEASE)
    assert books.row("one") == ("settled" if last == "settlement" else "interrupted", 500, 0)
    books.apply(written, LATER + LEASE)
    assert books.row("one")[1:] == (500, 0)


def test_more_than_a_lost_reservation_held_is_waived_where_nothing_is_left(table: Callable[..., Table]) -> None:
    books = table(budget=0)
    one = Running(
        "one", books.caller, START, 0, 0, Reservation("one", "a", books.caller.token.id, START, 300, 0, 30, 0)
    )
    books.write(one, "settlement", START, 50)
    assert books.row("one") == ("settled", 300, 200)


def test_what_has_lapsed_is_not_held_again_once_it_is_old(table: Callable[..., Table]) -> None:
    """Its process was cut off for an hour before it had written anything; what it held went to another."""
    books = table()
    ids, hour = ("late", "a", books.caller.token.id), 3600 * SECOND
    late = Running("late", books.caller, START, 0, 0, Reservation(*ids, START, 900, 0, 90, START + LEASE))
    assert late.reservation is not None
    with books.db.transaction():
        reserve(books.db, books.caller, late.reservation)
    books.write(books.begin("quick", LATER), "settlement", LATER, 90)
    with books.db.transaction():
        assert not reservations.prune(books.db, LATER + hour)
    late.completion_tokens = 50
    books.apply([late.record("intent", START)], LATER + hour)
    books.apply([late.record("settlement", LATER)], LATER + hour)
    assert (books.row("late"), books.row("quick")) == (("settled", 0, 500), ("settled", 900, 0))


def test_who_the_database_does_not_know_is_bounded_by_nothing_of_its_own(table: Callable[..., Table]) -> None:
    """An account, or a token, made after the backup that the database is now; of a journal that says nothing of what
    was held."""
    books = table()
    for number, (account, token) in enumerate([("a", "tok_new"), ("new", "tok_newer")]):
        one = Running(f"id{number}", books.caller, START, 0, 0, None, 50)
        record = one.record("settlement", START) | {"account": account, "token_id": token, "is_reserved": True}
        books.apply([record], START)
        assert books.row(f"id{number}") == ("settled", 500, 0)
    books.apply([record | {"id": "id2", "request_id": "req_id2", "account": "a"}], START)
    assert books.row("id2") == ("settled", 400, 100)


def test_checkpoints_that_are_read_again_take_nothing_back(table: Callable[..., Table]) -> None:
    books = table()
    one = books.begin("one", START)
    books.write(one, "checkpoint", START, 10)
    old = one.record("checkpoint", START)
    books.write(one, "checkpoint", START + LEASE, 50)
    books.apply([one.record("intent", START), old, one.record("checkpoint", START)], START + LEASE)
    books.expire(START + LEASE + LEASE)
    assert books.row("one") == ("open", 0, 0)
    books.expire(START + LEASE + LEASE + 1)
    assert books.row("one") == ("interrupted", 500, 0)


def test_a_settlement_is_enough(table: Callable[..., Table]) -> None:
    books = table(budget=None)
    one = Running("one", books.caller, START, 5, 5, None)
    books.write(one, "checkpoint", START, 10)
    assert requests.of_id(books.db, "one") is None
    for _ in range(2):
        books.write(one, "settlement", START, 10)
        assert books.row("one") == ("settled", 105, 0)


def test_nothing_is_charged_where_nothing_was_used(table: Callable[..., Table]) -> None:
    books = table(budget=0)
    one = books.begin("one", START, 0)
    books.write(one, "settlement", START, 0)
    assert books.row("one") == ("settled", 0, 0)
    assert books.db.row("SELECT kind, amount_nanos FROM entries") == ("charge", 0)
