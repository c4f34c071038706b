"""Rows for people, as a table, and for other programs, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from typing import IO

# With these a spreadsheet takes a cell for a formula, and runs it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Figure(str):
    """A number as it is written: to the right in a table, as it is in CSV. Any other text may be somebody's."""

    __slots__ = ()


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, indent: int = 0) -> str:
    """A table whose columns of figures have their points below each other. Every line ends in a newline."""
    body = list(rows)
    columns = [_column(name, [row[at] for row in body]) for at, name in enumerate(header)]
    lines = (" " * indent + "  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
    return "".join(f"{line}\n" for line in lines)


def write_csv(file: IO[str], header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """As RFC 4180 has it, each row as it comes. Text that a spreadsheet would take for a formula has an apostrophe
    before it."""
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows([cell if isinstance(cell, Figure) else guarded(cell) for cell in row] for row in rows)


def guarded(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _column(name: str, cells: Sequence[str]) -> list[str]:
    """Its name and its cells, all as wide as the widest."""
    is_figures = any(isinstance(cell, Figure) for cell in cells)
    shown = [name, *(_pointed(cells) if is_figures else map(_printable, cells))]
    width = max(map(len, shown))
    return [cell.rjust(width) if is_figures else cell.ljust(width) for cell in shown]


def _pointed(cells: Sequence[str]) -> list[str]:
    """Room after each for the decimals that others have more of."""
    lengths = [len(cell) - cell.find(".") if "." in cell else 0 for cell in cells]
    longest = max(lengths, default=0)
    return [cell + " " * (longest - length) for cell, length in zip(cells, lengths, strict=True)]


def _printable(text: str) -> str:
    """Nothing that would move the cursor or break the line."""
    return "".join(each if each.isprintable() else " " for each in text)
