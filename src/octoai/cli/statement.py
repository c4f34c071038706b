"""`octoai statement 2026-11`: what accounts had, were given and used in a month."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from octoai.cli import dates
from octoai.cli.columns import Figure, aligned, write_csv
from octoai.cli.database import add_options, with_database
from octoai.cli.messages import fail, output, tell
from octoai.cli.usage import usage_table
from octoai.cli.words import second

if TYPE_CHECKING:
    from octoai.server.billing.statements import Statement
    from octoai.server.store import Connection
    from octoai.server.store.statements import Movement

HEADER = (
    *("account", "month", "item", "date", "model", "token_id", "token_name", "request_id", "note"),
    *("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "amount_usd"),
)


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("statement", help="show the statement of a month, of every account or of one")
    parser.add_argument("month", metavar="MONTH", help="as in 2026-11 (UTC)")
    parser.add_argument("--account", metavar="ID", help="of this account only")
    parser.add_argument("--csv", action="store_true", help="print CSV: the amounts of an account add up to its balance")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from octoai.server.times import now_us

    try:
        month = dates.months(args.month)
        if month[0] > now_us():
            raise ValueError(f"{args.month} has not begun: a statement is of this month, or of one before it")
    except ValueError as error:
        fail(str(error))
        return 2
    return with_database(args, lambda db, _: _show(db, args, month))


def _show(db: Connection, args: argparse.Namespace, month: tuple[int, int]) -> int:
    from octoai.server.billing import statements
    from octoai.server.times import now_us

    now = now_us()
    with db.snapshot():
        if args.account is None:
            found = statements.statements(db, month, now)
        else:
            found = [statements.statement(db, args.account, month, now)]
        names = statements.token_names(db)
    if args.csv:
        write_csv(output(), HEADER, (row for each in found for row in _csv_rows(each, args.month, names)))
        if now < month[1]:
            tell(f"{args.month} is not over; this is as of {second(now)}")
    else:
        print(
            "\n\n\n".join(_text(each, args.month, names) for each in found)
            or f"no account had entries before the end of {args.month}"
        )
    return 0


def _text(of: Statement, month: str, names: Mapping[str, str]) -> str:
    name = f" ({of.name})" if of.name != of.account else ""
    parts = [f"Statement of {of.account}{name} for {month} (UTC)\n"]
    if not of.is_over:
        parts[0] += f"The month is not over: this is as of {second(of.until_us)}.\n"
    parts.append(aligned(("", "USD"), _summary(of)))
    if of.given:
        heads = ("DATE", "ITEM", "NOTE", "USD")
        rows = [(second(each.at_us), each.kind, each.note or "", _usd(each.amount_nanos)) for each in of.given]
        parts.append("Grants and adjustments\n" + aligned(heads, rows, indent=2))
    if of.charged:
        by_model = [(each.key, each) for each in of.by_model]
        by_token = [((*each.key, names.get(each.key[0], "")), each) for each in of.by_token]
        parts.append("Usage by model\n" + usage_table(["model"], by_model, indent=2))
        parts.append("Usage by token\n" + usage_table(["token_id", "token_name"], by_token, indent=2))
    if of.corrected:
        about = ("DATE", "ITEM", "REQUEST", "MODEL", "NOTE", "USD")
        corrected = [(*_about(each), each.note or "", _usd(each.amount_nanos)) for each in of.corrected]
        parts.append("Corrections and refunds\n" + aligned(about, corrected, indent=2))
    return "\n".join(parts).rstrip("\n")


def _summary(of: Statement) -> list[tuple[str, str]]:
    given, corrected = (sum(each.amount_nanos for each in group) for group in (of.given, of.corrected))
    return [
        ("opening balance", _usd(of.opening_nanos)),
        ("grants and adjustments", _usd(given)),
        ("usage", _usd(-of.usage.cost_nanos)),
        ("corrections and refunds", _usd(corrected)),
        ("closing balance" if of.is_over else "balance so far", _usd(of.closing_nanos)),
    ]


def _about(each: Movement) -> tuple[str, str, str, str]:
    return (second(each.at_us), each.kind, each.request_id or "", each.model or "")


def _csv_rows(of: Statement, month: str, names: Mapping[str, str]) -> Iterator[Sequence[str]]:
    """The amounts of all but the last add up to the last."""

    def row(item: str, date: str, about: Sequence[str], counts: Sequence[int | None], nanos: int) -> list[str]:
        numbers = (Figure("" if count is None else count) for count in counts)
        return [of.account, month, item, date, *about, *numbers, _usd(nanos)]

    nothing, uncounted = ("",) * 5, (None,) * 4
    yield row("opening balance", dates.rfc3339(of.start_us), nothing, uncounted, of.opening_nanos)
    for charged in of.charged:
        about = (charged.model, charged.token_id, names.get(charged.token_id, ""), "", "")
        counts = (charged.num_requests, charged.prompt_tokens, charged.cached_tokens, charged.completion_tokens)
        yield row("usage", "", about, counts, charged.amount_nanos)
    for each in of.movements:
        token = each.token_id or ""
        about = (each.model or "", token, names.get(token, ""), each.request_id or "", each.note or "")
        tokens = (None, each.prompt_tokens, each.cached_tokens, each.completion_tokens)
        yield row(each.kind, dates.rfc3339(each.at_us), about, tokens, each.amount_nanos)
    yield row("closing balance", dates.rfc3339(of.until_us), nothing, uncounted, of.closing_nanos)


def _usd(nanos: int) -> Figure:
    from octoai.server.billing.money import usd

    return Figure(usd(nanos))
