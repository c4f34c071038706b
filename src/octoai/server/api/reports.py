"""What a report of usage is asked for: query parameters decoded, every one of them decided or refused by its name.

Lists may be sent as `name=a&name=b`, as `name[]=a&name[]=b` (what OpenAI's clients do) or as `name=a,b`. Knows nothing
of who asks, and of the database only which filters it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from starlette.datastructures import QueryParams

from octoai.server.errors import BadRequest
from octoai.server.store.usage import MAX_VALUES, Filters
from octoai.server.times import DAY, HOUR, MAX_TIME, MINUTE

WIDTHS = {"1m": MINUTE, "1h": HOUR, "1d": DAY}
TIMES = ("start_time", "end_time", "bucket_width", "limit", "page")
_CURSOR = re.compile(r"page_([0-9a-f]{1,10})_([0-9a-f]{1,10})")


@dataclass(frozen=True, slots=True)
class Report:
    """What may be asked for. `pages`: the default and the greatest number of buckets, by the name of their width;
    `unit`: seconds to whose multiples a range is widened."""

    pages: Mapping[str, tuple[int, int]]
    unit: int
    groups: tuple[str, ...]
    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Buckets of `width` seconds, cut to [start_at, end_at); the page begins at `first_at`. Unix seconds."""

    start_at: int
    end_at: int
    width: int
    limit: int
    first_at: int

    def buckets(self) -> list[tuple[int, int]]:
        """The page's, each from when to when."""
        bounds: list[tuple[int, int]] = []
        at = self.first_at
        while at < self.end_at and len(bounds) < self.limit:
            after = min((at // self.width + 1) * self.width, self.end_at)
            bounds.append((at, after))
            at = after
        return bounds

    def next_page(self) -> str | None:
        """The cursor of the page after this one. It holds the end of the range as well: where none was given that is
        the present, and must not move between two pages."""
        buckets = self.buckets()
        if not buckets or buckets[-1][1] >= self.end_at:
            return None
        return f"page_{buckets[-1][1]:x}_{self.end_at:x}"


def time_range(params: QueryParams, report: Report, now: int) -> Range:
    """Which buckets are asked for; until `now` (Unix seconds), which is included, where nothing else is said."""
    name = params.get("bucket_width", "1d")
    if name not in report.pages:
        raise BadRequest(f"bucket_width: {' or '.join(report.pages)}, not {name[:40]!r}", param="bucket_width")
    default, most = report.pages[name]
    limit = _number(params, "limit", 1, most)
    start, end = _number(params, "start_time", 0, MAX_TIME), _number(params, "end_time", 0, MAX_TIME)
    if start is None:
        raise BadRequest("start_time is missing: the beginning of the range, in Unix seconds", param="start_time")
    if end is not None and end <= start:
        raise BadRequest("end_time must be later than start_time", param="end_time")
    start_at = start // report.unit * report.unit
    until = now + 1 if end is None else end
    end_at = -(-until // report.unit) * report.unit
    asked = Range(start_at, end_at, WIDTHS[name], limit or default, start_at)
    return asked if "page" not in params else _turned(asked, params["page"], is_end_given=end is not None)


def groups(params: QueryParams, report: Report) -> frozenset[str]:
    chosen = _values(params, "group_by") or []
    for group in chosen:
        if group not in report.groups:
            raise BadRequest(f"group_by: any of {', '.join(report.groups)}, not {group[:80]!r}", param="group_by")
    return frozenset(chosen)


def filters(params: QueryParams, report: Report) -> Filters:
    """Raises BadRequest for every parameter that there is not: a misspelt filter must not show everything."""
    names = (*TIMES, "group_by", *report.filters)
    for name in params:
        if name.removesuffix("[]") not in names:
            raise BadRequest(
                f"There is no parameter {name[:80]!r} here; there are {', '.join(names)}.", param=name[:80]
            )
    sent = {name: _values(params, name) for name in report.filters}
    accounts = sent.get("project_ids")
    if sent.get("batch") not in (None, ["true"], ["false"]):
        raise BadRequest("batch: true or false", param="batch")
    if sent.get("user_ids") is not None or sent.get("batch") == ["true"]:
        accounts = []  # nothing here is of a user, or of a batch
    return Filters(accounts, sent.get("api_key_ids"), sent.get("line_items" if "line_items" in sent else "models"))


def _turned(asked: Range, page: str, *, is_end_given: bool) -> Range:
    """The same range at the page that a cursor is of."""
    match = _CURSOR.fullmatch(page)
    if match is not None:
        first_at, end_at = int(match[1], 16), int(match[2], 16)
        is_of_this = asked.start_at < first_at < end_at <= MAX_TIME + DAY and first_at % asked.width == 0
        if is_of_this and (end_at == asked.end_at or not is_end_given):
            return replace(asked, first_at=first_at, end_at=end_at)
    raise BadRequest("page: not a `next_page` that was given for this range and bucket_width", param="page")


def _number(params: QueryParams, name: str, least: int, most: int) -> int | None:
    text = params.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", text) or not least <= int(text) <= most:
        raise BadRequest(f"{name}: a whole number from {least} to {most}, not {text[:40]!r}", param=name)
    return int(text)


def _values(params: QueryParams, name: str) -> list[str] | None:
    """None where it was not sent."""
    sent = [*params.getlist(name), *params.getlist(f"{name}[]")]
    if not sent:
        return None
    if name != "line_items":  # which OpenAI's documentation shows with a comma inside
        sent = [value for text in sent for value in text.split(",")]
    values = list(dict.fromkeys(value.strip() for value in sent))
    if not all(values) or len(values) > MAX_VALUES or not all(map(str.isprintable, values)):
        raise BadRequest(f"{name}: 1 to {MAX_VALUES} values of printable characters, none of them empty", param=name)
    return values
