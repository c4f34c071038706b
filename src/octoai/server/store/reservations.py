"""What limited requests hold back until they end, and what counts against rate limits: exact in the database, so that
it holds for every process that shares it.

One row for each request of an account or token with limits. While it is open it holds money and a place among the
concurrent ones, until its lease ends; its tokens count for the minute that follows `at_us`, first as many as it might
need, then as many as it had. A lease that is over has lapsed once somebody else was given what it held; until then
its request may still be renewed or charged.

What has lapsed is kept for a day: a request that is settled late must not be taken for one whose reservation was lost
with the database that it was in, and is held again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from octoai.server.store import accounts, rates, tokens
from octoai.server.store.accounts import AccountRow, Limits
from octoai.server.store.database import Connection, chunks
from octoai.server.store.entries import ledger_us, month_of
from octoai.server.store.rates import PRUNED_AT_ONCE, Payer
from octoai.server.store.tokens import TokenRow
from octoai.server.times import DAY_US, MINUTE_US, SECOND_US

_COLUMNS = "id, account, token_id, at_us, nanos, prompt_tokens, completion_tokens, lease_us"
_ENDED, _OPEN, _LAPSED = 0, 1, -1  # in `is_open`
LAPSED_US = DAY_US


@dataclass(frozen=True, slots=True)
class Reservation:
    """`nanos`, `prompt_tokens` and `completion_tokens` are the most that the request can come to."""

    id: str
    account: str
    token_id: str
    at_us: int
    nanos: int
    prompt_tokens: int
    completion_tokens: int
    lease_us: int

    @property
    def counted(self) -> tuple[tuple[str, str], int, int, int]:
        """What the rates of its account and token count."""
        return (self.account, self.token_id), self.at_us, self.prompt_tokens, self.completion_tokens


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an account, or a token, stands with its limits. The first four are of the last minute; `spent_nanos` and
    `held_nanos` are what it was charged this month and what its open requests hold back."""

    limits: Limits
    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    newest_us: int = 0
    num_running: int = 0
    held_nanos: int = 0
    spent_nanos: int = 0
    credit_nanos: int | None = None

    @property
    def left_nanos(self) -> int | None:
        """What may still be spent; None where nothing limits it."""
        bounds = []
        if self.limits.hard_budget_nanos is not None:
            # Not more than the budget for a refund: what is held may come to be charged to the next month, without it.
            bounds.append(self.limits.hard_budget_nanos - max(0, self.spent_nanos))
        if self.credit_nanos is not None:
            bounds.append(self.credit_nanos)
        return min(bounds) - self.held_nanos if bounds else None

    def with_one_more(self, held: Reservation) -> Standing:
        """As it is once that is held as well."""
        return replace(
            self,
            num_requests=self.num_requests + 1,
            prompt_tokens=self.prompt_tokens + held.prompt_tokens,
            completion_tokens=self.completion_tokens + held.completion_tokens,
            newest_us=max(self.newest_us, held.at_us),
            num_running=self.num_running + 1,
            held_nanos=self.held_nanos + held.nanos,
        )


def standings(
    db: Connection, account: AccountRow, token: TokenRow, now_us: int, charge_us: int | None = None
) -> tuple[Standing, Standing]:
    """Of the account and of the token, as things are now; spent is the month of a charge at `charge_us`."""
    month = month_of(ledger_us(db, now_us if charge_us is None else charge_us))
    return _of_account(db, account, now_us, month), _of_token(db, token, now_us, month)


def lapse(db: Connection, account: str, now_us: int) -> None:
    """End what an account's requests hold beyond their leases, before its money is given to others. For good: neither
    a late sign of life nor a clock that goes back must bring it to life again."""
    over = f"account = ? AND is_open = {_OPEN} AND lease_us < ?"
    db.execute(f"UPDATE reservations SET is_open = {_LAPSED} WHERE {over}", (account, now_us))  # noqa: S608


def hold(db: Connection, reservation: Reservation) -> None:
    db.execute(
        "INSERT INTO reservations (id, account, token_id, at_us, nanos, prompt_tokens, completion_tokens, is_open, "
        "lease_us) VALUES (?, ?, ?, ?, ?, ?, ?, 1, ?)",
        (
            *(reservation.id, reservation.account, reservation.token_id, reservation.at_us, reservation.nanos),
            *(reservation.prompt_tokens, reservation.completion_tokens, reservation.lease_us),
        ),
    )
    rates.add(db, *reservation.counted)


def hold_again(db: Connection, records: Iterable[Mapping[str, Any]], now_us: int) -> None:
    """What requests held by the journal's `records`, of which this database never heard: it was away, or is older than
    they are. A copy was restored, or a standby that was behind has taken its place; what they used is theirs to pay all
    the same."""
    held = [record for record in records if record.get("held_nanos") is not None]
    hold_unknown(db, map(_of_record, held), now_us)


def hold_unknown(db: Connection, held: Iterable[Reservation], now_us: int) -> None:
    """Those of which this database never heard, whatever it has promised to others since."""
    by_id = {each.id: each for each in held}
    for marks, ids in chunks(by_id):
        known = {row[0] for row in db.rows(f"SELECT id FROM reservations WHERE id IN ({marks})", ids)}  # noqa: S608
        for each in (by_id[id_] for id_ in ids if id_ not in known):
            hold(db, replace(each, lease_us=max(each.lease_us, now_us + MINUTE_US)))


def _of_record(record: Mapping[str, Any]) -> Reservation:
    payers = (record["account"], record["token_id"])
    return Reservation(record["id"], *payers, record["opened_us"], record["held_nanos"], 0, 0, record["lease_us"])


def release(db: Connection, reservation_id: str) -> None:
    """Of a request that never ran: it leaves no trace."""
    found = _find(db, reservation_id)
    if found is not None:
        db.execute("DELETE FROM reservations WHERE id = ?", (reservation_id,))
        rates.remove(db, *found[0].counted)


def close(db: Connection, reservation_id: str, prompt_tokens: int, completion_tokens: int) -> Reservation | None:
    """Of a request that has ended. What it held until now; None where it held nothing: it has lapsed, or never was."""
    found = _find(db, reservation_id)
    if found is None:
        return None
    held, is_open = found
    db.execute(
        "UPDATE reservations SET is_open = 0, prompt_tokens = ?, completion_tokens = ? WHERE id = ?",
        (prompt_tokens, completion_tokens, reservation_id),
    )
    payers, at_us, prompt_before, completion_before = held.counted
    rates.change(db, payers, at_us, prompt_tokens - prompt_before, completion_tokens - completion_before)
    return held if is_open else None


def _find(db: Connection, reservation_id: str) -> tuple[Reservation, bool] | None:
    """And whether it holds anything."""
    query = f"SELECT {_COLUMNS}, is_open FROM reservations WHERE id = ?"  # noqa: S608  # constants only
    row = db.row(query, (reservation_id,))
    return None if row is None else (Reservation(*row[:-1]), row[-1] == _OPEN)


def renew(db: Connection, leases: list[tuple[int, str]]) -> None:
    """(until, id) of requests that are running. None is cut short, by a record that is read again or a clock that went
    back."""
    db.execute_many(
        "UPDATE reservations SET lease_us = ? WHERE id = ? AND is_open = 1 AND lease_us < ?",
        [(until_us, reservation_id, until_us) for until_us, reservation_id in leases],
    )


def prune(db: Connection, now_us: int) -> bool:
    """Some of the rows that count for nothing any more, oldest first; whether there may be more. With a thousand
    requests a second, to delete all of ten seconds would keep everybody else from writing for a tenth of one."""
    old_us = now_us - 2 * MINUTE_US
    before_us = old_us // SECOND_US * SECOND_US  # as `rates` has them
    oldest = f"at_us < ? AND (is_open = {_ENDED} OR lease_us < ?) ORDER BY at_us LIMIT ?"
    sql = f"DELETE FROM reservations WHERE id IN (SELECT id FROM reservations WHERE {oldest})"  # noqa: S608  # constants only
    num = db.execute(sql, (before_us, now_us - LAPSED_US, PRUNED_AT_ONCE))
    return num == PRUNED_AT_ONCE or rates.prune(db, before_us)


def left_nanos(db: Connection, account_id: str, token_id: str, now_us: int, charge_us: int) -> int:
    """What may still be charged at `charge_us` to this account by this token under hard limits. Either bounds nothing
    where the database does not know it, having gone back to before it was made."""
    account, token = accounts.find(db, account_id), tokens.find(db, token_id)
    month, found = month_of(ledger_us(db, charge_us)), list[Standing]()
    if account is not None:
        found.append(_of_account(db, account, now_us, month))
    if token is not None:
        found.append(_of_token(db, token, now_us, month))
    return min((each.left_nanos for each in found if each.left_nanos is not None), default=2**62)


def _of_account(db: Connection, account: AccountRow, now_us: int, month: str) -> Standing:
    return _standing(db, "account", account.id, account.limits, now_us, month, is_prepaid=account.is_prepaid)


def _of_token(db: Connection, token: TokenRow, now_us: int, month: str) -> Standing:
    return _standing(db, "token_id", token.id, token.limits, now_us, month)


def _standing(
    db: Connection,
    column: Payer,
    payer: str,
    limits: Limits,
    now_us: int,
    month: str,
    *,
    is_prepaid: bool = False,
) -> Standing:
    # One statement, so of one moment: a charge that is posted meanwhile is seen whole, with what it no longer holds.
    recent, of_recent = rates.recent(column, payer, now_us)
    row = db.row(
        f"""
        SELECT recent.*, running.*,
            COALESCE((SELECT nanos FROM spending WHERE payer = ? AND month = ?), 0),
            COALESCE((SELECT nanos FROM balances WHERE account = ?), 0)
        FROM ({recent}) AS recent, (
            SELECT COUNT(*), COALESCE(SUM(nanos), 0)
            FROM reservations WHERE {column} = ? AND is_open = 1 AND lease_us >= ?
        ) AS running
        """,  # noqa: S608  # a column of ours
        (payer, month, payer, *of_recent, payer, now_us),
    )
    assert row is not None
    standing = Standing(limits, *row)
    return standing if is_prepaid else replace(standing, credit_nanos=None)
