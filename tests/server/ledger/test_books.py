"""Journals and the database: whatever ends a process, and wherever, the next one finds all of it and starts."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import orjson
import pytest

from octoai.server import accounts, app, tokens
from octoai.server.accounts import Caller
from octoai.server.billing.money import Price
from octoai.server.engines.base import Usage
from octoai.server.errors import RateLimited, Unavailable
from octoai.server.journal import Journal, JournalDamaged, Orphan, instances, orphans
from octoai.server.ledger import books as books_module
from octoai.server.ledger.books import Books, journal_dir, recover
from octoai.server.ledger.ledger import Ledger, Tab
from octoai.server.settings import Settings
from octoai.server.store import Connection, Place, connect, keys, requests, usage
from octoai.server.store.audit import verify
from octoai.server.store.entries import Entry, balance_nanos, post
from octoai.server.store.journals import keep_position
from octoai.server.store.keys import KeyRow
from octoai.server.store.reservations import Reservation
from octoai.server.store.usage import Filters
from octoai.server.times import now_us
from tests.server.settling import COST, balance, kept, num_steps, process_of, run, settlement, until

SEGMENT_BYTES = 64 * 1024


def opened(place: Place, *, segment_bytes: int = SEGMENT_BYTES) -> Journal:
    with closing(connect(place)) as db, db.transaction():
        accounts.ensure_default(db)
    return Journal.open(journal_dir(place), segment_bytes=segment_bytes)


async def append(journal: Journal, numbers: range) -> None:
    for number in numbers:
        written = journal.append(settlement(number), soon=number % 50 == 0)
        if number % 50 == 0:
            await written


def test_what_is_durable_in_several_segments_is_brought_in_at_once(place: Place) -> None:
    async def main() -> None:
        journal = opened(place)
        books = Books(place, journal)
        books.start()
        await append(journal, range(501))
        assert journal.durable.segment > 2
        await books.writer.caught_up(seconds=20)
        assert await books.read(lambda db: balance_nanos(db, "default")) == -501 * COST
        await books.close()

    run(main())


def test_reports_of_one_account_keep_nobody_else_from_the_database(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 64 at once by one token, every other question waited for seconds."""
    monkeypatch.setattr(books_module, "TURN_SECONDS", 0.8)
    ends, num = threading.Event(), 0
    most = 0

    def slow(db: Connection) -> int:
        nonlocal num, most
        num += 1
        most = max(most, num)
        ends.wait(20)
        num -= 1
        return balance_nanos(db, "default")

    async def main() -> None:
        books = Books(place, opened(place))
        books.start()
        reports = [asyncio.create_task(books.report("acme", slow)) for _ in range(20)]
        await asyncio.sleep(0.1)
        for _ in range(8):
            assert await books.read(lambda db: balance_nanos(db, "default")) == 0
        assert await books.report("zeta", lambda db: balance_nanos(db, "default")) == 0
        assert not any(each.done() for each in reports)
        done, _ = await asyncio.wait(reports, timeout=4, return_when=asyncio.ALL_COMPLETED)
        refused = [each.exception() for each in done]
        assert len(refused) == 19 and all(isinstance(each, RateLimited) for each in refused)
        ends.set()
        (first,) = set(reports) - done
        assert await first == 0 == await books.report("acme", slow)
        await books.close()

    run(main())
    assert most == 1


def test_reports_of_others_are_waited_for_and_are_not_taken_for_a_database_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books_module, "TURN_SECONDS", 0.5)
    place = Place(tmp_path)

    def slow(db: Connection) -> int:
        time.sleep(0.2)
        return balance_nanos(db, "default")

    async def main() -> None:
        books = Books(place, opened(place))
        books._reports.run = partial(books._reports.run, seconds=0.4)  # type: ignore[method-assign]
        books.start()
        said = await asyncio.gather(
            *(books.report(f"acct{number}", slow) for number in range(8)), return_exceptions=True
        )
        await books.close()
        assert said[:4] == [0] * 4
        assert all(each == 0 or isinstance(each, Unavailable) for each in said), said
        assert isinstance(said[-1], Unavailable)
        assert (said[-1].code, said[-1].headers) == ("overloaded", {"retry-after": "1"})

    run(main())


def test_a_report_on_one_account_goes_through_its_own_usage_alone(tmp_path: Path) -> None:
    with closing(connect(Place(tmp_path))) as db:
        rows = [(at * 60, f"a{at % 100}", "t", "m", 1, 1, 0, 1, 1) for at in range(5000)]
        with db.transaction():
            db.execute_many("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        own = Filters(accounts=["a7"])
        taken = num_steps(db, lambda: usage.sums(db, 0, 10**6, width=86400, filters=own))
        assert taken < num_steps(db, lambda: usage.sums(db, 0, 10**6, width=86400)) / 20


@pytest.mark.parametrize("num_removed", [0, 1, 2])
@pytest.mark.parametrize("kind", [Journal, Orphan])
def test_killed_while_its_files_go_the_next_start_finds_nothing_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Journal | Orphan], num_removed: int
) -> None:
    place = Place(tmp_path)

    class Killed(BaseException):
        pass

    def removed(journal: Journal | Orphan) -> None:
        for path in sorted(journal.directory.glob(f"{journal.instance}-*"))[:num_removed]:
            path.unlink()
        raise Killed

    async def main() -> None:
        journal = opened(place)
        books = Books(place, journal)
        books.start()
        await append(journal, range(501))
        await books.writer.caught_up(seconds=20)
        if kind is Journal:
            with monkeypatch.context() as dying, pytest.raises(Killed):
                dying.setattr(kind, "remove", removed)
                await books.close()
        await asyncio.to_thread(books.writer.close)
        journal.close()  # as the kernel does it
        books.reader.close()

    run(main())
    if kind is Orphan:
        with monkeypatch.context() as dying, pytest.raises(Killed):
            dying.setattr(kind, "remove", removed)
            recover(place)
    app.prepare(Settings(data_dir=tmp_path, cache_dir=tmp_path)).close()
    assert list(journal_dir(place).iterdir()) == []
    assert balance(place) == -501 * COST


def test_a_damaged_journal_does_not_keep_others_from_being_brought_in(place: Place) -> None:
    async def abandoned(numbers: range) -> str:
        journal = opened(place)
        for number in numbers:
            await journal.append(settlement(number), soon=True)
        journal.close()
        return journal.instance

    bad, good = sorted([asyncio.run(abandoned(range(6))), asyncio.run(abandoned(range(6, 12)))])
    path = journal_dir(place) / f"{bad}-000001.journal"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[150] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(JournalDamaged):
        recover(place)
    assert list(journal_dir(place).glob(f"{good}*")) == []
    (left,) = orphans(journal_dir(place))  # it is tried again, and so it is when somebody has seen to it
    left.close()
    path.write_bytes(whole)
    assert recover(place) == 0
    assert balance(place) == -12 * COST


def test_a_damaged_journal_beside_a_running_service_is_told_once_and_holds_nothing_up(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("octoai.server.ledger.books.KEEP_ORDER_SECONDS", 0.05)
    pruned: list[None] = []

    async def main() -> None:
        journal = opened(place)
        for number in range(6):
            await journal.append(settlement(number), soon=True)
        journal.close()
        path = journal_dir(place) / f"{journal.instance}-000001.journal"
        damaged = bytearray(path.read_bytes())
        damaged[150] ^= 1
        path.write_bytes(damaged)
        books = Books(place, opened(place))
        monkeypatch.setattr(books, "_prune_some_keys", lambda _: pruned.append(None))
        books.start()
        await until(lambda: len(pruned) > 3)
        await books.close()
        (told,) = caplog.records
        assert path.name in told.getMessage()
        assert told.exc_info is None

    run(main())


def test_the_books_are_kept_in_order_again_once_there_are_file_descriptors_for_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("octoai.server.ledger.books.KEEP_ORDER_SECONDS", 0.05)
    looks: list[None] = []

    def recover(_: Place) -> int:
        looks.append(None)
        if len(looks) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), place.data_dir)
        return 0

    monkeypatch.setattr(books_module, "recover", recover)

    async def main() -> None:
        books = Books(place, opened(place))
        books.start()
        await until(lambda: len(looks) > 2)
        await books.close()

    run(main())
    (told,) = caplog.records
    assert "Too many open files" in told.getMessage()
    assert told.exc_info is None


def test_a_ledger_ahead_of_the_clock_is_told_at_the_start_and_then_once_an_hour(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("octoai.server.ledger.books.KEEP_ORDER_SECONDS", 0.05)

    def told() -> int:
        return sum("ahead of this machine's clock" in each for each in caplog.messages)

    async def main() -> None:
        books = Books(place, opened(place))
        await asyncio.to_thread(recorded, 600)
        rounds: list[None] = []
        monkeypatch.setattr(books, "_prune_some_keys", lambda _: rounds.append(None))
        books.start()
        await until(lambda: len(rounds) > 3)
        assert told() == 0  # the start has said it
        books._ahead_told_at -= 3601
        await until(lambda: len(rounds) > 8)
        assert told() == 1
        await books.close()

    def recorded(seconds: float) -> None:
        with closing(connect(place)) as db, db.transaction():
            post(db, [Entry(time.time_ns() // 1000 + int(seconds * 1e6), "default", "grant", 1)])

    opened(place).close()
    recorded(200)
    settings = Settings(data_dir=place.data_dir, cache_dir=place.data_dir, database=place.url)
    app.prepare(settings).close()
    assert told() == 0
    recorded(600)
    app.prepare(settings).close()
    assert told() == 1
    caplog.clear()
    run(main())


def test_an_applier_that_is_killed_where_segments_were_given_up_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    """Batches end with segments here, so that one after the other is given up before it rests."""
    place = Place(tmp_path)
    num_bytes = len(orjson.dumps(settlement(1000)))
    journal = opened(place, segment_bytes=33 + 511 * (num_bytes + 10) + 138 + num_bytes + 60)

    async def main() -> None:
        books = Books(place, journal, is_beside=True)
        books.start()
        await journal.append(settlement(1000), soon=True)
        await books.writer.caught_up()
        with closing(sqlite3.connect(tmp_path / "octoai.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")  # the database is away meanwhile
            await append(journal, range(1001, 5000))
            db.execute("ROLLBACK")
        process = process_of(books)
        first = journal.directory / f"{journal.instance}-000002.journal"
        while first.exists():
            await asyncio.sleep(0.001)
        os.kill(process.pid, 9)
        await until(lambda: books.writer.applied >= journal.durable)
        await books.close()

    run(main())
    assert balance(place) == -4000 * COST


@pytest.mark.slow
def test_an_end_waits_once_for_a_database_that_is_away(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        books = Books(place, opened(place), is_beside=True)
        books.start()
        await append(books._journal, range(51))  # type: ignore[arg-type]
        await books.writer.caught_up(seconds=20)
        with closing(sqlite3.connect(tmp_path / "octoai.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            await append(books._journal, range(51, 101))  # type: ignore[arg-type]
            process, began = process_of(books), time.monotonic()
            await books.close()
            assert 4 < time.monotonic() - began < 12
            assert process.poll() is not None
            db.execute("ROLLBACK")

    run(main())
    recover(place)
    assert balance(place) == -101 * COST


def test_an_end_lets_a_database_that_is_behind_take_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, num_records = Place(tmp_path), 30_000

    async def main() -> None:
        books = Books(place, opened(place), is_beside=True)
        books.start()
        await books._journal.append(settlement(num_records), soon=True)  # type: ignore[union-attr]
        await books.writer.caught_up(seconds=20)
        monkeypatch.setattr(books.writer, "caught_up", partial(books.writer.caught_up, seconds=0.5))  # not 5
        for number in range(num_records):
            books._journal.append(settlement(number), soon=None)  # type: ignore[union-attr]
        await books.close()

    run(main())
    with closing(connect(place)) as db:
        assert db.row("SELECT COUNT(*) FROM requests") == (num_records + 1,)


@pytest.mark.parametrize("is_settled", [True, False])
def test_what_a_backup_lacks_is_charged_though_it_lacks_the_credit_too(tmp_path: Path, is_settled: bool) -> None:
    place, credit, most = Place(tmp_path), 1_000_000, 100_000

    def give(db: Connection) -> None:
        post(db, [Entry(time.time_ns() // 1000, "acme", "grant", credit)])

    async def main() -> None:
        journal = opened(place)
        with closing(connect(place)) as db:
            with db.transaction():
                account = accounts.create(db, "acme", plan="unlimited", is_prepaid=True)
            with closing(sqlite3.connect(tmp_path / "backup")) as backup:
                db._connection.backup(backup)  # type: ignore[attr-defined]
            with db.transaction():
                caller = Caller(account, tokens.find(db, tokens.mint(db, "made later", "acme").id))
                give(db)
        books = Books(place, journal)
        books.start()
        ledger = Ledger(journal, books.writer)
        for number in range(5):
            now_us, price = time.time_ns() // 1000, Price(output_nanos=1000)
            tab = Tab(ledger, f"id{number}", f"req_{number}", caller, "m", "m", price, lambda: Usage(0, 0, 100), True)
            held = (tab.id, "acme", caller.token.id, now_us, most, 0, 100, now_us + 60_000_000)
            assert await ledger.reserve(tab, Reservation(*held)) is not None
            tab.open()
            await tab.durable()
            if is_settled:
                await tab.settle("finished")
            else:
                tab.checkpoint()
        await books.writer.caught_up()
        assert await books.read(lambda db: balance_nanos(db, "acme")) == credit - (5 * most if is_settled else 0)
        await asyncio.to_thread(books.writer.close)
        journal.close()  # and no more, as where it is killed

    run(main())
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"octoai.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "backup").rename(tmp_path / "octoai.db")
    assert recover(place) == (0 if is_settled else 5)
    with closing(connect(place)) as db:
        assert balance_nanos(db, "acme") == -5 * most
        with db.transaction():
            give(db)
        assert balance_nanos(db, "acme") == credit - 5 * most
        verify(db)


async def abandoned(place: Place, *, is_lease_over: bool) -> str:
    """The id of a request whose intent the database has, in the journal of a process that died with it under way, and a
    checkpoint in there that the database lacks."""
    journal, intent = opened(place), settlement(1) | {"kind": "intent"}
    intent |= {"journal": journal.instance, "lease_us": intent["opened_us"] + (-1 if is_lease_over else 60_000_000)}
    checkpoint = settlement(1) | {"kind": "checkpoint", "id": intent["id"]}
    with closing(connect(place)) as db, db.transaction():
        requests.apply(db, [intent], intent["opened_us"])
        keep_position(db, journal.instance, await journal.append(intent, soon=True))
    await journal.append(checkpoint, soon=True)
    journal.close()
    return str(intent["id"])


@pytest.mark.parametrize("is_lease_over", [False, True])
def test_what_died_while_the_database_was_away_is_billed_by_its_journal_though_its_lease_is_over(
    place: Place, monkeypatch: pytest.MonkeyPatch, is_lease_over: bool
) -> None:
    monkeypatch.setattr(books_module, "KEEP_ORDER_SECONDS", 0.05)

    async def main() -> None:
        id_ = await abandoned(place, is_lease_over=is_lease_over)
        async with kept(place, is_beside=False) as (books, journal):
            await until(lambda: instances(journal.directory) == [journal.instance])
            found = await books.read(lambda db: requests.of_id(db, id_))
            assert found is not None
            assert (found.status, found.cost_nanos) == ("interrupted", COST)

    run(main())
    assert balance(place) == -COST


def test_what_another_machine_settled_before_its_journal_came_in_is_billed_by_that(place: Place) -> None:
    id_ = asyncio.run(abandoned(place, is_lease_over=True))
    with closing(connect(place)) as db, db.transaction():
        requests.interrupt(db, requests.expired(db, now_us()), now_us())
    assert balance(place) == 0
    assert recover(place) == 0
    assert balance(place) == -COST
    with closing(connect(place)) as db:
        found = requests.of_id(db, id_)
    assert found is not None
    assert (found.status, found.completion_tokens, found.waived_nanos) == ("interrupted", 16, 0)


def test_what_a_process_left_whose_journal_is_nowhere_is_settled_when_its_lease_is_over(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books_module, "KEEP_ORDER_SECONDS", 0.05)

    async def main() -> None:
        id_ = await abandoned(place, is_lease_over=True)
        for path in journal_dir(place).iterdir():
            path.unlink()
        async with kept(place, is_beside=False) as (books, _):
            while (found := await books.read(lambda db: requests.of_id(db, id_))) and found.status == "open":
                await asyncio.sleep(0.02)
            assert found is not None
            assert (found.status, found.cost_nanos) == ("interrupted", 0)

    run(main())


def test_an_end_in_order_leaves_no_key_to_a_request_that_never_ran(place: Place) -> None:
    async def main() -> None:
        journal = opened(place)
        books = Books(place, journal)
        books.start()
        for number, instance in enumerate((journal.instance, "elsewhere")):
            claimed = KeyRow(b"hash", f"id{number}", f"req_{number}", instance, time.time_ns() // 1000)
            await books.write(partial(keys.claim, account="default", key=f"k{number}", claimed=claimed))
        await books.close()

    run(main())
    with closing(connect(place)) as db:
        assert db.rows("SELECT key FROM keys") == [("k1",)]


def test_what_is_kept_for_the_database_and_cannot_be_done_there_is_told(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with kept(place) as (books, _):
            books.writer.later(lambda db: db.execute("INSERT INTO nothing VALUES (1)"), is_kept=True)
            assert await books.writer.run(lambda db: 1) == 1  # and others are not held up

    run(main())
    (told,) = caplog.messages
    assert "cannot be done" in told
    assert "nothing" in told


@pytest.mark.parametrize("is_dead", [True, False])
def test_what_is_waived_when_a_journal_is_brought_in_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_dead: bool
) -> None:
    """Of a journal that does not say what was held."""
    place = Place(tmp_path)

    async def main() -> None:
        journal = opened(place)
        with closing(connect(place)) as db, db.transaction():
            accounts.create(db, "acme", plan="unlimited", is_prepaid=True)
        for number in range(3):
            await journal.append(settlement(number) | {"account": "acme", "is_reserved": True})
        if is_dead:
            journal.close()
            recover(place)
        else:
            books = Books(place, journal)
            books.start()
            await books.close()

    run(main())
    (told,) = [record.getMessage() for record in caplog.records if "waived" in record.getMessage()]
    assert told.startswith(f"{3 * COST} nano-dollars of usage are waived")
