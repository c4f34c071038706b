"""Accounts, tokens and prices in memory: who is let in, how soon a change is known, and while the database is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from octoai.server import accounts, tokens
from octoai.server.accounts import Caller
from octoai.server.billing import prices
from octoai.server.billing.money import Price
from octoai.server.catalogue import Catalogue
from octoai.server.directory import Directory
from octoai.server.errors import Unauthenticated, Unavailable
from octoai.server.store import Connection, Place, StoreAway, connect
from octoai.server.store.directory import version_of
from octoai.server.store.reader import Reader
from octoai.server.tokens import new_token

# ── the directory ────────────────────────────────────────────────────────────────────────────────────────────────────


class WatchedReader(Reader):
    """Counts the looks, and can be told that the database is away."""

    num_looks = 0
    is_away = False
    delay = 0.0

    async def run(self, action: Callable[[Connection], Any], *, seconds: float = 5.0) -> Any:
        self.num_looks += 1
        if self.is_away:
            raise StoreAway("it is away")
        result = await super().run(action, seconds=seconds)
        await asyncio.sleep(self.delay)
        return result


@asynccontextmanager
async def directory(
    place: Place, kind: type[WatchedReader] = WatchedReader, **options: Any
) -> AsyncIterator[tuple[Directory, WatchedReader]]:
    connect(place).close()
    reader = kind(place)
    made = Directory(reader, **options)
    try:
        await made.start()
        yield made, reader
    finally:
        await made.close()
        reader.close()


def done(place: Place, action: Callable[[Connection], Any]) -> Any:
    """By another process, as it were."""
    with closing(connect(place)) as db, db.transaction():
        return action(db)


def minted(place: Place, account: str = "default", **options: Any) -> tokens.Minted:
    made: tokens.Minted = done(place, lambda db: tokens.mint(db, "mine", account, **options))
    return made


async def entered(known: Directory, text: str) -> Caller:
    return await known.authenticate(f"Bearer {text}")


async def refused(known: Directory, text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await entered(known, text)
    return caught.value.message


async def seconds_until(refusal: Callable[[], Awaitable[object]]) -> float:
    """How long it takes until this is refused."""
    began = time.monotonic()
    while time.monotonic() < began + 5:
        try:
            await refusal()
        except Unauthenticated:
            return time.monotonic() - began
        await asyncio.sleep(0.005)
    raise AssertionError("never refused")


def test_a_token_lets_its_account_in(place: Place) -> None:
    async def run() -> None:
        done(place, lambda db: accounts.create(db, "acme", plan="pro"))
        token = minted(place, "acme", scopes=["usage"], models=["m"])
        async with directory(place) as (known, _):
            caller = await entered(known, token.text)
            assert (caller.account.id, caller.account.plan, caller.token.id) == ("acme", "pro", token.id)
            assert (caller.token.scopes, caller.token.models) == ({"usage"}, ("m",))
            for header in (f"bearer {token.text}", f"BEARER {token.text}", f"Bearer   {token.text} "):
                assert await known.authenticate(header) == caller

    asyncio.run(run())


def test_nothing_else_lets_anybody_in(place: Place) -> None:
    async def run() -> None:
        token = minted(place).text
        wrong = [None, "", " ", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Token x", "Bearer x", "Bearer \xff\xfe"]
        wrong += [token, f"Basic {token}", f"Bearer {token} {token}", f"Bearer {token[:-1]}", f"Bearer {new_token()}"]
        async with directory(place) as (known, _):
            for header in wrong:
                with pytest.raises(Unauthenticated) as caught:
                    await known.authenticate(header)
                assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
                assert caught.value.headers["www-authenticate"] == "Bearer"
                assert "octoai token create" in caught.value.message
                assert token not in str(caught.value.body())

    asyncio.run(run())


def test_a_new_token_works_at_once(place: Place) -> None:
    async def run() -> None:
        async with directory(place) as (known, reader):
            for delay in (0.0, 0.05):  # also where a look that began before is still under way
                reader.delay = delay
                for _ in range(5):
                    looking = asyncio.create_task(known.refresh())
                    await asyncio.sleep(0)
                    assert (await entered(known, minted(place).text)).account.id == "default"
                    await looking

    asyncio.run(run())


def test_the_first_look_may_take_longer_than_those_for_changes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With some hundred thousand tokens it takes seconds, and the service could not be started."""

    class Slow(WatchedReader):
        async def run(self, action: Callable[[Connection], Any], *, seconds: float = 5.0) -> Any:
            def slowly(db: Connection) -> Any:
                if is_hung or action is not version_of:
                    time.sleep(0.2)
                return action(db)

            return await super().run(slowly, seconds=seconds)

    is_hung = False

    async def run() -> None:
        nonlocal is_hung
        token = minted(place)
        async with directory(place, Slow) as (known, _):
            assert (await entered(known, token.text)).token.id == token.id
            # Nor could what had changed be read again, or all of a database that has gone back.
            for version in (0, 1_000_000):
                known._version = version
                await known.refresh()
                assert (await entered(known, token.text)).token.id == token.id
            is_hung = True
            with pytest.raises(StoreAway, match=r"did not answer within 0\.05 s"):
                await known.refresh()

    monkeypatch.setattr("octoai.server.directory.WAIT_SECONDS", 0.05)
    asyncio.run(run())


@pytest.mark.parametrize("is_waiting_for_all", [False, True])
def test_who_waits_for_a_look_at_what_is_locked_is_told_soon(
    place: Place, monkeypatch: pytest.MonkeyPatch, is_waiting_for_all: bool
) -> None:
    """That there is a change could be read, and not what: a new token and whoever had changed something waited a
    minute, in which the database did not count as away."""

    class Locked(WatchedReader):
        async def run(self, action: Callable[[Connection], Any], *, seconds: float = 5.0) -> Any:
            if is_locked and action is not version_of:
                await asyncio.sleep(seconds)
                raise StoreAway("the table of tokens is locked")
            return await super().run(action, seconds=seconds)

    is_locked = False

    async def run() -> None:
        nonlocal is_locked
        old = minted(place)
        async with directory(place, Locked) as (known, _):
            is_locked, known._reads_all, new = True, is_waiting_for_all, minted(place)
            began = time.monotonic()
            with pytest.raises(StoreAway):
                await known.refresh()
            with pytest.raises(Unavailable):
                await entered(known, new.text)
            assert time.monotonic() < began + 5
            await entered(known, old.text)

    monkeypatch.setattr("octoai.server.directory.WAIT_SECONDS", 0.1)
    monkeypatch.setattr("octoai.server.directory.PATIENCE_SECONDS", 0.5)
    asyncio.run(run())


def test_what_is_read_again_and_is_as_it_was_is_not_made_anew(place: Place) -> None:
    """After a look that took too long: 200,000 tokens made anew, and those before thrown away, had the service stand
    still for 0.4 s. When one was used last is no change."""

    async def run() -> None:
        done(place, lambda db: accounts.create(db, "acme"))
        same, other = minted(place, "acme"), minted(place, "acme")
        async with directory(place) as (known, reader):
            before = [await entered(known, each.text) for each in (same, other)]
            reader.is_away = True
            with pytest.raises(StoreAway):
                await known.refresh()
            with closing(connect(place)) as db, db.transaction():
                db.execute("UPDATE tokens SET last_used_at = 7 WHERE id = ?", (same.id,))
                db.execute("UPDATE tokens SET name = 'new' WHERE id = ?", (other.id,))
            reader.is_away = False
            await known.refresh()
            after = [await entered(known, each.text) for each in (same, other)]
            assert after[0].token is before[0].token and after[0].account is before[0].account
            assert after[1].token.name == "new" != before[1].token.name

    asyncio.run(run())


def test_what_comes_back_with_as_many_changes_but_others_is_read_anew(place: Place) -> None:
    """A standby that was behind, and has been changed as often as it had missed: a token that was revoked there stayed
    good, and one that it does not know."""

    async def run() -> None:
        revoked, lost = minted(place), minted(place)
        async with directory(place) as (known, reader):
            for token in (revoked, lost):
                await entered(known, token.text)
            reader.is_away = True
            with pytest.raises(StoreAway):
                await known.refresh()
            with closing(connect(place)) as db, db.transaction():  # at the same version
                db.execute("UPDATE tokens SET revoked_at = 1 WHERE id = ?", (revoked.id,))
                db.execute("DELETE FROM tokens WHERE id = ?", (lost.id,))
            reader.is_away = False
            await known.refresh()
            assert "revoked" in await refused(known, revoked.text)
            assert "not known" in await refused(known, lost.text)

    asyncio.run(run())


def test_a_revocation_by_another_is_seen_within_three_tenths_of_a_second(place: Place) -> None:
    async def run() -> None:
        token = minted(place)
        async with directory(place) as (one, _), directory(place) as (other, _):
            for known in (one, other):
                await entered(known, token.text)
            assert done(place, lambda db: tokens.revoke(db, token.id))
            for known in (one, other):
                assert await seconds_until(lambda known=known: entered(known, token.text)) < 0.35
                assert "revoked" in await refused(known, token.text)

    asyncio.run(run())


def test_what_is_refreshed_after_a_change_has_it(place: Place) -> None:
    """Also where a look is under way that began before it."""

    async def run() -> None:
        async with directory(place) as (known, reader):
            reader.delay = 0.02
            for _ in range(10):
                token = minted(place)
                await entered(known, token.text)
                early = asyncio.create_task(known.refresh())
                await asyncio.sleep(0.01)
                done(place, lambda db, token=token: tokens.revoke(db, token.id))
                await known.refresh()
                await refused(known, token.text)
                await early

    asyncio.run(run())


def test_a_flood_of_made_up_tokens_costs_forty_looks_a_second_at_most(place: Place) -> None:
    async def run() -> None:
        async with directory(place) as (known, reader):
            token = minted(place)
            before, began = reader.num_looks, time.monotonic()
            num_refused = 0
            while time.monotonic() < began + 1.0:
                strangers = [new_token() for _ in range(100)]
                answers = await asyncio.gather(*(entered(known, each) for each in strangers), return_exceptions=True)
                assert all(isinstance(answer, Unauthenticated) for answer in answers)
                num_refused += len(answers)
            assert num_refused >= 1000
            assert reader.num_looks - before <= 40
            assert (await entered(known, token.text)).token.id == token.id

    asyncio.run(run())


def test_a_flood_of_malformed_tokens_costs_nothing(place: Place) -> None:
    async def run() -> None:
        async with directory(place) as (known, reader):
            before, began = reader.num_looks, time.monotonic()
            for number in range(10_000):
                with pytest.raises(Unauthenticated):
                    await known.authenticate(f"Bearer octoai_{number:038}")
            own = (time.monotonic() - began) / 0.25 + 1
            assert reader.num_looks - before <= own

    asyncio.run(run())


def test_a_known_token_needs_no_database(place: Place) -> None:
    async def run() -> None:
        token = minted(place)
        async with directory(place) as (known, reader):
            before, began = reader.num_looks, time.monotonic()
            for _ in range(1000):
                await entered(known, token.text)
            assert reader.num_looks - before <= (time.monotonic() - began) / 0.25 + 1

    asyncio.run(run())


def test_expired_tokens_and_closed_accounts_are_refused(place: Place) -> None:
    async def run() -> None:
        done(place, lambda db: accounts.create(db, "acme"))
        short, other = minted(place, expires_at=int(time.time()) + 2), minted(place, "acme")
        async with directory(place) as (known, _):
            await entered(known, short.text)
            await entered(known, other.text)
            done(place, lambda db: accounts.close(db, "acme"))
            await known.refresh()
            assert "closed" in await refused(known, other.text)
            done(place, lambda db: accounts.reopen(db, "acme"))
            await known.refresh()
            await entered(known, other.text)
            assert await seconds_until(lambda: entered(known, short.text)) < 2.1
            assert "expired" in await refused(known, short.text)

    asyncio.run(run())


def test_changes_of_limits_are_taken_over(place: Place) -> None:
    async def run() -> None:
        token = minted(place)
        async with directory(place) as (known, _):
            caller = await entered(known, token.text)
            assert not (caller.is_limited or caller.needs_prompt_tokens)
            done(place, lambda db: tokens.update(db, token.id, {"completion_tokens_per_minute": 9}))
            done(place, lambda db: accounts.update(db, "default", limits={"completion_tokens_per_minute": 7}))
            await known.refresh()
            caller = await entered(known, token.text)
            assert (caller.is_limited, caller.max_completion_tokens) == (True, 7)
            done(place, lambda db: accounts.update(db, "default", is_prepaid=True))
            await known.refresh()
            assert (await entered(known, token.text)).needs_prompt_tokens

    asyncio.run(run())


def test_while_the_database_is_away_known_tokens_stay_good_for_so_long(place: Place) -> None:
    async def run() -> None:
        token = minted(place)
        now = 0.0
        async with directory(place, away_seconds=60.0, clock=lambda: now) as (known, reader):
            await entered(known, token.text)
            new = minted(place)
            reader.is_away = True
            with pytest.raises(Unavailable) as caught:
                await entered(known, new.text)
            assert (caught.value.status, caught.value.code) == (503, "database_away")
            for now in (1.0, 59.0):  # noqa: B007  # the clock reads it
                await entered(known, token.text)
                looks = reader.num_looks
                with pytest.raises(Unavailable):
                    await entered(known, new_token())
                assert reader.num_looks == looks  # nobody waits for what is known to be away
            await refused(known, "octoai_nonsense")
            now = 61.0
            with pytest.raises(Unavailable, match="database"):
                await entered(known, token.text)
            reader.is_away = False
            await known.refresh()
            for each in (token, new):
                await entered(known, each.text)
            await refused(known, new_token())

    asyncio.run(run())


def test_with_no_time_at_all_everybody_is_refused_only_while_it_is_away(place: Place) -> None:
    async def run() -> None:
        token = minted(place)
        async with directory(place, away_seconds=0.0) as (known, reader):
            await asyncio.sleep(0.1)
            await entered(known, token.text)
            reader.is_away = True
            await asyncio.sleep(0.4)
            with pytest.raises(Unavailable):
                await entered(known, token.text)
            with pytest.raises(Unavailable):
                known.check()
            reader.is_away = False
            await asyncio.sleep(0.4)
            await entered(known, token.text)
            known.check()

    asyncio.run(run())


def test_a_price_set_by_another_is_known_soon(place: Place) -> None:
    async def run() -> None:
        model = Catalogue.load()["smollm2-135m-instruct"]
        async with directory(place) as (known, _):
            assert known.prices.of(model.id, 2**60) is None
            now_us = time.time_ns() // 1000
            done(place, lambda db: prices.set_price(db, model, Price(3, 2, 1), None, now_us))
            await asyncio.sleep(0.4)
            row = known.prices.of(model.id, now_us)
            assert row is not None
            assert (row.input_nanos, row.cached_input_nanos, row.output_nanos) == (3, 2, 1)
            assert known.prices.of(model.id, now_us - 1) is None

    asyncio.run(run())


def test_a_database_that_has_gone_back_in_time_is_what_counts(place: Place) -> None:
    """A standby that was behind has taken its place: what was made since is unknown, what was closed since is open."""

    async def main() -> None:
        done(place, accounts.ensure_default)
        kept, revoked = minted(place), minted(place)
        before = done(place, lambda db: db.rows("SELECT * FROM tokens"))
        (version,) = done(place, lambda db: db.row("SELECT value FROM versions WHERE name = 'directory'"))
        done(place, lambda db: tokens.revoke(db, revoked.id))
        done(place, lambda db: accounts.create(db, "acme"))
        lost = minted(place, "acme")
        async with directory(place) as (known, _):
            assert (await entered(known, lost.text)).account.id == "acme"
            assert "revoked" in await refused(known, revoked.text)

            def go_back(db: Connection) -> None:
                db.execute("DELETE FROM tokens")
                db.execute("DELETE FROM accounts WHERE id = 'acme'")
                db.execute_many(f"INSERT INTO tokens VALUES ({', '.join('?' * len(before[0]))})", before)
                db.execute("UPDATE versions SET value = ? WHERE name = 'directory'", (version,))

            done(place, go_back)
            await known.refresh()
            assert "not known" in await refused(known, lost.text)
            await entered(known, kept.text)
            await entered(known, revoked.text)
            made = minted(place)  # its version is one that was known before
            await entered(known, made.text)

    asyncio.run(main())
