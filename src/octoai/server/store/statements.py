"""What a statement of account is made of, straight from the ledger's entries: sums that it keeps are not looked at."""

from __future__ import annotations

from dataclasses import dataclass

from octoai.server.store.database import Connection


@dataclass(frozen=True, slots=True)
class Movement:
    """An entry that is told by itself: anything but a charge. `request_id` is the `x-request-id` of the answer that a
    correction or a refund is about; `amount_nanos` is what it adds to the balance."""

    at_us: int
    kind: str
    amount_nanos: int
    note: str | None
    model: str | None
    token_id: str | None
    request_id: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Charged:
    """The charges of one token for one model: each is of one request. `amount_nanos` is below zero."""

    model: str
    token_id: str
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    amount_nanos: int


def accounts_with_entries(db: Connection, before_us: int) -> list[str]:
    rows = db.rows("SELECT DISTINCT account FROM entries WHERE at_us < ? ORDER BY account", (before_us,))
    return [str(account) for (account,) in rows]


def balance_nanos(db: Connection, account: str, before_us: int) -> int:
    """The sum of an account's entries before that moment."""
    row = db.row("SELECT SUM(amount_nanos) FROM entries WHERE account = ? AND at_us < ?", (account, before_us))
    return 0 if row is None or row[0] is None else int(row[0])


def movements(db: Connection, account: str, start_us: int, end_us: int) -> list[Movement]:
    """Grants, adjustments, corrections and refunds in [start_us, end_us), as they were posted."""
    query = """
        SELECT e.at_us, e.kind, e.amount_nanos, e.note, e.model, e.token_id, r.request_id,
               e.prompt_tokens, e.cached_tokens, e.completion_tokens
        FROM entries e LEFT JOIN requests r ON r.id = e.request
        WHERE e.account = ? AND e.at_us >= ? AND e.at_us < ? AND e.kind <> 'charge'
        ORDER BY e.seq
    """
    return [Movement(*row) for row in db.rows(query, (account, start_us, end_us))]


def charged(db: Connection, account: str, start_us: int, end_us: int) -> list[Charged]:
    """The charges in [start_us, end_us), by model and token."""
    query = """
        SELECT COALESCE(model, ''), COALESCE(token_id, ''), COUNT(*),
               SUM(prompt_tokens), SUM(cached_tokens), SUM(completion_tokens), SUM(amount_nanos)
        FROM entries
        WHERE account = ? AND at_us >= ? AND at_us < ? AND kind = 'charge'
        GROUP BY 1, 2 ORDER BY 1, 2
    """
    return [Charged(*row) for row in db.rows(query, (account, start_us, end_us))]
