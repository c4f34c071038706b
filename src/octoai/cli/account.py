"""`octoai account …`: who pays, with what credit and limits; also while the service runs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from octoai.cli import limits
from octoai.cli.columns import Figure, aligned
from octoai.cli.database import add_options, with_database
from octoai.cli.words import minute, yes_or_no

if TYPE_CHECKING:
    from octoai.server.store import Connection

PLANS = ("free", "pro", "unlimited")


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("account", help="open, change and credit accounts", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    creating = actions.add_parser("create", help="open an account")
    listing = actions.add_parser("list", help="show every account")
    showing = actions.add_parser("show", help="show one account")
    updating = actions.add_parser("update", help="change what is given, and nothing else")
    closing = actions.add_parser("close", help="refuse its tokens from now on; its entries stay")
    reopening = actions.add_parser("reopen", help="let its tokens in again")
    crediting = actions.add_parser("credit", help="add to its balance")
    adjusting = actions.add_parser("adjust", help="put its balance right, by more or less")
    for action in (creating, showing, updating, closing, reopening, crediting, adjusting):
        action.add_argument("id", metavar="ID", help="the account")
    for action in (creating, updating):
        _add_settings(action)
    for action in (listing, showing):
        action.add_argument("--json", action="store_true", help="for programs")
    for action, example in ((crediting, "25"), (adjusting, "-5.00")):
        action.add_argument("amount", metavar="AMOUNT", help=f"in USD, such as {example}")
    crediting.add_argument("--note", default="", metavar="TEXT", help="what it is for")
    adjusting.add_argument("--note", required=True, metavar="TEXT", help="why")
    runs = {creating: create, listing: list_, showing: show, updating: update}
    runs |= {closing: close, reopening: reopen, crediting: credit, adjusting: adjust}
    for action, run in runs.items():
        action.set_defaults(run=run)
        add_options(action)


def _add_settings(action: argparse.ArgumentParser) -> None:
    action.add_argument("--name", help="for people; the id unless given")
    action.add_argument("--plan", choices=PLANS, help="where its limits a minute come from (default free)")
    paying = action.add_mutually_exclusive_group()
    paying.add_argument(
        "--prepaid", dest="is_prepaid", action="store_true", default=None, help="spend its credit and no more"
    )
    paying.add_argument("--postpaid", dest="is_prepaid", action="store_false", help="pay later (the default)")
    limits.add_options(action)


def create(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        from octoai.server import accounts

        chosen = limits.given(args)
        with db.transaction():
            accounts.create(
                db,
                args.id,
                name=args.name,
                plan=args.plan or "free",
                is_prepaid=bool(args.is_prepaid),
                limits=chosen,
            )
        print(f"created {args.id}; `octoai token create --account {args.id} --name NAME` makes a token for it")
        return 0

    return with_database(args, run, creates=True)


def update(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        from octoai.server import accounts

        chosen = limits.given(args)
        with db.transaction():
            accounts.update(db, args.id, name=args.name, plan=args.plan, is_prepaid=args.is_prepaid, limits=chosen)
        print(f"updated {args.id}")
        return 0

    return with_database(args, run)


def list_(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        found = _described(db)
        if args.json:
            print(json.dumps(found, indent=2))
            return 0
        heads = ("ID", "PLAN", "PREPAID", "BALANCE", "SPENT THIS MONTH", "BUDGET", "TOKENS", "STATE")
        print(aligned(heads, map(_row, found)), end="")
        return 0

    return with_database(args, run)


def show(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        (found,) = _described(db, args.id)
        if args.json:
            print(json.dumps(found, indent=2))
            return 0
        del found["object"]
        for name, value in found.items():
            print(f"{name.replace('_', ' '):30}{_cell(name, value)}")
        return 0

    return with_database(args, run)


def close(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        from octoai.server import accounts

        with db.transaction():
            accounts.close(db, args.id)
        print(f"closed {args.id}")
        return 0

    return with_database(args, run)


def reopen(args: argparse.Namespace) -> int:
    def run(db: Connection, _: object) -> int:
        from octoai.server import accounts

        with db.transaction():
            accounts.reopen(db, args.id)
        print(f"reopened {args.id}")
        return 0

    return with_database(args, run)


def credit(args: argparse.Namespace) -> int:
    return with_database(args, lambda db, _: _post(db, args, "grant"))


def adjust(args: argparse.Namespace) -> int:
    return with_database(args, lambda db, _: _post(db, args, "adjustment"))


def _post(db: Connection, args: argparse.Namespace, kind: str) -> int:
    from octoai.server import accounts
    from octoai.server.billing.money import usd
    from octoai.server.store.entries import balance_nanos

    nanos = limits.amount(args.amount, "AMOUNT")
    with db.transaction():
        entry = accounts.credit(db, args.id, nanos, note=args.note, kind=kind)
        balance = balance_nanos(db, args.id)
    print(f"{args.id}: {kind} of {usd(entry.amount_nanos)} USD, balance {usd(balance)} USD")
    return 0


def _described(db: Connection, account: str | None = None) -> list[dict[str, Any]]:
    """All accounts, or one; as they are at one moment."""
    from octoai.server import accounts
    from octoai.server.api import views
    from octoai.server.store import accounts as table
    from octoai.server.store import tokens
    from octoai.server.times import now_us

    now = now_us()
    with db.snapshot():
        rows = table.all_(db) if account is None else [accounts.find(db, account)]
        num_tokens = tokens.num_active(db, now, account)
        return [views.account(row, views.holdings(db, row.id, num_tokens, now)) for row in rows]


def _row(account: dict[str, Any]) -> tuple[str, ...]:
    hard, soft = account["hard_budget"], account["soft_budget"]
    return (
        account["id"],
        account["plan"],
        yes_or_no(account["prepaid"]),
        Figure(account["balance"]),
        Figure(account["spent_this_month"]),
        hard or (f"soft {soft}" if soft else "-"),
        Figure(account["active_tokens"]),
        "open" if account["closed_at"] is None else "closed",
    )


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-" if name.endswith("_at") else "none"
    if isinstance(value, bool):
        return yes_or_no(value)
    return minute(value) if name.endswith("_at") and isinstance(value, int) else str(value)
