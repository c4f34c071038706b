"""Whatever is made of one request under one key, by whom and with the database there or away, and in whatever order the
database hears of it: one attempt is billed, and beside it only what is too much to be given back, and what a process
that died had used."""

from __future__ import annotations

import base64
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from octoai.server import accounts, admission
from octoai.server.idempotency import Key
from octoai.server.store import Connection, Place, connect, keys, requests
from octoai.server.store.audit import verify
from octoai.server.store.keys import MAX_REFUNDS, KeyRow
from octoai.server.times import now_us
from tests.server.settling import settlement

STEPS = (
    "begin",
    "begin without the database",
    "never run",
    "answer",
    "leave",
    "bring in one",
    "bring in all",
    "read again",
    "die",
    "find what the dead left",
)
HISTORIES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(STEPS)), max_size=30)
NUMBERS = count(1)


@dataclass
class Process:
    """One that answers, and its journal. It runs one request under the key at a time, and none once it has an answer:
    others join the one that runs, or are given that answer."""

    name: str
    journal: list[dict[str, Any]] = field(default_factory=list)
    num_read: int = 0
    waiting: dict[str, Any] | None = None  # for its turn
    running: dict[str, Any] | None = None
    has_answer: bool = False


class History:
    """Of one key."""

    def __init__(self, db: Connection) -> None:
        self.db = db
        self.key = Key(f"k{next(NUMBERS)}", b"hash")
        self.processes = [Process(name) for name in "ABC"]
        self.ended: list[dict[str, Any]] = []
        self.dead: list[Process] = []
        self.died = set[str]()  # what ran in them

    def step(self, process: Process, step: str) -> None:
        if step.startswith("begin"):
            self.begin(process, is_away=step != "begin")
        elif step.startswith("bring in"):
            self.bring_in(process, 1 if step == "bring in one" else None)
        elif step == "read again":
            process.num_read = 0
        elif step == "never run":
            self.never_run(process)
        elif step == "die":
            self.die(process)
        elif step == "find what the dead left":
            self.recover()
        else:
            self.end(process, is_answered=step == "answer")

    def begin(self, process: Process, *, is_away: bool) -> None:
        """One that has claimed its key waits for its turn, which comes when this is asked again."""
        if process.running is not None or process.has_answer:
            return
        if process.waiting is None:
            about = {"key": self.key.value, "key_body": self.key.body_hash.hex(), "journal": process.name}
            begun = settlement(next(NUMBERS)) | about
            if is_away or self.is_claimed(process, begun):
                process.waiting = begun
            if not is_away:
                return
        process.running, process.waiting = process.waiting, None
        assert process.running is not None
        process.journal.append(process.running | {"kind": "intent"})

    def is_claimed(self, process: Process, begun: dict[str, Any]) -> bool:
        """As `Admission` does it."""
        claimed = KeyRow(self.key.body_hash, begun["id"], begun["request_id"], process.name, begun["opened_us"])
        with self.db.transaction():
            before = keys.claim(self.db, "default", self.key.value, claimed)
        if before is None:
            return True
        if before.answer is not None:
            process.has_answer = True
            return False
        self.bring_in(process)
        with self.db.transaction():
            return admission._take_over(self.db, "default", self.key, claimed) is not None

    def never_run(self, process: Process) -> None:
        if process.waiting is not None:
            with self.db.transaction():
                keys.release(self.db, "default", self.key.value, process.waiting["id"])
            process.waiting = None

    def end(self, process: Process, *, is_answered: bool) -> None:
        if process.running is not None:
            answer = base64.b64encode(process.running["id"].encode()).decode() if is_answered else None
            self.ended.append(process.running | {"answer": answer})
            process.journal.append(self.ended[-1])
            process.running, process.has_answer = None, is_answered

    def bring_in(self, process: Process, most: int | None = None) -> None:
        until = len(process.journal) if most is None else process.num_read + most
        with self.db.transaction():
            requests.apply(self.db, process.journal[process.num_read : until], now_us())
        process.num_read = min(until, len(process.journal))

    def die(self, process: Process) -> None:
        """In the middle of an answer, if it runs one. Another takes its place."""
        if process.running is not None:
            self.ended.append(process.running | {"answer": None})
            self.died.add(process.running["id"])
            process.journal.append(process.running | {"kind": "checkpoint"})
        self.dead.append(process)
        self.processes[self.processes.index(process)] = Process(f"{process.name}'")

    def recover(self) -> None:
        """As `books` does it."""
        for process in self.dead:
            self.bring_in(process)
            with self.db.transaction():
                requests.interrupt(self.db, requests.open_of_journal(self.db, process.name), now_us())
                keys.release_of_journal(self.db, process.name)
        self.dead.clear()

    def close(self) -> None:
        for process in self.processes:
            self.never_run(process)
            self.end(process, is_answered=False)
        for process in self.processes:
            self.bring_in(process)
        self.recover()

    def check(self) -> None:
        found = {each["id"]: requests.of_id(self.db, each["id"]) for each in self.ended}
        billed = [each for each in self.ended if (row := found[each["id"]]) is not None and row.cost_nanos > 0]
        answered = [each["id"] for each in self.ended if each["answer"] is not None]
        num_replaced = len(self.ended) - max(1, len(answered))
        num_billed = bool(self.ended) + max(0, num_replaced - MAX_REFUNDS)
        assert len(billed) >= num_billed
        assert len([each for each in billed if each["id"] not in self.died]) <= num_billed
        row = keys.find(self.db, "default", self.key.value)
        assert (row is None) == (not self.ended)
        if answered:
            assert [each["id"] for each in billed if each["id"] in answered] == [row and row.request]
            assert row is not None
            assert row.answer == row.request.encode()


def run(place: Place, max_examples: int) -> None:
    with closing(connect(place)) as db:
        db.set_durable(False)
        with db.transaction():
            accounts.ensure_default(db)

        @settings(deadline=None, max_examples=max_examples)
        @given(HISTORIES)
        def one_is_billed(steps: list[tuple[int, str]]) -> None:
            history = History(db)
            for number, step in steps:
                history.step(history.processes[number], step)
            history.close()
            history.check()

        one_is_billed()
        verify(db)


def test_one_attempt_is_billed_in_the_end_whatever_the_order(tmp_path: Path) -> None:
    run(Place(tmp_path), max_examples=250)


def test_one_attempt_is_billed_in_the_end_whatever_the_order_in_postgres(tmp_path: Path, postgres_url: str) -> None:
    run(Place(tmp_path, postgres_url), max_examples=40)
