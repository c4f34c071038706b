"""Limits hold exactly: to the microsecond, to the token and to the nano-dollar, and for any number of threads."""

from __future__ import annotations

import re
import threading
from calendar import timegm
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server import accounts, tokens
from octoai.server.accounts import Caller
from octoai.server.errors import OutOfCredit, RateLimited
from octoai.server.limits import Standings, _uncovered, duration, reserve, standings
from octoai.server.store import Connection, Place, connect, requests, reservations
from octoai.server.store.accounts import Limits
from octoai.server.store.entries import Entry, month_of, post, spent_nanos
from octoai.server.store.reservations import Reservation, Standing

SECOND = 1_000_000
MINUTE = 60 * SECOND
NOW = 1_793_491_197_000_000  # 2026-10-31 23:59:57 UTC
NOVEMBER = timegm((2026, 11, 1, 0, 0, 0)) * SECOND


class Desk:
    """Reserves for one caller. Requests are numbered."""

    def __init__(
        self, db: Connection, account: Limits | None = None, token: Limits | None = None, **more: bool
    ) -> None:
        self.db = db
        with db.transaction():
            row = accounts.create(db, "acme", plan="unlimited", **more)  # type: ignore[arg-type]
            minted = tokens.mint(db, "t", "acme")
        account_row = replace(row, limits=account or Limits())
        self.caller = Caller(account_row, replace(tokens.find(db, minted.id), limits=token or Limits()))
        self.number = 0
        self.newest = ""

    def wanted(self, at_us: int, nanos: int = 0, prompt: int = 0, completion: int = 0) -> Reservation:
        self.number += 1
        ids = (f"id{self.number}", "acme", self.caller.token.id)
        return Reservation(*ids, at_us, nanos, prompt, completion, at_us + MINUTE)

    def ask(self, at_us: int, nanos: int = 0, prompt: int = 0, completion: int = 0) -> Standings:
        wanted = self.wanted(at_us, nanos, prompt, completion)
        with self.db.transaction():
            held = reserve(self.db, self.caller, wanted)
        assert held == standings(self.db, self.caller, at_us)
        self.newest = wanted.id
        return held

    def refused(self, at_us: int, nanos: int = 0, prompt: int = 0, completion: int = 0) -> RateLimited:
        with pytest.raises(RateLimited) as caught:
            self.ask(at_us, nanos, prompt, completion)
        return caught.value

    def broke(self, at_us: int, nanos: int) -> str:
        with pytest.raises(OutOfCredit) as caught:
            self.ask(at_us, nanos)
        assert caught.value.headers["x-should-retry"] == "false"
        return caught.value.message

    def end(self, at_us: int, nanos: int = 0, prompt: int = 0, completion: int = 0) -> None:
        """The newest request that was let through is charged so much."""
        with self.db.transaction():
            reservations.close(self.db, self.newest, prompt, completion)
            charge = Entry(at_us, "acme", "charge", -nanos, self.caller.token.id, self.newest, "small")
            post(self.db, [charge])

    def add(self, nanos: int, kind: str = "grant", at_us: int = NOW) -> None:
        with self.db.transaction():
            post(self.db, [Entry(at_us, "acme", kind, nanos)])

    def headers(self, at_us: int) -> dict[str, str]:
        return standings(self.db, self.caller, at_us).headers()


@pytest.fixture
def desk(place: Place) -> Iterator[Callable[..., Desk]]:
    with closing(connect(place)) as db:
        yield lambda *args, **more: Desk(db, *args, **more)


def later(at_us: int, refusal: RateLimited) -> int:
    """When `retry_after` is over."""
    assert refusal.retry_after is not None
    return at_us + round(refusal.retry_after * SECOND)


SIDES = pytest.mark.parametrize("side", ["account", "token"])


@SIDES
def test_a_window_is_sixty_seconds_to_the_microsecond(desk: Callable[..., Desk], side: str) -> None:
    asking = desk(**{side: Limits(requests_per_minute=2)})
    asking.ask(NOW)
    asking.ask(NOW + 7)
    refusal = asking.refused(NOW + 8)
    assert side in refusal.message and refusal.type == "requests"
    assert refusal.message.startswith(f"Limit of requests a minute of this {side}: 2, used 2, requested 1.")
    assert later(NOW + 8, refusal) == NOW + MINUTE
    assert later(NOW + MINUTE - 1, asking.refused(NOW + MINUTE - 1)) == NOW + MINUTE
    asking.ask(NOW + MINUTE)
    assert later(NOW + MINUTE, asking.refused(NOW + MINUTE)) == NOW + MINUTE + 7
    asking.refused(NOW + MINUTE + 6)
    asking.ask(NOW + MINUTE + 7)


def test_what_was_refused_counts_for_nothing(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(requests_per_minute=1, prompt_tokens_per_minute=100))
    for _ in range(5):
        asking.refused(NOW, prompt=101)
    asking.ask(NOW, prompt=100)


@pytest.mark.parametrize("kind", ["prompt", "completion"])
@SIDES
def test_tokens_leave_the_window_as_they_came(desk: Callable[..., Desk], side: str, kind: str) -> None:
    asking = desk(**{side: Limits(**{f"{kind}_tokens_per_minute": 100})})
    asking.ask(NOW, **{kind: 30})
    asking.ask(NOW + 10, **{kind: 30})
    asking.ask(NOW + 20, **{kind: 40})
    for more, freed_by in ((1, 0), (30, 0), (31, 10), (60, 10), (61, 20), (100, 20)):
        refusal = asking.refused(NOW + 30, **{kind: more})
        assert refusal.type == "tokens"
        assert later(NOW + 30, refusal) == NOW + freed_by + MINUTE
    asking.refused(NOW + 10 + MINUTE - 1, **{kind: 60})
    asking.ask(NOW + 10 + MINUTE, **{kind: 60})


def test_tokens_that_were_not_needed_are_free_again(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(completion_tokens_per_minute=100))
    asking.ask(NOW, completion=100)
    asking.refused(NOW, completion=1)
    asking.end(NOW + 1, completion=40)
    asking.ask(NOW + 2, completion=60)
    asking.refused(NOW + 2, completion=1)


def test_retry_after_is_when_everything_has_room(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(requests_per_minute=2, prompt_tokens_per_minute=100), Limits(completion_tokens_per_minute=50))
    asking.ask(NOW, prompt=10)
    asking.ask(NOW + 5, prompt=90, completion=50)
    refusal = asking.refused(NOW + 9, prompt=50, completion=1)  # requests have room first
    at_us = later(NOW + 9, refusal)
    assert at_us == NOW + 5 + MINUTE
    asking.refused(at_us - 1, prompt=50, completion=1)
    asking.ask(at_us, prompt=50, completion=1)


@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        (Limits(requests_per_minute=0), {}),
        (Limits(concurrent_requests=0), {}),
        (Limits(prompt_tokens_per_minute=10), {"prompt": 11}),
        (Limits(completion_tokens_per_minute=0), {"completion": 1}),
    ],
)
def test_what_never_has_room_says_so(desk: Callable[..., Desk], limits: Limits, asked: dict[str, int]) -> None:
    refusal = desk(limits).refused(NOW, **asked)
    assert refusal.retry_after is None
    assert refusal.headers == {"x-should-retry": "false"}


def test_no_tokens_a_minute_let_a_request_without_tokens_through(desk: Callable[..., Desk]) -> None:
    desk(Limits(prompt_tokens_per_minute=0, completion_tokens_per_minute=0)).ask(NOW)


@SIDES
def test_requests_at_once(desk: Callable[..., Desk], side: str) -> None:
    asking = desk(**{side: Limits(concurrent_requests=2)})
    asking.ask(NOW)
    asking.ask(NOW)
    refusal = asking.refused(NOW + 1)
    assert refusal.type == "requests" and refusal.retry_after == 1.0
    assert refusal.message.startswith(f"Limit of requests at once of this {side}: 2, running 2.")
    asking.refused(NOW + MINUTE)  # their leases hold to the last microsecond
    assert asking.newest == "id2"
    asking.end(NOW + 2)
    asking.ask(NOW + 3)
    asking.refused(NOW + 3)
    asking.ask(NOW + MINUTE + 1)  # the first is not heard of any more


def test_the_token_of_an_account_is_limited_for_itself(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(requests_per_minute=3), Limits(requests_per_minute=2))
    other = replace(asking.caller.token, id="tok_other")
    asking.ask(NOW)
    asking.ask(NOW)
    assert "of this token" in asking.refused(NOW).message
    asking.caller = Caller(asking.caller.account, other)
    asking.ask(NOW)
    assert "of this account" in asking.refused(NOW).message


def test_headers_tell_the_tighter_of_the_two(desk: Callable[..., Desk]) -> None:
    asking = desk(
        Limits(requests_per_minute=240, prompt_tokens_per_minute=1000),
        Limits(requests_per_minute=10, completion_tokens_per_minute=100),
    )
    assert asking.headers(NOW)["x-ratelimit-reset-requests"] == "0ms"
    asking.ask(NOW, prompt=400, completion=90)
    assert asking.headers(NOW + 500_000) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "59.5s",
        "x-ratelimit-limit-tokens-prompt": "1000",
        "x-ratelimit-remaining-tokens-prompt": "600",
        "x-ratelimit-reset-tokens-prompt": "59.5s",
        "x-ratelimit-limit-tokens-generated": "100",
        "x-ratelimit-remaining-tokens-generated": "10",
        "x-ratelimit-reset-tokens-generated": "59.5s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "10",
        "x-ratelimit-reset-tokens": "59.5s",
    }
    assert asking.headers(NOW + MINUTE)["x-ratelimit-remaining-requests"] == "10"
    assert asking.headers(NOW + MINUTE)["x-ratelimit-reset-requests"] == "0ms"


def test_the_answer_of_a_reservation_counts_it(desk: Callable[..., Desk]) -> None:
    held = desk(Limits(requests_per_minute=10, hard_budget_nanos=100)).ask(NOW, nanos=30)
    assert held.headers()["x-ratelimit-remaining-requests"] == "9"
    assert held.account.left_nanos == 70 and held.token.left_nanos is None


def test_without_limits_there_are_no_headers(desk: Callable[..., Desk]) -> None:
    assert desk(Limits(hard_budget_nanos=1)).headers(NOW) == {}


def test_a_clock_that_was_far_ahead_locks_nobody_out(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(requests_per_minute=1))
    asking.ask(NOW + 3600 * SECOND)
    asking.ask(NOW)
    assert later(NOW, asking.refused(NOW)) == NOW + MINUTE


def test_a_clock_that_was_a_little_ahead_still_counts(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(requests_per_minute=1))
    asking.ask(NOW + 5 * SECOND)
    at_us = later(NOW, asking.refused(NOW))
    assert at_us == NOW + 5 * SECOND + MINUTE
    asking.ask(at_us)


@SIDES
def test_a_hard_budget_holds_to_the_nano_dollar(desk: Callable[..., Desk], side: str) -> None:
    asking = desk(**{side: Limits(hard_budget_nanos=1000)})
    asking.ask(NOW, nanos=600)
    told = asking.broke(NOW, 401)
    assert told.startswith(f"The monthly budget of this {side} is 0.000001 USD, 0.00 USD of it spent (0.0000006 USD")
    asking.ask(NOW, nanos=400)
    asking.end(NOW, nanos=100)
    asking.broke(NOW, 301)
    asking.ask(NOW, nanos=300)
    asking.broke(NOW, 1)
    asking.ask(NOW, nanos=0)


def test_a_budget_of_nothing_lets_only_free_requests_through(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=0))
    asking.broke(NOW, 1)
    asking.ask(NOW, nanos=0)


def test_prepaid_credit_holds_to_the_nano_dollar(desk: Callable[..., Desk]) -> None:
    asking = desk(is_prepaid=True)
    assert "prepaid credit is 0.00 USD, and" in asking.broke(NOW, 1)
    asking.add(1000)
    asking.ask(NOW, nanos=1000)
    assert "(0.000001 USD are held by requests that are running)" in asking.broke(NOW, 1)
    asking.end(NOW, nanos=400)
    asking.ask(NOW, nanos=600)
    asking.broke(NOW, 1)
    asking.add(-600, "adjustment")
    assert "prepaid credit is 0.00 USD" in asking.broke(NOW, 1)
    asking.add(-5, "adjustment")
    asking.broke(NOW, 1)
    asking.ask(NOW, nanos=0)  # who owes something may ask for what costs nothing


def test_the_tighter_of_credit_and_budget_is_told(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=500), is_prepaid=True)
    asking.add(400)
    assert "prepaid credit" in asking.broke(NOW, 401)
    asking.add(400)
    assert "monthly budget" in asking.broke(NOW, 501)


def test_money_is_no_longer_held_when_a_lease_is_over(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=1000))
    asking.ask(NOW, nanos=1000)
    asking.broke(NOW + MINUTE, 1)
    asking.ask(NOW + MINUTE + 1, nanos=1000)


def test_a_lease_that_is_over_may_be_renewed_until_another_has_what_it_held(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=1000))
    asking.ask(NOW, nanos=1000)
    reservations.renew(asking.db, [(NOW + 3 * MINUTE, "id1")])
    asking.broke(NOW + 3 * MINUTE, 1)
    at_us = NOW + 3 * MINUTE + 1
    asking.ask(at_us, nanos=1000)
    reservations.renew(asking.db, [(at_us + MINUTE, "id1")])
    assert standings(asking.db, asking.caller, at_us).account.held_nanos == 1000


def test_a_lease_is_renewed_and_never_cut_short(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=1000))
    asking.ask(NOW, nanos=1000)
    reservations.renew(asking.db, [(NOW + 3 * MINUTE, "id1"), (NOW + 1, "id1")])
    asking.broke(NOW + 3 * MINUTE, 1)
    asking.ask(NOW + 3 * MINUTE + 1, nanos=1)


def test_a_soft_budget_warns_and_refuses_nothing(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(soft_budget_nanos=1000), Limits(soft_budget_nanos=2000))
    asking.ask(NOW, nanos=5000)
    asking.end(NOW, nanos=999)
    assert "x-octoai-budget-warning" not in asking.headers(NOW)
    asking.ask(NOW, nanos=5000)
    asking.end(NOW, nanos=1)
    assert asking.headers(NOW)["x-octoai-budget-warning"] == (
        "this month's soft budget of the account is 0.000001 USD, 0.000001 are spent"
    )
    asking.ask(NOW, nanos=5000)
    asking.end(NOW, nanos=1000)
    assert "of the token" in asking.headers(NOW)["x-octoai-budget-warning"]


def test_a_month_begins_anew_at_midnight_utc(desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    for zone in ("America/Los_Angeles", "Pacific/Kiritimati"):  # one changes its clocks that very night
        monkeypatch.setenv("TZ", zone)
        assert month_of(NOVEMBER - 1) == "2026-10" and month_of(NOVEMBER) == "2026-11"
    asking = desk(Limits(hard_budget_nanos=1000, soft_budget_nanos=1))
    asking.ask(NOW, nanos=1000)
    asking.end(NOW, nanos=1000)
    asking.broke(NOVEMBER - 1, 1)
    assert asking.headers(NOVEMBER) == {}
    asking.ask(NOVEMBER, nanos=1000)


def test_what_is_held_over_midnight_is_held_in_the_new_month_too(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=1000))
    asking.ask(NOVEMBER - 1, nanos=700)
    asking.broke(NOVEMBER, 301)
    asking.ask(NOVEMBER, nanos=300)


def test_a_clock_that_goes_back_over_midnight_opens_no_second_budget(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=1000))
    asking.ask(NOVEMBER, nanos=1000)
    asking.end(NOVEMBER, nanos=1000)
    asking.broke(NOW, 1)  # a charge would be posted in November, where the ledger is
    assert spent_nanos(asking.db, "acme", "2026-11") == 1000


def test_a_refund_gives_a_budget_back_what_it_had_and_no_more(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=1000))
    asking.ask(NOW, nanos=400)
    asking.end(NOW, nanos=400)
    with asking.db.transaction():
        post(asking.db, [Entry(NOVEMBER, "acme", "refund", 400, asking.caller.token.id, "id1", "small")])
    asking.broke(NOVEMBER, 1001)
    asking.ask(NOVEMBER, nanos=1000)


def test_a_request_that_never_ran_leaves_no_trace(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(hard_budget_nanos=1000, requests_per_minute=1, concurrent_requests=1))
    asking.ask(NOW, nanos=1000)
    reservations.release(asking.db, "id1")
    asking.ask(NOW, nanos=1000)


def test_what_is_pruned_counted_for_nothing(desk: Callable[..., Desk]) -> None:
    asking = desk(Limits(requests_per_minute=10))
    for at_us in (NOW, NOW + MINUTE, NOW + 2 * MINUTE):
        asking.ask(at_us)
        asking.end(at_us)
    asking.ask(NOW + 2 * MINUTE)
    day = 24 * 60 * MINUTE  # for which it is known of the last, which nobody ends, that it has lapsed
    for now_us in (NOW + 2 * MINUTE, NOW + 3 * MINUTE - 1, NOW + 3 * MINUTE, NOW + 3 * MINUTE + day + 1):
        before = standings(asking.db, asking.caller, now_us)
        reservations.prune(asking.db, now_us)
        assert standings(asking.db, asking.caller, now_us) == before
    assert asking.db.rows("SELECT id FROM reservations") == []


@pytest.mark.parametrize(
    "limits", [Limits(hard_budget_nanos=1000), Limits(requests_per_minute=1), Limits(concurrent_requests=1)]
)
def test_of_fifty_at_once_one_is_let_through(place: Place, limits: Limits) -> None:
    with closing(connect(place)) as db:
        caller = Desk(db, limits).caller
    barrier, outcomes = threading.Barrier(50), []

    def ask(number: int) -> None:
        with closing(connect(place, migrate=False)) as own:
            barrier.wait()
            wanted = Reservation(f"id{number}", "acme", caller.token.id, NOW, 1000, 1, 1, NOW + MINUTE)
            try:
                with own.transaction():
                    reserve(own, caller, wanted)
                outcomes.append("held")
            except (OutOfCredit, RateLimited):
                outcomes.append("refused")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + 49 * ["refused"]
    with closing(connect(place)) as db:
        assert len(db.rows("SELECT id FROM reservations")) == 1


def test_settling_while_others_reserve_shows_no_money_twice(place: Place) -> None:
    """A charge and what it no longer holds are seen together: credit for ten requests is never held by eleven."""
    with closing(connect(place)) as db:
        desk = Desk(db, is_prepaid=True)
        desk.add(10 * 100)
    caller, rounds, failed = desk.caller, 40, list[str]()

    def work(worker: int) -> None:
        with closing(connect(place, migrate=False)) as own:
            for number in range(rounds):
                name = f"id{worker}-{number}"
                wanted = Reservation(name, "acme", caller.token.id, NOW, 100, 1, 1, NOW + MINUTE)
                try:
                    with own.transaction():
                        left = reserve(own, caller, wanted).account.left_nanos
                except OutOfCredit:
                    continue
                if left is None or left < 0:
                    failed.append(name)
                with own.transaction():
                    requests.apply(own, [settlement(name, caller.token.id)], NOW)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with closing(connect(place)) as db:
        assert failed == []
        assert db.row("SELECT nanos FROM balances WHERE account = 'acme'") == (0,)
        assert db.row("SELECT COUNT(*), SUM(cost_nanos), SUM(waived_nanos) FROM requests") == (10, 1000, 0)


def settlement(name: str, token_id: str) -> dict[str, object]:
    return {
        **{"kind": "settlement", "id": name, "request_id": name, "account": "acme", "token_id": token_id},
        **{"model": "small", "served_model": "small", "input_nanos": 0, "cached_input_nanos": 0, "output_nanos": 100},
        **{"opened_us": NOW, "journal": "j", "is_reserved": True, "lease_us": NOW + MINUTE, "outcome": "ok"},
        **{"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1, "settled_us": NOW},
    }


def read(text: str) -> int:
    """Milliseconds of a duration as Go writes it."""
    if found := re.fullmatch(r"(\d+)ms", text):
        return int(found[1])
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)(?:\.(\d{1,3}))?s)", text)
    assert found is not None
    minutes, seconds, decimals = found.groups()
    return int(minutes or 0) * 60_000 + int(seconds) * 1000 + int((decimals or "").ljust(3, "0"))


@given(st.integers(0, 10**10))
def test_a_duration_is_read_again_to_the_millisecond(microseconds: int) -> None:
    assert read(duration(microseconds / 1_000_000)) == -(-microseconds // 1000)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0000001, "0ms"),
        (0.000001, "1ms"),
        (0.012, "12ms"),
        (1.0, "1s"),
        (7.66, "7.66s"),
        (16.1, "16.1s"),
        (59.9999, "1m0s"),
        (60.0, "1m0s"),
        (179.56, "2m59.56s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nothing_left_is_told_as_none() -> None:
    over = Standing(Limits(requests_per_minute=5), num_requests=9, newest_us=NOW)
    assert Standings(over, Standing(Limits()), NOW).headers()["x-ratelimit-remaining-requests"] == "0"


def test_ledger_and_limits_agree_on_an_empty_place(tmp_path: Path) -> None:
    with closing(connect(Place(tmp_path))) as db:
        asking = Desk(db)
        assert standings(db, asking.caller, NOW) == Standings(Standing(Limits()), Standing(Limits()), NOW)


@pytest.mark.parametrize(
    ("spent", "returning", "most"),
    [(0, 0, 100), (40, 0, 60), (40, 40, 100), (40, 10, 70), (0, 50, 100), (-30, 50, 100)],
)
def test_what_comes_back_opens_no_more_than_a_budget(spent: int, returning: int, most: int) -> None:
    """What is held may come to be charged to the next month, where the refund is not."""
    standing = Standing(Limits(hard_budget_nanos=100), spent_nanos=spent)
    wanted = Reservation("id", "a", "t", 0, most + 1, 1, 1, 0)
    for nanos in (0, most):
        assert _uncovered("account", standing, replace(wanted, nanos=nanos), returning) is None
    assert _uncovered("account", standing, wanted, returning) is not None
