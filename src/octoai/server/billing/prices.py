"""Prices from when on: those of the catalogue and those of the operator brought together.

Prices are kept under a model's catalogue id and never change once they are there: a new price is a new row, from a
moment on that has not come yet. What a request is charged is fixed when it begins; that is not done here.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from octoai.server.accounts import BadAccount
from octoai.server.billing.money import Price, PriceBook
from octoai.server.catalogue import Catalogue, Model, price_usd_per_million
from octoai.server.store import prices as table
from octoai.server.store.accounts import next_version
from octoai.server.store.database import Conflict, Connection
from octoai.server.store.prices import PriceRow

log = logging.getLogger("octoai.prices")

CLOCKS_US = 60_000_000  # by no more do the clocks of services differ that share a database
CATALOGUE, OPERATOR = "catalogue", "operator"


class BadPrice(BadAccount):
    """The price cannot apply from that moment on."""


def sync(db: Connection, catalogue: Catalogue, now_us: int) -> list[PriceRow]:
    """Bring in what the catalogue's prices have become, at every start; inside the caller's transaction.

    The first price that a model gets from the catalogue applies to all the time before it. Later ones apply from now
    on, and only where the catalogue itself has changed: an operator's price stays in force until then. Changed is what
    is not as the last start found it, whichever service that was: one that goes back to the catalogue of before means
    its prices too, and nothing tells it from one that was left behind.
    """
    if not due(table.all_(db), catalogue, now_us):
        return []
    next_version(db)  # others that start at this moment wait here, and find what we have added
    rows = due(table.all_(db), catalogue, now_us)
    for row in rows:
        table.add(db, row)
        if row.valid_from_us:
            _tell(row)
    return rows


def _tell(row: PriceRow) -> None:
    amounts = map(price_usd_per_million, (row.input_nanos, row.cached_input_nanos, row.output_nanos))
    log.warning(
        "%s costs %s, %s (cached) and %s (output) USD per million tokens from now on, by this service's catalogue, "
        "where it was another price at the last start; services that share a database need the same catalogue",
        *(row.model, *amounts),
    )


def due(rows: Iterable[PriceRow], catalogue: Catalogue, now_us: int) -> list[PriceRow]:
    """The rows that are missing for the catalogue's prices to be in force, and to stay so."""
    known: defaultdict[str, list[PriceRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda each: each.valid_from_us):
        if row.origin == CATALOGUE:
            known[row.model].append(row)
    taken = {(row.model, row.valid_from_us) for row in rows}
    missing = []
    for model in catalogue.values():
        price = _price(model)
        if price is None:
            continue
        for wanted_us in _starts(known[model.id], price, now_us):
            start_us = next(at_us for at_us in count(wanted_us) if (model.id, at_us) not in taken)
            missing.append(_row(model.id, price, start_us, CATALOGUE))
    return missing


def _starts(known: Sequence[PriceRow], price: Price, now_us: int) -> list[int]:
    """From when on a price of the catalogue has to be set, after those `known` from it, oldest first."""
    if not known:
        return [0]
    current, upcoming = current_and_upcoming(known, now_us + CLOCKS_US)
    starts = []
    if current is None or not _same(current, price):
        starts.append(now_us if current is None else max(now_us, current.valid_from_us + 1))
    # Of a start whose clock was ahead: what it found then must not come into force.
    if upcoming and not _same(upcoming[-1], price):
        starts.append(upcoming[-1].valid_from_us + 1)
    return starts


def set_price(db: Connection, model: Model, price: Price, from_us: int | None, now_us: int) -> PriceRow:
    """Set an operator's price from a moment on (None: from now on), inside the caller's transaction.

    Raises BadPrice for a moment that is over, or that the model has another price from.
    """
    if from_us is not None and from_us < now_us:
        raise BadPrice(
            "a price cannot apply from a moment that is over: a bill never changes afterwards", param="valid_from"
        )
    row = _row(model.id, price, now_us if from_us is None else from_us, OPERATOR)
    try:
        table.add(db, row)
    except Conflict:
        text = f"{model.id} has a price from that very moment already, and a price never changes"
        raise BadPrice(text, param="valid_from") from None
    return row


def priced(catalogue: Catalogue, book: PriceBook) -> Iterator[tuple[Model, tuple[PriceRow, ...]]]:
    """Every model that has, had or will have a price, with its prices, oldest first."""
    for model in catalogue.values():
        rows = book.rows(model.id)
        if rows:
            yield model, rows


def current_and_upcoming(rows: Sequence[PriceRow], now_us: int) -> tuple[PriceRow | None, list[PriceRow]]:
    """Of a model's prices, oldest first: (the one in force, if any; those to come)."""
    past = [row for row in rows if row.valid_from_us <= now_us]
    return past[-1] if past else None, list(rows[len(past) :])


def _price(model: Model) -> Price | None:
    if model.input_price_nanos is None or model.output_price_nanos is None:
        return None
    cached = model.cached_input_price_nanos
    return Price(
        model.input_price_nanos, model.input_price_nanos if cached is None else cached, model.output_price_nanos
    )


def _same(row: PriceRow, price: Price) -> bool:
    return Price(row.input_nanos, row.cached_input_nanos, row.output_nanos) == price


def _row(model: str, price: Price, from_us: int, origin: str) -> PriceRow:
    return PriceRow(model, from_us, price.input_nanos, price.cached_input_nanos, price.output_nanos, origin)
