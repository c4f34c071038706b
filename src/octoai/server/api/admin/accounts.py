"""Accounts and their credit."""

from __future__ import annotations

from octoai.server import accounts
from octoai.server.api import views
from octoai.server.api.admin.bodies import split_limits
from octoai.server.api.admin.calls import Call, Json, listed, once, page
from octoai.server.billing.money import nanos
from octoai.server.errors import BadRequest
from octoai.server.store import accounts as table
from octoai.server.store import entries
from octoai.server.store import tokens as token_table
from octoai.server.store.database import Connection


async def list_accounts(call: Call) -> Json:
    limit, after = call.limit, call.after

    def read(db: Connection) -> Json:
        rows, has_more = page([(row.id, row) for row in table.all_(db)], limit, after)
        num_tokens = token_table.num_active(db, call.now_us)
        holdings = [views.holdings(db, row.id, num_tokens, call.now_us) for row in rows]
        return listed([views.account(row, held) for row, held in zip(rows, holdings, strict=True)], has_more)

    return await call.service.read(read)


async def create_account(call: Call) -> Json:
    given, limits = split_limits(call.body)

    def write(db: Connection) -> Json:
        row = accounts.create(
            db,
            given["id"],
            name=given.get("name"),
            plan=given.get("plan", "free"),
            is_prepaid=given.get("prepaid", False),
            limits=limits,
        )
        return account_of(db, row.id, call.now_us)

    return await call.service.write(write)


async def show_account(call: Call) -> Json:
    return await call.service.read(lambda db: account_of(db, call.id, call.now_us))


async def update_account(call: Call) -> Json:
    given, limits = split_limits(call.body)

    def write(db: Connection) -> Json:
        accounts.update(
            db,
            call.id,
            name=given.get("name"),
            plan=given.get("plan"),
            is_prepaid=given.get("prepaid"),
            limits=limits,
        )
        if "closed" in given:
            (accounts.close if given["closed"] else accounts.reopen)(db, call.id)
        return account_of(db, call.id, call.now_us)

    return await call.service.write(write)


async def close_account(call: Call) -> Json:
    def write(db: Connection) -> Json:
        accounts.close(db, call.id)
        return account_of(db, call.id, call.now_us)

    return await call.service.write(write)


async def list_entries(call: Call) -> Json:
    limit, after = call.limit, call.after
    seq = int(after) if after and after.isascii() and after.isdigit() and len(after) < 19 else None

    def read(db: Connection) -> Json:
        accounts.find(db, call.id)
        if after is not None and (seq is None or not entries.is_of_account(db, call.id, seq)):
            raise BadRequest("after: the `id` of an entry of the page before", param="after")
        rows = entries.of_account(db, call.id, limit + 1, seq)
        return listed([views.entry(row) for row in rows[:limit]], len(rows) > limit)

    return await call.service.read(read)


async def add_credit(call: Call) -> Json:
    given = call.body

    def write(db: Connection) -> Json:
        amount, kind = nanos(given["amount"]), given.get("kind", "grant")
        entry = accounts.credit(db, call.id, amount, note=given.get("note", ""), kind=kind)
        return views.entry(entry) | {"balance": account_of(db, call.id, call.now_us)["balance"]}

    return await call.service.write(lambda db: once(db, call, write))


def account_of(db: Connection, account_id: str, now_us: int) -> Json:
    row = accounts.find(db, account_id)
    return views.account(row, views.holdings(db, row.id, token_table.num_active(db, now_us, row.id), now_us))
