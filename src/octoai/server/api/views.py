"""Accounts, tokens, entries, requests and prices as plain JSON values: one shape for the administration API and for
`octoai … --json`.

Money is a decimal string of USD, times are whole seconds since 1970 (UTC), None is "no limit" or "not so far". Knows
neither HTTP nor where the rows came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from octoai.server.billing.money import usd
from octoai.server.catalogue import Model, price_usd_per_million
from octoai.server.store.accounts import AccountRow, Limits
from octoai.server.store.database import Connection
from octoai.server.store.entries import Entry, balance_nanos, month_of, spent_nanos
from octoai.server.store.prices import PriceRow
from octoai.server.store.requests import RequestRow
from octoai.server.store.tokens import TokenRow

_BUDGETS = {"soft_budget": "soft_budget_nanos", "hard_budget": "hard_budget_nanos"}


@dataclass(frozen=True, slots=True)
class Holdings:
    """What an account has and has spent, in nano-dollars, and how many of its tokens work."""

    balance_nanos: int
    spent_nanos: int
    num_tokens: int


def holdings(db: Connection, account: str, num_tokens: Mapping[str, int], now_us: int) -> Holdings:
    """`num_tokens` of accounts, this one among them where it has any."""
    spent = spent_nanos(db, account, month_of(now_us))
    return Holdings(balance_nanos(db, account), spent, num_tokens.get(account, 0))


def account(row: AccountRow, held: Holdings) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "account",
        "name": row.name,
        "plan": row.plan,
        "prepaid": row.is_prepaid,
        "balance": usd(held.balance_nanos),
        "spent_this_month": usd(held.spent_nanos),
        "active_tokens": held.num_tokens,
        **limits(row.limits),
        "created_at": row.created_at,
        "closed_at": row.closed_at,
    }


def token(row: TokenRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "token",
        "account": row.account,
        "name": row.name,
        "hint": row.hint,
        "scopes": sorted(row.scopes),
        "models": None if row.models is None else list(row.models),
        **limits(row.limits),
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
        "last_used_at": row.last_used_at,
    }


def limits(row: Limits) -> dict[str, str | int | None]:
    """Budgets in USD a calendar month, the rest as numbers."""
    values: dict[str, int | None] = asdict(row)
    budgets = {name: values.pop(column) for name, column in _BUDGETS.items()}
    return {name: None if nanos is None else usd(nanos) for name, nanos in budgets.items()} | values


def entry(row: Entry) -> dict[str, Any]:
    return {
        "id": row.seq,
        "object": "ledger.entry",
        "account": row.account,
        "kind": row.kind,
        "amount": usd(row.amount_nanos),
        "token_id": row.token_id,
        "request": row.request,
        "model": row.model,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "note": row.note,
        "created_at": row.at_us // 1_000_000,
    }


def request(row: RequestRow) -> dict[str, Any]:
    """`status` is open, settled, interrupted or refunded; `cost` what it was charged and not given back."""
    return {
        "id": row.id,
        "object": "ledger.request",
        "request_id": row.request_id,
        "account": row.account,
        "token_id": row.token_id,
        "model": row.model,
        "served_model": row.served_model,
        "status": row.status,
        "outcome": row.outcome,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "cost": usd(row.cost_nanos),
        "waived": usd(row.waived_nanos),
        "created_at": row.opened_us // 1_000_000,
        "settled_at": None if row.settled_us is None else row.settled_us // 1_000_000,
    }


def price(row: PriceRow) -> dict[str, Any]:
    """USD per million tokens, and since when; a price that a model always had says 0."""
    return {
        "input": price_usd_per_million(row.input_nanos),
        "cached_input": price_usd_per_million(row.cached_input_nanos),
        "output": price_usd_per_million(row.output_nanos),
        "valid_from": row.valid_from_us // 1_000_000,
    }


def model_prices(model: Model, current: PriceRow | None, upcoming: Sequence[PriceRow]) -> dict[str, Any]:
    """A model with its price in force, null where it has none yet, and those to come."""
    nothing = dict.fromkeys(("input", "cached_input", "output", "valid_from"))
    return {
        "id": model.id,
        "object": "price",
        "aliases": list(model.aliases),
        **(nothing if current is None else price(current)),
        "upcoming": [price(row) for row in upcoming],
    }


def listed_price(row: PriceRow) -> dict[str, Any]:
    """With what tells it from other rows."""
    return {"object": "price", "model": row.model, **price(row), "origin": row.origin}
