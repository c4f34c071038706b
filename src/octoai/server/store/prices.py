"""Prices of models, each from a date on. A row is never changed: a new price is a new row."""

from __future__ import annotations

from dataclasses import dataclass

from octoai.server.store.accounts import next_version
from octoai.server.store.database import Connection, Row


@dataclass(frozen=True, slots=True)
class PriceRow:
    """Nano-dollars per token, from `valid_from_us` until the model's next row. `origin`: "catalogue", for one that
    came with the configuration, or "operator"."""

    model: str
    valid_from_us: int
    input_nanos: int
    cached_input_nanos: int
    output_nanos: int
    origin: str


COLUMNS = "model, valid_from_us, input_nanos, cached_input_nanos, output_nanos, origin"


def row_of(row: Row) -> PriceRow:
    return PriceRow(*row[:6])


def add(db: Connection, price: PriceRow) -> None:
    """Raises Conflict where the model has a price from that very moment."""
    values = (
        *(price.model, price.valid_from_us),
        *(price.input_nanos, price.cached_input_nanos, price.output_nanos, price.origin),
        next_version(db),
    )
    db.execute(f"INSERT INTO prices ({COLUMNS}, version) VALUES (?, ?, ?, ?, ?, ?, ?)", values)  # noqa: S608


def all_(db: Connection) -> list[PriceRow]:
    """Every price, a model's oldest first."""
    return [row_of(row) for row in db.rows(f"SELECT {COLUMNS} FROM prices ORDER BY model, valid_from_us")]  # noqa: S608
