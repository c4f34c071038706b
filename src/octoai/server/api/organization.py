"""OpenAI's administration API of usage and costs, same paths and shapes: who used how much, in buckets of time.

A project there is an account here, an API key a token; there are no users. A token with the scope `admin` sees every
account. One with `usage` sees its own only: of others it is told nothing, not even whether they exist, and filters on
them leave nothing.

Usage is kept by the minute. A range is widened to whole minutes, as the bounds of its buckets say; its first and last
bucket are cut to it, as OpenAI's are. Costs are of whole days (UTC). A page of many groups ends early, between two
buckets; the next one goes on from there.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from octoai.server.accounts import Caller
from octoai.server.api.reports import TIMES, Range, Report, filters, groups, time_range
from octoai.server.billing.money import usd
from octoai.server.errors import BadRequest
from octoai.server.service import Service
from octoai.server.store.database import Connection
from octoai.server.store.usage import Filters, UsageSum, sums
from octoai.server.times import DAY, MINUTE

_USAGE = Report(
    pages={"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)},
    unit=MINUTE,
    groups=("project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source"),
    filters=("project_ids", "user_ids", "api_key_ids", "models", "batch"),
)
_COSTS = Report(
    pages={"1d": (7, 180)},
    unit=DAY,
    groups=("project_id", "user_id", "line_item", "api_key_id", "api_source"),
    filters=("project_ids", "user_ids", "api_key_ids", "line_items"),
)
# What a group is in our books; everything else that may be grouped by is the same for every request.
_DIMENSIONS = {"project_id": "account", "api_key_id": "token_id", "model": "model", "line_item": "model"}
_CONSTANTS = {"user_id": None, "batch": False, "service_tier": "default", "api_source": "unlabeled"}
MAX_ROWS = 10_000  # of a page; OpenAI's has no end
# Other usage that OpenAI reports and that cannot be here.
_ABSENT = (
    *("audio_speeches", "audio_transcriptions", "code_interpreter_sessions", "decisions", "embeddings"),
    *("file_search_calls", "images", "moderations", "vector_stores", "web_search_calls"),
)


def routes() -> list[BaseRoute]:
    return [
        Route("/v1/organization/usage/completions", usage_completions, methods=["GET"]),
        Route("/v1/organization/costs", costs, methods=["GET"]),
        *(Route(f"/v1/organization/usage/{kind}", usage_absent, methods=["GET"]) for kind in _ABSENT),
    ]


async def usage_completions(request: Request) -> Response:
    """Requests and tokens."""
    return await _answer(request, _USAGE)


async def costs(request: Request) -> Response:
    """What was charged, corrections and refunds on the day when they were made. A line item is a model."""
    return await _answer(request, _COSTS)


async def usage_absent(request: Request) -> Response:
    """Usage of what is not offered: none, whatever it is filtered and grouped by."""
    await _authorized(request)
    asked = time_range(request.query_params, _USAGE, int(time.time()))
    return _json(_page(asked, {}))


async def _answer(request: Request, report: Report) -> Response:
    service: Service = request.state.service
    caller = await _authorized(request)
    params = request.query_params
    seen = _seen_by(caller, filters(params, report))
    chosen = groups(params, report)
    asked = time_range(params, report, int(time.time()))

    def read(db: Connection) -> bytes:  # as it is sent: to write it takes as long as to read it
        shown, sums = _sums(db, asked, chosen, seen)
        results: dict[int, list[dict[str, Any]]] = {}
        for each in sums:
            results.setdefault(each.start_at, []).append(_result(each, report, chosen))
        return _page(shown, results)

    return _json(await service.report(caller, read))


def _sums(db: Connection, asked: Range, chosen: frozenset[str], seen: Filters) -> tuple[Range, list[UsageSum]]:
    """As many of the buckets asked for as have MAX_ROWS rows together, and these; of what comes after them little is
    read. Raises BadRequest where one bucket has more."""
    by = sorted({_DIMENSIONS[group] for group in chosen if group in _DIMENSIONS})
    buckets, found, done = asked.buckets(), list[UsageSum](), 0
    while done < len(buckets):
        portion = buckets[done : 2 * done + 1] if by else buckets
        start_at, end_at, most = portion[0][0], portion[-1][1], MAX_ROWS - len(found) + 1
        found += sums(db, start_at, end_at, width=asked.width, by=by, filters=seen, limit=most)
        if len(found) > MAX_ROWS:
            return _whole(asked, found)
        done += len(portion)
    return asked, found


def _whole(asked: Range, found: list[UsageSum]) -> tuple[Range, list[UsageSum]]:
    """Without the last bucket that was found, which may have more."""
    cut_at = found[-1].start_at
    whole = [start_at for start_at, _ in asked.buckets() if start_at < cut_at]
    if not whole:
        raise BadRequest(
            f"group_by: a bucket has more than {MAX_ROWS} results; group by less, filter, or ask for narrower buckets",
            param="group_by",
        )
    return replace(asked, limit=len(whole)), [each for each in found if each.start_at < cut_at]


async def _authorized(request: Request) -> Caller:
    service: Service = request.state.service
    caller = await service.authenticate(request.headers.get("authorization"))
    service.require(caller, "usage", "admin")
    return caller


def _seen_by(caller: Caller, asked: Filters) -> Filters:
    if "admin" in caller.token.scopes:
        return asked
    own = caller.account.id
    return replace(asked, accounts=[own] if asked.accounts is None or own in asked.accounts else [])


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _page(asked: Range, results: dict[int, list[dict[str, Any]]]) -> bytes:
    """`results` by the beginnings of whole buckets. Those without any are there as well."""
    buckets = [
        {
            "object": "bucket",
            "start_time": start_at,
            "end_time": end_at,
            "results": results.get(start_at // asked.width * asked.width, []),
        }
        for start_at, end_at in asked.buckets()
    ]
    next_page = asked.next_page()
    return orjson.dumps({"object": "page", "data": buckets, "has_more": next_page is not None, "next_page": next_page})


def _result(of: UsageSum, report: Report, chosen: frozenset[str]) -> dict[str, Any]:
    """What may be grouped by is null where it was not."""
    known = {**_CONSTANTS, **{group: getattr(of, name) or None for group, name in _DIMENSIONS.items()}}
    grouped = {group: known[group] if group in chosen else None for group in report.groups}
    figures = _cost(of, is_itemized="line_item" in chosen) if report is _COSTS else _tokens(of)
    return {**figures, **grouped}


def _tokens(of: UsageSum) -> dict[str, Any]:
    """All of it is text."""
    uncached = of.prompt_tokens - of.cached_tokens
    return {
        "object": "organization.usage.completions.result",
        "num_model_requests": of.num_requests,
        "input_tokens": of.prompt_tokens,
        "input_cached_tokens": of.cached_tokens,
        "input_uncached_tokens": uncached,
        "input_text_tokens": uncached,
        "input_cached_text_tokens": of.cached_tokens,
        "input_audio_tokens": 0,
        "output_tokens": of.completion_tokens,
        "output_text_tokens": of.completion_tokens,
        "output_audio_tokens": 0,
    }


def _cost(of: UsageSum, *, is_itemized: bool) -> dict[str, Any]:
    return {
        "object": "organization.costs.result",
        # Written to the nano-dollar, whatever number the client makes of it.
        "amount": {"value": orjson.Fragment(usd(of.cost_nanos)), "currency": "usd"},
        "quantity": of.prompt_tokens + of.completion_tokens if is_itemized else None,
        "quantity_unit": "tokens" if is_itemized else None,
    }


def paths() -> dict[str, Any]:
    """For `/openapi.json`."""
    usage = "Requests and tokens in buckets of time, as OpenAI's: a project is an account, an API key a token."
    charged = "What was charged in USD, day by day (UTC), as OpenAI's; a line item is a model."
    absent = "Empty buckets: nothing of this kind is offered here."
    return {
        "/v1/organization/usage/completions": {"get": _described(usage, _USAGE, _USAGE.filters)},
        "/v1/organization/costs": {"get": _described(charged, _COSTS, _COSTS.filters)},
        **{f"/v1/organization/usage/{kind}": {"get": _described(absent, _USAGE, ())} for kind in _ABSENT},
    }


def _described(summary: str, report: Report, listed: tuple[str, ...]) -> dict[str, Any]:
    widths = {"type": "string", "enum": list(report.pages), "default": "1d"}
    times = {name: {"type": "integer"} for name in TIMES} | {"bucket_width": widths, "page": {"type": "string"}}
    many = {name: {"type": "array", "items": {"type": "string"}} for name in listed}
    if listed:
        many["group_by"] = {"type": "array", "items": {"type": "string", "enum": list(report.groups)}}
    if "batch" in many:
        many["batch"] = {"type": "boolean"}
    refusals = {"400": "`param` names what is wrong", "403": "The token has neither the scope `usage` nor `admin`"}
    if listed:
        refusals["429"] = "Others of the account's reports take too long: they are read one after the other"
        refusals["503"] = "Reports of other accounts take too long, or the database is away; with `retry-after`"
    return {
        "summary": f"{summary} With the scope `usage` of one's own account, with `admin` of all.",
        "parameters": [
            {"name": name, "in": "query", "required": name == "start_time", "schema": schema}
            for name, schema in {**times, **many}.items()
        ],
        "responses": {
            "200": {"description": f"A page of buckets: at most {_most(report)}, with {MAX_ROWS} results"},
            **{status: {"description": text} for status, text in refusals.items()},
        },
    }


def _most(report: Report) -> str:
    return ", ".join(f"{most} of {name} ({default} unless told)" for name, (default, most) in report.pages.items())
