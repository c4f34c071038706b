"""What requests are charged where leases end, months change and records come late: what was thought of, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from octoai.server import accounts, tokens
from octoai.server.accounts import Caller
from octoai.server.limits import reserve, standings
from octoai.server.store import Place, connect, requests, reservations
from octoai.server.store.audit import verify
from octoai.server.store.entries import Entry, balance_nanos, post, spent_nanos
from octoai.server.store.reservations import Reservation
from tests.server.requested import BUDGET, LEASE, SECOND, START, Running


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


def test_a_dead_process_is_billed_by_its_last_checkpoint_though_its_lease_ran_out_before(
    table: Callable[..., Table],
) -> None:
    books = table()
    one = books.begin("one", START, 20)
    books.write(one, "checkpoint", START, 10)
    books.begin("two", LATER, 30)  # takes what was held
    books.expire(LATER)
    assert books.row("one") == ("interrupted", 100, 0)
    late = list[dict[str, Any]]()
    for completion_tokens in (5, 50, 70):
        one.completion_tokens = completion_tokens
        late.append(one.record("checkpoint", START))
    for records in (late[:2], late[:2], late, late[:1]):  # read again, it changes nothing
        with books.db.transaction():
            requests.correct(books.db, records, LATER)
    assert books.row("one") == ("interrupted", 600, 100)  # all that two does not hold
    books.write(one, "settlement", LATER, 40)
    assert books.row("one") == ("settled", 400, 0)


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
