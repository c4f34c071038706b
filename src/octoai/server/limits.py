"""What an account and a token may still do: budgets, requests and tokens a minute, requests at once.

A request reserves the most it can come to before it runs, in one transaction with the check, so that any number of
them at once come to no more than the limit. Windows slide: what counts is exactly the sixty seconds before now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from octoai.server.accounts import Caller
from octoai.server.billing.money import usd
from octoai.server.errors import OutOfCredit, RateLimited
from octoai.server.store import rates, requests, reservations
from octoai.server.store.accounts import Limits
from octoai.server.store.database import Connection
from octoai.server.store.rates import Past, Payer
from octoai.server.store.reservations import Reservation, Standing
from octoai.server.times import MINUTE_US

# The last minute's requests, oldest first: those that came in one second together, and one by one.
Seconds = Iterable[tuple[Past, Iterable[Past]]]


@dataclass(frozen=True, slots=True)
class Standings:
    """Of the account and of the token, at one moment."""

    account: Standing
    token: Standing
    now_us: int

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*`, each from the tighter of the two, and a warning over a soft budget."""
        headers: dict[str, str] = {}
        tightest: tuple[float, str] | None = None
        for kind in _KINDS:
            found = _rate_headers(kind, (self.account, self.token), self.now_us)
            headers |= {f"x-ratelimit-{name}-{kind.header}": value for name, value in found.items()}
            if found and kind.header != "requests":
                share = int(found["remaining"]) / max(1, int(found["limit"]))
                tightest = min(tightest or (math.inf, ""), (share, kind.header))
        if tightest is not None:  # OpenAI's clients know one kind of tokens: the one that runs out first
            for name in ("limit", "remaining", "reset"):
                headers[f"x-ratelimit-{name}-tokens"] = headers[f"x-ratelimit-{name}-{tightest[1]}"]
        for name, standing in (("account", self.account), ("token", self.token)):
            soft = standing.limits.soft_budget_nanos
            if soft is not None and standing.spent_nanos >= soft:
                headers["x-octoai-budget-warning"] = (
                    f"this month's soft budget of the {name} is {usd(soft)} USD, {usd(standing.spent_nanos)} are spent"
                )
        return headers


class NotCovered(OutOfCredit):
    """By the database, which has these `standings` of the caller, nothing being held for the request; `limited` is what
    else it would be refused for."""

    def __init__(self, message: str, standings: Standings, limited: RateLimited | None) -> None:
        super().__init__(message)
        self.standings, self.limited = standings, limited


def standings(db: Connection, caller: Caller, now_us: int) -> Standings:
    return Standings(*reservations.standings(db, caller.account, caller.token, now_us), now_us)


def reserve(db: Connection, caller: Caller, wanted: Reservation, refunds: str | None = None) -> Standings:
    """Hold what the request may need, and tell how things stand then. What the request that it `refunds` was charged is
    there for it, since that is given back when it runs. Raises NotCovered or RateLimited, with nothing held. One
    transaction."""
    now_us = wanted.at_us
    reservations.lapse(db, caller.account.id, now_us)
    before = standings(db, caller, now_us)
    both: tuple[tuple[str, Payer, str, Standing], ...] = (
        ("account", "account", caller.account.id, before.account),
        ("token", "token_id", caller.token.id, before.token),
    )
    row, uncovered = requests.charged(db, refunds), None
    refusals: list[RateLimited] = []
    for name, column, payer, standing in both:
        returning_nanos = row.cost_nanos if row and getattr(row, column) == payer else 0
        uncovered = uncovered or _uncovered(name, standing, wanted, returning_nanos)
        refusals += _running_refusals(name, standing)
        refusals += _rate_refusals(name, standing, wanted, partial(rates.past, db, column, payer, now_us))
    # The one that takes longest: when that one is over, the request is let through.
    limited = max(refusals, key=_seconds, default=None)
    if uncovered is not None:
        raise NotCovered(uncovered, before, limited)
    if limited is not None:
        raise limited
    reservations.hold(db, wanted)
    return Standings(before.account.with_one_more(wanted), before.token.with_one_more(wanted), now_us)


def _seconds(refusal: RateLimited) -> float:
    return math.inf if refusal.retry_after is None else refusal.retry_after


def _uncovered(name: str, standing: Standing, wanted: Reservation, returning_nanos: int) -> str | None:
    """Why what is left does not pay for it, where it does not."""
    credit = standing.credit_nanos
    after_refund = replace(
        standing,
        spent_nanos=standing.spent_nanos - returning_nanos,
        credit_nanos=None if credit is None else credit + returning_nanos,
    )
    left = after_refund.left_nanos
    # What costs nothing is not refused to who owes something.
    if left is None or wanted.nanos <= max(0, left):
        return None
    need = f"this request may cost up to {usd(wanted.nanos)} USD"
    held = f" ({usd(standing.held_nanos)} USD are held by requests that are running)" if standing.held_nanos else ""
    budget = standing.limits.hard_budget_nanos
    if standing.credit_nanos is not None and (budget is None or standing.credit_nanos <= budget - standing.spent_nanos):
        return (
            f"The account's prepaid credit is {usd(standing.credit_nanos)} USD{held}, and {need}. Add credit, or ask "
            "for fewer max_tokens."
        )
    assert budget is not None
    return (
        f"The monthly budget of this {name} is {usd(budget)} USD, {usd(standing.spent_nanos)} USD of it spent{held}, "
        f"and {need}. Raise the budget, wait for the next month (UTC), or ask for fewer max_tokens."
    )


def _running_refusals(name: str, standing: Standing) -> Iterator[RateLimited]:
    limit = standing.limits.concurrent_requests
    if limit is not None and standing.num_running >= limit:
        said = f"Limit of requests at once of this {name}: {limit}, running {standing.num_running}."
        if limit == 0:
            yield RateLimited(said, kind="requests", retry_after=None)
        else:
            yield RateLimited(f"{said} Try again when one of them has ended.", kind="requests", retry_after=1.0)


@dataclass(frozen=True, slots=True)
class _Kind:
    """One thing that is counted by the minute. `label` is for people, `header` ends the header's name."""

    label: str
    header: str
    limit: Callable[[Limits], int | None]
    used: Callable[[Standing], int]
    counts: Callable[[Past], int]
    wanted: Callable[[Reservation], int]


_KINDS = (
    _Kind(
        "requests",
        "requests",
        lambda limits: limits.requests_per_minute,
        lambda standing: standing.num_requests,
        lambda past: past.num_requests,
        lambda _: 1,
    ),
    _Kind(
        "prompt tokens",
        "tokens-prompt",
        lambda limits: limits.prompt_tokens_per_minute,
        lambda standing: standing.prompt_tokens,
        lambda past: past.prompt_tokens,
        lambda wanted: wanted.prompt_tokens,
    ),
    _Kind(
        "completion tokens",
        "tokens-generated",
        lambda limits: limits.completion_tokens_per_minute,
        lambda standing: standing.completion_tokens,
        lambda past: past.completion_tokens,
        lambda wanted: wanted.completion_tokens,
    ),
)


def _rate_refusals(
    name: str, standing: Standing, wanted: Reservation, past: Callable[[], Seconds]
) -> Iterator[RateLimited]:
    for kind in _KINDS:
        limit, used, more = kind.limit(standing.limits), kind.used(standing), kind.wanted(wanted)
        if limit is None or used + more <= limit:
            continue
        said = f"Limit of {kind.label} a minute of this {name}: {limit}, used {used}, requested {more}."
        of = "requests" if kind.header == "requests" else "tokens"
        if more > limit:
            yield RateLimited(f"{said} One request may not ask for more than the limit.", kind=of, retry_after=None)
            continue
        seconds = _seconds_until(used + more - limit, past(), kind, wanted.at_us)
        yield RateLimited(f"{said} Try again in {seconds:.3f}s.", kind=of, retry_after=seconds)


def _seconds_until(excess: int, past: Seconds, kind: _Kind, now_us: int) -> float:
    """When so much of the last minute has left the window that there is room."""
    for together, singly in past:
        if kind.counts(together) < excess:
            excess -= kind.counts(together)
            continue
        for each in singly:
            excess -= kind.counts(each)
            if excess <= 0:
                return (each.at_us + MINUTE_US - now_us) / 1_000_000
    return MINUTE_US / 1_000_000


def _rate_headers(kind: _Kind, both: Sequence[Standing], now_us: int) -> dict[str, str]:
    limited = [
        (limit - kind.used(standing), limit, standing.newest_us)
        for standing in both
        if (limit := kind.limit(standing.limits)) is not None
    ]
    if not limited:
        return {}
    left, limit, newest_us = min(limited)
    reset = max(0.0, (newest_us + MINUTE_US - now_us) / 1_000_000) if newest_us else 0.0
    return {"limit": str(limit), "remaining": str(max(0, left)), "reset": duration(reset)}


def duration(seconds: float) -> str:
    """As OpenAI writes them: `12ms`, `7.66s`, `2m59.56s`."""
    milliseconds = -(-round(seconds * 1_000_000) // 1000)  # by whole microseconds: 16.1 s are not 16101 ms
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{text}" if minutes else text
