"""Money: integer nano-dollars, and how they are written.

A price of $0.15 per million tokens is 150 nano-dollars per token, exactly; no sum is ever rounded.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from dataclasses import dataclass

from octoai.server.engines.base import Usage
from octoai.server.store.prices import PriceRow

NANOS = 1_000_000_000
_AMOUNT = re.compile(r"(-?)\$?([0-9]{1,10})(?:\.([0-9]{1,9}))?")


@dataclass(slots=True)
class Price:
    """Nano-dollars per token. Tokens of a prompt that were found in the cache cost `cached_input_nanos` each.

    Never changed once it is made; not `frozen`, as in `engines.base`.
    """

    input_nanos: int = 0
    cached_input_nanos: int = 0
    output_nanos: int = 0

    def charge(self, usage: Usage) -> int:
        """What so many tokens cost, in nano-dollars."""
        return (
            (usage.prompt_tokens - usage.cached_tokens) * self.input_nanos
            + usage.cached_tokens * self.cached_input_nanos
            + usage.completion_tokens * self.output_nanos
        )

    def most(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The most that a request with so many tokens can cost."""
        return prompt_tokens * max(self.input_nanos, self.cached_input_nanos) + completion_tokens * self.output_nanos


class PriceBook:
    """Every price of every model, from when to when. Kept in memory; rows are added as they become known."""

    def __init__(self, rows: Iterable[PriceRow] = ()) -> None:
        self._rows: dict[str, list[PriceRow]] = {}
        self.add(rows)

    def add(self, rows: Iterable[PriceRow]) -> None:
        for row in rows:
            known = self._rows.setdefault(row.model, [])
            place = bisect.bisect(known, row.valid_from_us, key=lambda each: each.valid_from_us)
            if known[place - 1 : place] != [row]:  # a model has one price from any moment
                known.insert(place, row)

    def of(self, model: str, at_us: int) -> PriceRow | None:
        """The price that applies to a model at that moment."""
        for row in reversed(self._rows.get(model, ())):
            if row.valid_from_us <= at_us:
                return row
        return None

    def rows(self, model: str) -> tuple[PriceRow, ...]:
        """A model's prices, oldest first; those to come are among them."""
        return tuple(self._rows.get(model, ()))

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._rows)


def usd(nanos: int) -> str:
    """Dollars as a decimal, exact, with at least two digits after the point: 1500 is "0.0000015"."""
    sign = "-" if nanos < 0 else ""
    whole, rest = divmod(abs(nanos), NANOS)
    decimals = f"{rest:09}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"


def nanos(amount: str) -> int:
    """The inverse of `usd`. Raises ValueError that says what would be right."""
    match = _AMOUNT.fullmatch(amount.strip())
    if match is None:
        raise ValueError(f'an amount is dollars with at most nine decimals, like "25" or "0.50", not {amount!r}')
    sign, whole, decimals = match.groups()
    value = int(whole) * NANOS + int((decimals or "").ljust(9, "0"))
    if value >= 2**63:
        raise ValueError(f"an amount is below 9.2 billion dollars, not {amount!r}")
    return -value if sign else value
