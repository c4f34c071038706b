"""Whatever happens in whatever order: every request is charged exactly once, everything adds up, and nobody spends
more than a hard limit allows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from octoai.server.errors import OutOfCredit
from octoai.server.limits import reserve, standings
from octoai.server.store import Connection, Place, connect, requests, reservations
from octoai.server.store.audit import verify
from octoai.server.store.entries import Entry, balance_nanos, post
from octoai.server.store.requests import NotRefundable, RequestRow
from octoai.server.store.reservations import Reservation
from tests.server.requested import BUDGET, COUNTS, LEASE, PRICE, SECOND, START, Running

TABLES = ["entries", "balances", "spending", "usage", "requests", "reservations", "rates", "keys", "tokens", "accounts"]


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
