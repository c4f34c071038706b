"""The process beside the service that brings the journal into the database: nothing is lost or done twice, whatever
becomes of it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from octoai.server import accounts, tokens
from octoai.server.accounts import Caller
from octoai.server.billing.money import Price
from octoai.server.engines.base import Usage
from octoai.server.errors import OutOfCredit, RateLimited, Unavailable
from octoai.server.journal import Journal, JournalGap, Position
from octoai.server.ledger import holding
from octoai.server.ledger.books import Books, journal_dir, recover
from octoai.server.ledger.ledger import Ledger, Tab
from octoai.server.limits import Standings
from octoai.server.store import Place, connect
from octoai.server.store import applier as applier_module
from octoai.server.store.applier import Applier
from octoai.server.store.database import StoreAway
from octoai.server.store.entries import balance_nanos
from octoai.server.store.reservations import Reservation
from octoai.server.times import now_us
from tests.postgres import PostgresServer
from tests.server.settling import COST, balance, kept, process_of, run, settlement, until


async def appended(journal: Journal, numbers: range) -> Position:
    """Where the last of them ends."""
    for number in numbers:
        position = await journal.append(settlement(number), soon=True)
    return position


def limited(place: Place, **limits: int) -> accounts.Caller:
    with closing(connect(place)) as db, db.transaction():
        account = accounts.create(db, "acme", plan="unlimited", limits=limits)
        token = tokens.find(db, tokens.mint(db, "t", "acme").id)
    assert token is not None
    return accounts.Caller(account, token)


def test_what_is_durable_comes_into_the_database_by_itself_and_who_waits_is_told(place: Place) -> None:
    async def main() -> None:
        async with kept(place) as (books, journal):
            first = await journal.append(settlement(1))
            await until(lambda: books.writer.applied >= first)
            for number in range(2, 50):
                position = await journal.append(settlement(number), soon=True)
                await books.writer.reached(position)
                assert books.writer.applied >= position
            assert await books.read(lambda db: balance_nanos(db, "default")) == -49 * COST
            process = process_of(books)
        assert process.poll() == 0
        assert list((place.data_dir / "journal").iterdir()) == []
        assert balance(place) == -49 * COST

    run(main())


def test_what_was_appended_last_is_brought_in_at_the_end(place: Place) -> None:
    async def main() -> None:
        async with kept(place) as (_, journal):
            for number in range(2_000):
                journal.append(settlement(number))

    run(main())
    assert balance(place) == -2_000 * COST


def test_a_process_that_is_killed_again_and_again_loses_and_doubles_nothing(place: Place) -> None:
    async def main() -> None:
        async with kept(place) as (books, journal):
            await books.writer.reached(await journal.append(settlement(1_000_000)))
            number = 0
            for _ in range(4):
                process = process_of(books)
                for _ in range(300):
                    journal.append(settlement(number), soon=number % 7 == 0)
                    number += 1
                    if number % 50 == 0:
                        await asyncio.sleep(0.02)
                process.kill()
                await until(lambda gone=process: books.writer._applier._process not in (None, gone))  # type: ignore
            await until(lambda: books.writer.away_seconds is None)

    run(main())
    assert balance(place) == -1_201 * COST


def test_while_there_is_none_the_database_counts_as_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with kept(Place(tmp_path)) as (books, journal):
            position = await journal.append(settlement(1))
            await books.writer.reached(position)
            process_of(books).kill()
            await until(lambda: books.writer.away_seconds is not None)
            await until(lambda: books.writer.away_seconds is None)
            await books.writer.reached(await journal.append(settlement(2)))

    run(main())


@pytest.mark.parametrize("is_long", [False, True])
def test_while_there_is_none_limits_are_the_databases_to_tell_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    monkeypatch.setattr(applier_module, "RESTART_SECONDS", 3.0)
    if is_long:
        monkeypatch.setattr(holding, "BEHIND_SECONDS", 0.0)
    place, now = Place(tmp_path), time.time_ns() // 1000

    async def main() -> None:
        async with kept(place) as (books, journal):
            caller = limited(place, requests_per_minute=1)
            ledger = Ledger(journal, books.writer)

            async def reserve(id_: str) -> Standings | None:
                tab = Tab(ledger, id_, id_, caller, "m", "m", Price(), Usage)
                held = (id_, "acme", caller.token.id, now, 0, 0, 0, now + 60_000_000)
                return await ledger.reserve(tab, Reservation(*held))

            await books.writer.reached(await journal.append(settlement(1)))
            assert await reserve("1") is not None
            process_of(books).kill()
            await until(lambda: books.writer.away_seconds is not None)
            if is_long:  # nothing is known of rates then
                assert await reserve("2") is None
            else:
                with pytest.raises(RateLimited):
                    await reserve("2")
            assert books.writer.away_seconds is not None

    run(main())


@pytest.mark.parametrize("is_long", [False, True])
def test_while_there_is_none_nobody_is_refused_for_a_while_where_nothing_is_spent_without_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    monkeypatch.setattr(applier_module, "RESTART_SECONDS", 3.0)
    monkeypatch.setattr(holding, "BEHIND_SECONDS", 0.5 if is_long else 3.0)

    async def main() -> None:
        async with kept(Place(tmp_path)) as (books, journal):
            ledger = Ledger(journal, books.writer, away_seconds=0.0)
            await books.writer.reached(await appended(journal, range(1)))
            process_of(books).kill()
            await until(lambda: books.writer.away_seconds is not None)
            ledger.check()
            await asyncio.sleep(0.6)
            with pytest.raises(Unavailable) if is_long else nullcontext():
                ledger.check()

    run(main())


def test_a_database_of_which_only_this_one_notices_that_it_is_away_is_away(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with kept(Place(tmp_path, postgres_url)) as (books, journal):
            ledger = Ledger(journal, books.writer, away_seconds=0.0)
            await books.writer.reached(await appended(journal, range(1)))
            postgres_server.stop()
            try:
                ledger.check()
                await journal.append(settlement(1), soon=True)
                await until(lambda: books.writer.away_since is not None, 2)
                with pytest.raises(Unavailable):
                    ledger.check()
            finally:
                postgres_server.start()
            await until(lambda: books.writer.away_seconds is None, 5)
            ledger.check()

    run(main())


async def begun(ledger: Ledger, caller: Caller, id_: str, nanos: int = 0) -> tuple[Tab, bool]:
    """A request of so many tokens, and whether the database has answered."""
    now = now_us()
    tab = Tab(ledger, id_, id_, caller, "m", "m", Price(1, 1, 1), lambda: Usage(nanos))
    held = Reservation(id_, "acme", caller.token.id, now, nanos, 0, 0, now + 60_000_000)
    return tab, await ledger.reserve(tab, held) is not None


@pytest.mark.slow
def test_while_there_is_none_for_long_what_has_ended_keeps_no_place_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier_module, "RESTART_SECONDS", 5.0)
    place = Place(tmp_path)

    async def main() -> None:
        async with kept(place) as (books, journal):
            caller = limited(place, concurrent_requests=1)
            ledger = Ledger(journal, books.writer)

            async def ask(id_: str) -> None:
                tab, _ = await begun(ledger, caller, id_)
                tab.open()
                await tab.settle("finished")

            await ask("1")
            process_of(books).kill()
            await until(lambda: books.writer.away_seconds is not None)
            await ask("2")
            with pytest.raises(RateLimited):
                await ask("3")
            await until(lambda: (books.writer.away_seconds or 0) > holding.BEHIND_SECONDS)
            await ask("4")
            await ask("5")
            assert books.writer.away_seconds is not None

    run(main())


def test_while_there_is_none_a_settlement_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applier_module, "RESTART_SECONDS", 2.0)
    place, now = Place(tmp_path), time.time_ns() // 1000

    async def main() -> None:
        async with kept(place) as (books, journal):
            caller = limited(place, requests_per_minute=10)
            ledger = Ledger(journal, books.writer)
            tabs = [Tab(ledger, id_, id_, caller, "m", "m", Price(), Usage) for id_ in ("1", "2")]
            for tab in tabs:
                held = Reservation(tab.id, "acme", caller.token.id, now, 0, 0, 0, now + 60_000_000)
                assert await ledger.reserve(tab, held) is not None
                tab.open()
            await tabs[0].settle("finished")
            with closing(connect(place)) as db:  # else it is: the next request finds what this one no longer holds
                assert db.rows("SELECT id FROM reservations WHERE is_open = 1") == [("2",)]
            process_of(books).kill()
            await until(lambda: books.writer.away_seconds is not None)
            async with asyncio.timeout(1):
                await tabs[1].settle("finished")

    run(main())


def test_a_settlement_is_waited_for_once_the_database_was_told_of_what_was_let_through_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks one after the other, and never two at once, was refused for the one before."""
    place = Place(tmp_path)

    async def main() -> None:
        async with kept(place) as (books, journal):
            begin = partial(begun, Ledger(journal, books.writer), limited(place, concurrent_requests=1))
            await books.writer.reached(await journal.append(settlement(1)))
            process_of(books).kill()
            await until(lambda: books.writer.away_seconds is not None)
            with monkeypatch.context() as away:
                away.setattr(holding, "BEHIND_SECONDS", 0.0)
                running, is_answered = await begin("1")
            assert not is_answered
            running.open()
            await until(lambda: books.writer.away_seconds is None)
            with pytest.raises(RateLimited, match="running 1"):  # which has told it of the first
                await begin("2")
            await running.settle("finished")
            assert (await begin("3"))[1]

    run(main())


def test_what_was_used_without_the_database_is_not_promised_again_before_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier_module, "RESTART_SECONDS", 1.0)
    place = Place(tmp_path)

    async def main() -> None:
        async with kept(place) as (books, journal):
            caller = limited(place, hard_budget_nanos=300)
            ledger = Ledger(journal, books.writer)

            begin = partial(begun, ledger, caller)
            first, is_answered = await begin("1", 1)
            assert is_answered
            await first.close("finished")
            await books.writer.reached(await journal.append(settlement(1)))
            process_of(books).kill()
            await until(lambda: books.writer.away_seconds is not None)
            with monkeypatch.context() as away:
                away.setattr(holding, "BEHIND_SECONDS", 0.0)
                tab, _ = await begin("2", 100)
                tab.open()
                await tab.settle("finished")
            # It can be asked again, and has not got that yet.
            tab, is_answered = await begin("3", 120)
            assert not is_answered
            assert books.writer.away_seconds is not None
            with pytest.raises(OutOfCredit, match=r"0\.00000012 USD are held"):
                await begin("4", 100)
            assert (await begin("5", 80))[1]

    run(main())


def test_what_it_brings_in_says_nothing_of_the_connection_of_the_service(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    """Where there is no room for one more on the server, its own stays."""

    async def main() -> None:
        async with kept(Place(tmp_path, postgres_url)) as (books, journal):
            await books.writer.reached(await appended(journal, range(1)))
            (own,) = await books.writer.run(lambda db: db.row("SELECT pg_backend_pid()")) or (0,)
            with postgres_server.without(postgres_url, own):
                with pytest.raises(StoreAway):
                    await books.writer.run(lambda _: None)
                away_at = time.monotonic()
                for number in range(1, 6):
                    await books.writer.reached(await appended(journal, range(number, number + 1)))
                    with pytest.raises(StoreAway):
                        await books.writer.run(lambda _: None)
                assert (books.writer.away_since or time.monotonic()) <= away_at
            await until(lambda: books.writer.away_seconds is None, 3)

    run(main())


def test_one_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    async def main() -> None:
        async with kept(Place(tmp_path)) as (books, journal):
            with monkeypatch.context() as poor:
                poor.setattr(subprocess, "Popen", none)
                position = await journal.append(settlement(1))
                await until(lambda: books.writer.away_seconds is not None)
            await until(lambda: books.writer.applied >= position)
            assert books.writer.away_seconds is None

    run(main())
    assert balance(Place(tmp_path)) == -COST


def test_what_becomes_durable_while_one_that_died_is_put_away_is_no_error(place: Place) -> None:
    """Another thread tells it of that, just when its pipe is closed."""
    errors: list[BaseException] = []

    def tell(applier: Applier, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                applier._is_told = False
                applier.durable()
                time.sleep(1e-5)  # others need the interpreter, too
        except BaseException as error:  # noqa: BLE001  # told below
            errors.append(error)

    async def main() -> None:
        async with kept(place) as (books, journal):
            await books.writer.reached(await journal.append(settlement(0)))
            applier, stop = books.writer._applier, threading.Event()
            assert applier is not None
            telling = threading.Thread(target=tell, args=(applier, stop))
            telling.start()
            try:
                for number in range(1, 3):
                    process = process_of(books)
                    process.kill()
                    await until(lambda gone=process: applier._process not in (None, gone))  # type: ignore[misc]
                    await books.writer.reached(await journal.append(settlement(number), soon=True), seconds=20)
            finally:
                stop.set()
                await asyncio.to_thread(telling.join)

    run(main())
    assert errors == []
    assert balance(place) == -3 * COST


def test_one_that_does_not_answer_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with kept(Place(tmp_path)) as (books, journal):
            await books.writer.reached(await journal.append(settlement(0)))
            process = process_of(books)
            process.send_signal(signal.SIGSTOP)
            try:
                for number in range(1, 3_000):  # more words than a pipe holds: nobody waits for it to read them
                    position = await journal.append(settlement(number), soon=True)
                    books.writer._applier.hurry()  # type: ignore[union-attr]
                with pytest.raises(StoreAway):
                    await books.writer.reached(position, seconds=0.2)
            finally:
                process.send_signal(signal.SIGCONT)
            await books.writer.reached(position)

    run(main())
    assert balance(Place(tmp_path)) == -3_000 * COST


def test_a_journal_that_cannot_be_read_is_told_and_read_again(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with kept(place) as (books, journal):
            await books.writer.reached(await journal.append(settlement(1)))
            process = process_of(books)
            (segment,) = journal.directory.glob(f"{journal.instance}-000001.journal")
            away = segment.rename(segment.with_suffix(".away"))
            position = await journal.append(settlement(2))
            await until(lambda: books.writer.away_seconds is not None)
            with pytest.raises(StoreAway, match=r"000001\.journal at byte"):
                await books.writer.reached(position, seconds=1)
            away.rename(segment)
            await books.writer.reached(position)
            assert books.writer.away_seconds is None
            assert process_of(books) is process

    run(main())
    assert balance(place) == -2 * COST
    said = capfd.readouterr().err
    assert "not what was written there" in said
    assert "Traceback" not in said


def test_it_goes_with_the_service_however_that_ends(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from octoai.server.store import Place
from tests.server.settling import kept, process_of, settlement

async def main():
    async with kept(Place(Path({str(tmp_path)!r}))) as (books, journal):
        await books.writer.reached(await journal.append(settlement(1)))
        print(process_of(books).pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""
    service = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        pid = int(service.stdout.readline())
        os.kill(pid, 0)
        service.kill()
        service.wait()
        until_gone = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < until_gone
            time.sleep(0.01)
    finally:
        service.kill()
        service.communicate()


# ── a database that goes back in time: a standby that was behind takes its place ──


async def lose_five(server: PostgresServer, url: str, books: Books, journal: Journal) -> None:
    """Of eight settlements that it had the database has three, as a standby that was behind."""
    await books.writer.reached(await appended(journal, range(3)))
    standby = server.copy(url)
    await books.writer.reached(await appended(journal, range(3, 8)))
    server.replace(url, standby)


@pytest.mark.parametrize("is_beside", [True, False])
def test_what_a_database_lacks_that_went_back_is_brought_in_again(
    postgres_server: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_beside: bool,
) -> None:
    place = Place(tmp_path, postgres_url)

    async def main() -> None:
        async with kept(place, is_beside=is_beside) as (books, journal):
            await lose_five(postgres_server, postgres_url, books, journal)
            last = await appended(journal, range(8, 10))
            await until(lambda: books.writer.applied >= last and books.writer.away_seconds is None)
            await books.writer.caught_up()
            assert balance(place) == -10 * COST

    run(main())
    assert balance(place) == -10 * COST
    assert list(journal_dir(place).iterdir()) == []
    if not is_beside:  # the other process logs by itself
        (told,) = [each for each in caplog.messages if "gone back" in each]
        assert told.endswith("the rest is read again")


def test_a_database_that_went_back_while_nothing_came_is_noticed(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octoai.server.ledger.books.KEEP_ORDER_SECONDS", 0.2)
    place = Place(tmp_path, postgres_url)

    async def main() -> None:
        async with kept(place) as (books, journal):
            await lose_five(postgres_server, postgres_url, books, journal)
            while balance(place) != -8 * COST:
                await asyncio.sleep(0.1)
            await until(lambda: books.writer.away_seconds is None)

    run(main())
    assert balance(place) == -8 * COST


@pytest.mark.parametrize("is_beside", [True, False])
def test_a_journal_stays_whose_database_went_back_before_the_end(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path, is_beside: bool
) -> None:
    place = Place(tmp_path, postgres_url)

    async def main() -> None:
        async with kept(place, is_beside=is_beside) as (books, journal):
            await lose_five(postgres_server, postgres_url, books, journal)

    run(main())
    assert list(journal_dir(place).glob("*.journal"))
    recover(place)
    assert balance(place) == -8 * COST
    assert list(journal_dir(place).iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True])
def test_of_what_was_given_up_before_a_database_went_back_a_person_is_told(
    postgres_server: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_killed: bool,
) -> None:
    """A running service goes on with what there is; one that starts waits for a person's word."""
    place = Place(tmp_path, postgres_url)
    with closing(connect(place)) as db, db.transaction():
        accounts.ensure_default(db)
    journal = Journal.open(journal_dir(place), segment_bytes=64 * 1024)

    async def main() -> int:
        books = Books(place, journal)
        books.start()
        await books.writer.reached(await appended(journal, range(3)))
        standby = postgres_server.copy(postgres_url)
        for start in range(3, 603, 100):
            await books.writer.reached(await appended(journal, range(start, start + 100)))
        given_up = journal.durable.segment
        assert given_up > 2
        await until(lambda: not list(journal.directory.glob(f"*-{given_up - 1:06}.journal")))
        if is_killed:
            await asyncio.to_thread(books.writer.close)
            journal.close()
        postgres_server.replace(postgres_url, standby)
        if not is_killed:
            await books.writer.reached(await appended(journal, range(603, 605)))
            await until(lambda: books.writer.applied >= journal.durable)
        await books.close()
        return given_up

    async def ended() -> None:
        nonlocal oldest
        oldest = await main()

    oldest = 0
    run(ended())
    if is_killed:
        with pytest.raises(JournalGap, match=f"before {oldest} is in neither") as caught:
            recover(place)
        assert balance(place) == -3 * COST
        accepted = journal_dir(place) / f"{journal.instance}.incomplete"
        assert str(accepted) in str(caught.value)
        accepted.touch()
        recover(place)
    else:
        (told,) = [each for each in caplog.messages if "gone back" in each]
        assert f"but for what was in the segments before {oldest}" in told
    assert balance(place) < -5 * COST
    assert list(journal_dir(place).iterdir()) == []
