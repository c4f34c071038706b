"""Prices, and the ledger's row of a request."""

from __future__ import annotations

from octoai.server import accounts
from octoai.server.api import views
from octoai.server.api.admin.calls import Call, Json, listed
from octoai.server.billing import prices
from octoai.server.billing.money import Price
from octoai.server.catalogue import price_nanos
from octoai.server.errors import NotFound, StateConflict, UnknownModel
from octoai.server.store import prices as table
from octoai.server.store import requests
from octoai.server.store.database import Connection
from octoai.server.store.requests import RequestRow
from octoai.server.times import now_us


async def list_prices(call: Call) -> Json:
    rows = await call.service.read(table.all_)
    return listed([views.listed_price(row) for row in rows], has_more=False)


async def set_price(call: Call) -> Json:
    given, catalogue = call.body, call.service.router.catalogue
    model = catalogue.find(given["model"])
    if model is None:
        raise UnknownModel(given["model"], catalogue.nearest(given["model"]))
    cost, cached, output = (
        price_nanos(given[name]) for name in ("input", "cached_input" if "cached_input" in given else "input", "output")
    )
    price = Price(cost, cached, output)
    from_us = given["valid_from"] * 1_000_000 if "valid_from" in given else None

    def write(db: Connection) -> Json:
        return views.listed_price(prices.set_price(db, model, price, from_us, now_us()))

    return await call.service.write(write)


async def show_request(call: Call) -> Json:
    return await call.service.read(lambda db: views.request(_request(db, call.id)))


async def refund_request(call: Call) -> Json:
    def write(db: Connection) -> Json:
        row = _request(db, call.id)
        if row.status == "open":
            raise StateConflict(f"The request {call.id} is still running; it can be refunded when it has ended.")
        if row.status != "refunded":  # once is enough, however often it is asked
            row = requests.refund(db, row, accounts.checked_note(call.body["note"]), call.now_us)
        return views.request(row)

    return await call.service.write(write)


def _request(db: Connection, request_id: str) -> RequestRow:
    rows = requests.named(db, request_id) if request_id.isprintable() else []  # no database takes every character
    if not rows:
        raise NotFound(f"There is no request {request_id!r:.140} in the ledger.", param="request_id")
    if len(rows) > 1:  # clients may choose ids, and the database was away when this was used again
        ids = ", ".join(row.id for row in rows)
        raise StateConflict(f"{len(rows)} requests are called {request_id!r:.140}; say which, by its id: {ids:.1000}.")
    return rows[0]
