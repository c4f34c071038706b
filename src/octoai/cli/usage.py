"""`octoai usage`: who used how much, and what it cost."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

from octoai.cli import dates
from octoai.cli.columns import Figure, aligned, write_csv
from octoai.cli.database import add_options, with_database
from octoai.cli.messages import fail, output
from octoai.cli.words import second

if TYPE_CHECKING:
    from octoai.server.billing.statements import UsageLine
    from octoai.server.store import Connection

MEMORY_BYTES = 8 * 1024 * 1024  # of CSV: more goes into a temporary file
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "usd")


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("usage", help="show what was used, and what it cost")
    parser.add_argument("--since", metavar="DATE", help="from when on (default: the first of this month, UTC)")
    parser.add_argument("--until", metavar="DATE", help="until when, without it (default: now)")
    parser.add_argument(
        "--by",
        action="append",
        metavar="WHAT",
        help="hour, day or month, and model, token, account: several with commas, or one by one (default: model)",
    )
    parser.add_argument("--account", metavar="ID", help="of this account only")
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--csv", action="store_true", help="print CSV")
    shapes.add_argument("--json", action="store_true", help="print JSON")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        span = _span(args.since, args.until)
    except ValueError as error:
        fail(str(error))
        return 2
    by = list(dict.fromkeys(name.strip() for text in args.by or ["model"] for name in text.split(",")))
    return with_database(args, lambda db, _: _show(db, args, span, by))


def _show(db: Connection, args: argparse.Namespace, span: tuple[int, int], by: Sequence[str]) -> int:
    from octoai.server import accounts
    from octoai.server.billing import statements

    chosen = None if args.account is None else [accounts.find(db, args.account).id]
    csv_output = output() if args.csv else None
    with db.snapshot():
        names = statements.token_names(db) if "token" in by else {}
        try:
            rows = statements.usage_by(db, *span, by, chosen)
        except ValueError as error:
            fail(str(error))
            return 2
        with closing(rows):  # before its connection is, where there is no room
            told = ([*_keys(row, by, names), *figures(row, "")] for row in rows)
            kept = None if csv_output is None else _kept_csv([*_header(by), *COUNTS], told)
            found = list(rows)
    if csv_output is not None and kept is not None:
        with kept:
            csv_output.writelines(kept)
    elif args.json:
        _print_json(found, span, by, names)
    else:
        print(f"Usage from {second(span[0])} to {second(span[1])}")
        print(usage_table(_header(by), [(_keys(row, by, names), row) for row in found]), end="")
    return 0


def _kept_csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> IO[str]:
    """To be printed when the snapshot is over: while a reader takes its time, as a pager does, what others write
    meanwhile must not stay in the log."""
    kept = SpooledTemporaryFile(MEMORY_BYTES, "w+", encoding="utf-8", errors="surrogatepass", newline="")  # noqa: SIM115
    write_csv(kept, header, rows)
    kept.seek(0)
    return kept


def usage_table(header: Sequence[str], rows: Sequence[tuple[Sequence[str], UsageLine]], *, indent: int = 0) -> str:
    """With a line for the total of all."""
    from octoai.server.billing.statements import total

    cells = [[*keys, *figures(row)] for keys, row in rows]
    sums = [*["total", *[""] * len(header)][: len(header)], *figures(total(row for _, row in rows))]
    heads = [name.replace("_", " ").upper() for name in (*header, *COUNTS)]
    return aligned(heads, [*cells, sums], indent=indent)


def figures(row: UsageLine, separator: str = ",") -> list[Figure]:
    """Under COUNTS; thousands with a separator."""
    from octoai.server.billing.money import usd

    counts = (row.num_requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens)
    return [*(Figure(f"{count:,}".replace(",", separator)) for count in counts), Figure(usd(row.cost_nanos))]


def _span(since: str | None, until: str | None) -> tuple[int, int]:
    """In microseconds, widened to the whole minutes that usage is kept by. Raises ValueError."""
    from octoai.server.times import MINUTE_US, now_us

    first = datetime.now(UTC).strftime("%Y-%m-01")
    start_us = dates.moment(since or first) // MINUTE_US * MINUTE_US
    end_us = now_us() if until is None else -(-dates.moment(until) // MINUTE_US) * MINUTE_US
    end_us = min(end_us, dates.LATEST_US)
    if end_us <= start_us:
        raise ValueError(f"there is nothing between {second(start_us)} and {second(end_us)}")
    return start_us, end_us


def _header(by: Sequence[str]) -> list[str]:
    return [name for each in by for name in (("token_id", "token_name") if each == "token" else (each,))]


def _keys(row: UsageLine, by: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """As in the header: a token has its name beside it."""
    return [
        cell
        for name, key in zip(by, row.key, strict=True)
        for cell in ((key, names.get(key, "")) if name == "token" else (key,))
    ]


def _print_json(rows: Sequence[UsageLine], span: tuple[int, int], by: Sequence[str], names: Mapping[str, str]) -> None:
    import json

    from octoai.server.billing.statements import total

    def told(row: UsageLine) -> dict[str, Any]:
        *counts, cost = figures(row, "")
        numbers: dict[str, Any] = dict(zip(COUNTS, map(int, counts), strict=False))
        return {**numbers, "usd": cost, "cost_nanos": row.cost_nanos}

    since, until = map(dates.rfc3339, span)
    listed = [dict(zip(_header(by), _keys(row, by, names), strict=True)) | told(row) for row in rows]
    print(json.dumps({"since": since, "until": until, "rows": listed, "total": told(total(rows))}, indent=2))
