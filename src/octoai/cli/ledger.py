"""`octoai ledger verify|export|refund`: the books, also while the service runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from octoai.cli.database import add_options, with_database
from octoai.cli.dates import moment, rfc3339
from octoai.cli.messages import fail, output

if TYPE_CHECKING:
    from octoai.server.store import Connection
    from octoai.server.store.requests import RequestRow

STATUSES = ("settled", "interrupted", "refunded")


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("ledger", help="check the ledger, export it, refund a request")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    verifying = actions.add_parser("verify", help="prove that the ledger is whole and that everything adds up")
    verifying.set_defaults(run=verify)
    exporting = actions.add_parser("export", help="one line of JSON for each request, oldest first")
    exporting.add_argument("--since", type=_moment, metavar="TIME", help="from a day (UTC) or a time on")
    exporting.add_argument("--until", type=_moment, metavar="TIME", help="up to the beginning of a day, or a time")
    exporting.add_argument("--account", metavar="ID", help="of one account")
    exporting.add_argument("--status", choices=STATUSES, action="append", help="of one status; may be given again")
    exporting.add_argument("--open", action="store_true", help="those that have not ended, too")
    exporting.set_defaults(run=export)
    refunding = actions.add_parser("refund", help="give back what a request was charged")
    refunding.add_argument("request_id", metavar="REQUEST_ID", help="the x-request-id of its answer, or its id")
    refunding.add_argument("--note", required=True, metavar="TEXT", help="why; kept in the ledger")
    refunding.set_defaults(run=refund)
    for action in (verifying, exporting, refunding):
        add_options(action)


def verify(args: argparse.Namespace) -> int:
    return with_database(args, lambda db, _: _verify(db))


def export(args: argparse.Namespace) -> int:
    return with_database(args, lambda db, _: _export(db, args))


def refund(args: argparse.Namespace) -> int:
    note = str(args.note).strip()
    if not note or len(note) > 200 or not note.isprintable():
        return fail("--note: 1 to 200 printable characters")
    return with_database(args, lambda db, _: _refund(db, args.request_id, note))


def _verify(db: Connection) -> int:
    from octoai.server.store import clocks
    from octoai.server.store.audit import BrokenBooks
    from octoai.server.store.audit import verify as verified
    from octoai.server.times import now_us

    try:
        found = verified(db)
    except BrokenBooks as error:
        return fail(str(error))
    opened = f" ({found.num_open} of them open)" if found.num_open else ""
    print(
        f"whole: {found.num_entries} entries, {found.num_requests} requests{opened}; "
        f"balances of {found.num_accounts} accounts, spending and usage add up"
    )
    if line := clocks.ahead(db, now_us()):
        print(line)
    return 0


def _export(db: Connection, args: argparse.Namespace) -> int:
    import orjson

    from octoai.server.store.requests import between

    if args.account is not None and not args.account.isprintable():
        return fail(f"there is no account {args.account!r:.80}")
    statuses = [*(args.status or STATUSES), *(["open"] if args.open else [])]
    exported = output().buffer
    for row in between(db, args.since, args.until, statuses=statuses, account=args.account):
        exported.write(orjson.dumps(_exported(row), option=orjson.OPT_APPEND_NEWLINE))
    exported.flush()
    return 0


def _exported(row: RequestRow) -> dict[str, object]:
    return {
        "request_id": row.request_id,
        "id": row.id,
        "account": row.account,
        "token_id": row.token_id,
        "model": row.model,
        "served_model": row.served_model,
        "status": row.status,
        "outcome": row.outcome,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "cost_nanos": row.cost_nanos,
        "waived_nanos": row.waived_nanos,
        "input_nanos": row.input_nanos,
        "cached_input_nanos": row.cached_input_nanos,
        "output_nanos": row.output_nanos,
        "opened_at": rfc3339(row.opened_us),
        "settled_at": None if row.settled_us is None else rfc3339(row.settled_us),
    }


def _refund(db: Connection, name: str, note: str) -> int:
    from octoai.server.billing.money import usd
    from octoai.server.store import requests
    from octoai.server.times import now_us

    with db.transaction():
        found = requests.named(db, name) if name.isprintable() else []  # no database takes every character
        if not found:
            return fail(f"there is no request {name!r:.200}; `octoai ledger export` shows them")
        if len(found) > 1:
            ids = ", ".join(row.id for row in found)
            return fail(f"{len(found)} requests are called {name!r:.200}; say which, by its id: {ids:.1000}")
        (row,) = found
        try:
            requests.refund(db, row, note, now_us())
        except requests.NotRefundable as error:
            return fail(str(error))
    print(f"refunded {row.request_id}: {usd(row.cost_nanos)} USD to account {row.account}")
    return 0


def _moment(text: str) -> int:
    try:
        return moment(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
