"""A request as its own process sees it: what that writes of it, and what the books must say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from octoai.server.accounts import Caller
from octoai.server.billing.money import Price
from octoai.server.store.reservations import Reservation

SECOND = 1_000_000
LEASE = 60 * SECOND
START = 1_793_491_140_000_000  # 2026-10-31 23:59:00 UTC: months end while it runs
PRICE = Price(input_nanos=3, cached_input_nanos=1, output_nanos=10)
BUDGET = 900  # about what three requests cost
COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(slots=True)
class Running:
    """One request. What it was charged is for the books to say."""

    id: str
    caller: Caller
    opened_us: int
    prompt_tokens: int
    cached_tokens: int
    reservation: Reservation | None
    completion_tokens: int = 0
    is_open: bool = True
    pending: list[dict[str, Any]] = field(default_factory=list)  # written, and not yet in the books
    written: list[dict[str, Any]] = field(default_factory=list)  # in the books, in order
    status: str | None = None
    counts: tuple[int, int, int] = (0, 0, 0)

    def record(self, kind: str, now_us: int) -> dict[str, Any]:
        return {
            **{"kind": kind, "id": self.id, "request_id": f"req_{self.id}", "account": self.caller.account.id},
            **{"token_id": self.caller.token.id, "model": "small", "served_model": "small"},
            **{"input_nanos": 3, "cached_input_nanos": 1, "output_nanos": 10, "opened_us": self.opened_us},
            **{"journal": "j", "is_reserved": self.reservation is not None, "lease_us": now_us + LEASE},
            "held_nanos": None if self.reservation is None else self.reservation.nanos,
            **{"prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens},
            **{"completion_tokens": self.completion_tokens, "outcome": "ok", "settled_us": now_us},
        }

    def expect(self, record: dict[str, Any]) -> None:
        """What must be in the books after this record."""
        kind, counts = record["kind"], tuple(record[name] for name in COUNTS)
        if self.status is None:
            self.status = "open"
        if kind == "checkpoint" and self.status == "open":
            self.counts = counts  # type: ignore[assignment]
        if kind == "settlement" and self.status in ("open", "interrupted"):
            self.status, self.counts = "settled", counts  # type: ignore[assignment]
