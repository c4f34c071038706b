"""OpenAI's administration API, read with OpenAI's own client: every figure against a sum over the same entries."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from itertools import combinations, pairwise
from typing import Any, TypeVar

import httpx2
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from octoai.server import accounts, tokens
from octoai.server.accounts import Caller
from octoai.server.api import organization
from octoai.server.errors import Forbidden, Refusal, Unauthenticated
from octoai.server.store import Connection, Place, connect
from octoai.server.store.entries import Entry, post
from octoai.server.store.reader import Reader

T = TypeVar("T")
DAY = 86400
BEGIN = int(time.time()) // DAY * DAY - 9 * DAY
MODELS = ("llama-3-8b", "mixtral-8x7b", "tiny, with a comma")
FIELDS = {"project_id": "account", "api_key_id": "token_id", "model": "model"}
COLUMNS = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")
BAD = [
    ("", "start_time"),
    ("start_time=yesterday", "start_time"),
    ("start_time=-5", "start_time"),
    ("start_time=1e9", "start_time"),
    ("start_time=99999999999999", "start_time"),
    ("start_time=1000&end_time=1000", "end_time"),
    ("start_time=1000&end_time=999", "end_time"),
    ("start_time=1000&end_time=", "end_time"),
    ("start_time=1000&bucket_width=5m", "bucket_width"),
    ("start_time=1000&limit=0", "limit"),
    ("start_time=1000&limit=32", "limit"),
    ("start_time=1000&limit=ten", "limit"),
    ("start_time=1000&group_by=colour", "group_by"),
    ("start_time=1000&group_by=line_item", "group_by"),
    ("start_time=1000&group_by[]=", "group_by"),
    ("start_time=1000&models=", "models"),
    ("start_time=1000&batch=perhaps", "batch"),
    ("start_time=1000&model=llama", "model"),
    ("start_time=1000&api_key_ids=" + ",".join(map(str, range(201))), "api_key_ids"),
    ("start_time=1000&page=2", "page"),
    ("start_time=1000&page=page_0_ffffff", "page"),
    ("start_time=0&page=page_15181_ffffff", "page"),
    ("start_time=0&end_time=864000&page=page_15180_ffff00", "page"),
    ("start_time=0&page=page_15180_ffffffffff", "page"),
]


class FakeService:
    """What the handlers use of the service, over a real store."""

    def __init__(self, place: Place, callers: dict[str, Caller]) -> None:
        self.reader = Reader(place)
        self.callers = callers

    async def authenticate(self, authorization: str | None) -> Caller:
        caller = self.callers.get((authorization or "").removeprefix("Bearer "))
        if caller is None:
            raise Unauthenticated("who?")
        return caller

    def require(self, caller: Caller, *scopes: str) -> None:
        if not caller.token.scopes & set(scopes):
            raise Forbidden(f"This API token has none of the scopes {', '.join(scopes)}.")

    async def report(self, _: Caller, action: Callable[[Connection], T]) -> T:
        return await self.reader.run(action)


class World:
    """Accounts, tokens of every scope, entries posted, and the endpoints over them on a socket."""

    def __init__(self, place: Place) -> None:
        self.db = connect(place)
        self.entries: list[Entry] = []
        self.callers: dict[str, Caller] = {}
        self.ids: dict[str, list[str]] = {}
        with self.db.transaction():
            for account in ("acme", "zeta"):
                accounts.create(self.db, account)
                self.ids[account] = [self._mint(account, scope) for scope in ("admin", "usage", "inference")]
        self.service = FakeService(place, self.callers)

    def _mint(self, account: str, scope: str) -> str:
        minted = tokens.mint(self.db, scope, account, scopes=[scope])
        self.callers[minted.text] = Caller(accounts.find(self.db, account), tokens.find(self.db, minted.id))
        return minted.id

    def key(self, account: str, scope: str) -> str:
        return next(
            text for text, each in self.callers.items() if each.account.id == account and scope in each.token.scopes
        )

    def post(self, entries: Iterable[Entry]) -> None:
        with self.db.transaction():
            self.entries += post(self.db, list(entries))

    def random_entries(self, number: int, begin: int, end: int, seed: int) -> None:
        chance = random.Random(seed)
        entries = []
        for at_us in sorted(chance.randrange(begin * 1_000_000, end * 1_000_000) for _ in range(number)):
            account = chance.choice(["acme", "zeta"])
            prompt = chance.randrange(5000)
            kind = chance.choices(["charge", "correction", "refund", "grant"], [20, 1, 1, 1])[0]
            cost = chance.randrange(10 ** chance.randrange(1, 12))
            entries.append(
                Entry(at_us, account, kind, 10**9)
                if kind == "grant"
                else Entry(
                    *(at_us, account, kind, cost if kind == "refund" else -cost),
                    token_id=chance.choice(self.ids[account]),
                    request=f"r{at_us}",
                    model=chance.choice(MODELS),
                    prompt_tokens=prompt if kind == "charge" else 0,
                    cached_tokens=chance.randrange(prompt + 1) if kind == "charge" else 0,
                    completion_tokens=0 if kind == "refund" else chance.randrange(900),
                )
            )
        self.post(entries)

    def sums(
        self, start: int, end: int, width: int, by: tuple[str, ...] = (), wanted: Callable[[Entry], bool] | None = None
    ) -> dict[tuple[Any, ...], tuple[int, ...]]:
        """Counts and nano-dollars by the beginning of a bucket and what is grouped by, straight from the entries."""
        found: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * 5)
        for entry in self.entries:
            at = entry.at_us // 1_000_000
            if entry.kind == "grant" or not start <= at < end or (wanted and not wanted(entry)):
                continue
            key = (max(start, at // width * width), *(getattr(entry, FIELDS[name]) for name in by))
            counts = (entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens, -entry.amount_nanos)
            for place, value in enumerate((int(entry.kind == "charge"), *counts)):
                found[key][place] += value
        return {key: tuple(value) for key, value in found.items()}


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The URL of an application on a socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(10)


def application(service: FakeService) -> ASGIApp:
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        return JSONResponse(error.body(), error.status, error.headers)

    app = Starlette(routes=organization.routes(), exception_handlers={Refusal: refuse})

    async def with_service(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["service"] = service
        await app(scope, receive, send)

    return with_service


@pytest.fixture
def world(place: Place) -> Iterator[World]:
    world = World(place)
    with closing(world.db), closing(world.service.reader):
        yield world


@pytest.fixture
def url(world: World) -> Iterator[str]:
    with served(application(world.service)) as url:
        yield url


@contextmanager
def usage_of(url: str, key: str) -> Iterator[Any]:
    with openai.OpenAI(admin_api_key=key, base_url=url, max_retries=0) as client:
        yield client.admin.organization.usage


@pytest.fixture
def usage(world: World, url: str) -> Iterator[Any]:
    with usage_of(url, world.key("acme", "admin")) as usage:
        yield usage


def told(buckets: Iterable[Any], by: tuple[str, ...] = ()) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """The same as `World.sums`, but without money."""
    found: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for bucket in buckets:
        for result in bucket.results:
            key = (bucket.start_time, *(getattr(result, name) for name in by))
            assert key not in found
            found[key] = tuple(getattr(result, name) for name in COLUMNS)
    return found


def counts(sums: dict[tuple[Any, ...], tuple[int, ...]]) -> dict[tuple[Any, ...], tuple[int, ...]]:
    return {key: value[:4] for key, value in sums.items()}


def pages(call: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    while True:
        answer = call(**arguments)
        yield answer
        assert answer.has_more == (answer.next_page is not None)
        if not answer.has_more:
            return
        arguments["page"] = answer.next_page


@pytest.mark.parametrize(("width", "seconds", "span"), [("1m", 60, 3600), ("1h", 3600, 2 * DAY), ("1d", DAY, 7 * DAY)])
def test_buckets_hold_the_sums_of_their_time(world: World, usage: Any, width: str, seconds: int, span: int) -> None:
    start, end = BEGIN, BEGIN + span
    world.random_entries(300, start - 1000, end + 1000, seed=seconds)
    buckets = [
        bucket
        for page in pages(usage.completions, start_time=start, end_time=end, bucket_width=width)
        for bucket in page.data
    ]
    assert [bucket.start_time for bucket in buckets] == list(range(start, end, seconds))
    assert [bucket.end_time for bucket in buckets] == list(range(start + seconds, end + seconds, seconds))
    assert told(buckets) == counts(world.sums(start, end, seconds)) != {}


def test_any_combination_of_groups_adds_up(world: World, usage: Any) -> None:
    world.random_entries(400, BEGIN, BEGIN + 3 * DAY, seed=1)
    for number in range(len(FIELDS) + 1):
        for by in combinations(FIELDS, number):
            answer = usage.completions(start_time=BEGIN, end_time=BEGIN + 3 * DAY, group_by=list(by))
            assert told(answer.data, by) == counts(world.sums(BEGIN, BEGIN + 3 * DAY, DAY, by))
            others = set(FIELDS) - set(by)
            assert all(getattr(row, name) is None for each in answer.data for row in each.results for name in others)


def test_groups_that_are_the_same_for_every_request_are_told_when_asked_for(world: World, usage: Any) -> None:
    world.random_entries(10, BEGIN, BEGIN + 60, seed=2)
    asked = {"start_time": BEGIN, "end_time": BEGIN + 60}
    (plain,) = usage.completions(**asked).data[0].results
    assert (plain.batch, plain.service_tier, plain.user_id, plain.api_source) == (None,) * 4
    everything = ["project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source"]
    for result in usage.completions(**asked, group_by=everything).data[0].results:
        assert (result.batch, result.service_tier, result.user_id) == (False, "default", None)
        assert result.api_source == "unlabeled"
        assert None not in (result.project_id, result.api_key_id, result.model)
    assert plain.input_uncached_tokens + plain.input_cached_tokens == plain.input_tokens
    assert plain.output_text_tokens == plain.output_tokens


def test_pages_lose_and_repeat_nothing_whatever_their_size(world: World, usage: Any) -> None:
    chance = random.Random(3)
    world.random_entries(300, BEGIN, BEGIN + 3 * DAY, seed=3)
    for _ in range(12):
        start = BEGIN + chance.randrange(DAY) // 60 * 60
        end = start + chance.randrange(60, 2 * DAY) // 60 * 60
        width, seconds = chance.choice([("1h", 3600), ("1d", DAY)])
        asked = {"start_time": start, "end_time": end, "bucket_width": width, "limit": chance.randrange(1, 9)}
        answers = list(pages(usage.completions, **asked, group_by=["model"]))
        assert all(len(answer.data) == asked["limit"] for answer in answers[:-1])
        buckets = [bucket for answer in answers for bucket in answer.data]
        assert (buckets[0].start_time, buckets[-1].end_time) == (start, end)
        assert all(one.end_time == next_.start_time for one, next_ in pairwise(buckets))
        assert told(buckets, ("model",)) == counts(world.sums(start, end, seconds, ("model",)))


def test_a_page_of_many_groups_ends_early_and_the_next_goes_on(
    world: World, usage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand tokens a day for half a year were one answer of a million results."""
    world.random_entries(300, BEGIN, BEGIN + 9 * DAY, seed=10)
    start, end, by = BEGIN + 7 * 3600, BEGIN + 9 * DAY, ("project_id", "model")
    asked = {"start_time": start, "end_time": end, "limit": 9, "group_by": list(by)}
    for most in (6, 7, 13, 30):
        monkeypatch.setattr(organization, "MAX_ROWS", most)
        answers = list(pages(usage.completions, **asked))
        assert all(0 < sum(len(bucket.results) for bucket in answer.data) <= most for answer in answers)
        buckets = [bucket for answer in answers for bucket in answer.data]
        assert len(answers) > 1 and (buckets[0].start_time, buckets[-1].end_time) == (start, end)
        assert all(one.end_time == next_.start_time for one, next_ in pairwise(buckets))
        assert told(buckets, by) == counts(world.sums(start, end, DAY, by))


def test_more_groups_than_a_page_may_have_are_refused(
    world: World, usage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.random_entries(100, BEGIN, BEGIN + DAY, seed=11)
    monkeypatch.setattr(organization, "MAX_ROWS", 5)
    for start in (BEGIN - DAY, BEGIN + 3600):  # on a later page, and in a bucket that is cut
        with pytest.raises(openai.BadRequestError, match="more than 5 results") as caught:
            list(pages(usage.completions, start_time=start, group_by=["project_id", "model"]))
        assert caught.value.param == "group_by"
    assert usage.completions(start_time=BEGIN, group_by=["project_id"]).data[0].results != []


def test_answers_are_written_beside_the_event_loop(world: World, usage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 27 MB held up everybody else's requests for most of a second."""
    world.random_entries(20, BEGIN, BEGIN + DAY, seed=12)
    result, threads = organization._result, set[str]()

    def watched(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return result(*arguments)

    monkeypatch.setattr(organization, "_result", watched)
    assert usage.completions(start_time=BEGIN, end_time=BEGIN + DAY).data[0].results != []
    assert threads != set() and all(name.startswith("octoai-reader") for name in threads)


def test_pages_without_an_end_keep_the_end_of_the_first(
    world: World, usage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time())
    world.post([Entry(now * 1_000_000, "acme", "charge", -5, token_id=world.ids["acme"][0], model="m")])
    first = usage.completions(start_time=now - DAY, bucket_width="1h", limit=1)
    monkeypatch.setattr(organization.time, "time", lambda: now + 7200.0)
    rest = list(pages(usage.completions, start_time=now - DAY, bucket_width="1h", page=first.next_page))
    end = rest[-1].data[-1].end_time
    assert now < end <= now + 120
    assert sum(row.num_model_requests for each in rest for bucket in each.data for row in bucket.results) == 1


def test_what_is_in_the_minute_that_runs_is_seen_at_once(world: World, usage: Any) -> None:
    now_us = time.time_ns() // 1000
    world.post([Entry(now_us, "acme", "charge", -5, token_id=world.ids["acme"][0], model="m")])
    start = now_us // 1_000_000 - 30
    for end in ({}, {"end_time": int(time.time()) + 1}):
        answer = usage.completions(start_time=start, **end)
        assert sum(row.num_model_requests for bucket in answer.data for row in bucket.results) == 1
        assert answer.data[0].start_time == start // 60 * 60  # widened, and said so


def test_defaults_and_greatest_numbers_of_buckets_are_as_documented(world: World, usage: Any) -> None:
    for width, default, most in (("1d", 7, 31), ("1h", 24, 168), ("1m", 60, 1440)):
        asked = {"start_time": 0, "bucket_width": width}
        answer = usage.completions(**asked)
        assert (len(answer.data), answer.has_more) == (default, True)
        assert all(bucket.results == [] for bucket in answer.data)
        assert len(usage.completions(**asked, limit=most).data) == most
        with pytest.raises(openai.BadRequestError) as caught:
            usage.completions(**asked, limit=most + 1)
        assert caught.value.param == "limit"
    assert len(usage.costs(start_time=0).data) == 7
    assert len(usage.costs(start_time=0, limit=180).data) == 180


def test_filters_leave_what_they_name(world: World, usage: Any) -> None:
    world.random_entries(300, BEGIN, BEGIN + DAY, seed=4)
    some = [world.ids["acme"][0], world.ids["zeta"][1]]

    def check(wanted: Callable[[Entry], bool], **filters: Any) -> None:
        answer = usage.completions(start_time=BEGIN, end_time=BEGIN + DAY, **filters)
        assert told(answer.data) == counts(world.sums(BEGIN, BEGIN + DAY, DAY, wanted=wanted))

    check(lambda entry: entry.account == "zeta", project_ids=["zeta"])
    check(lambda entry: entry.token_id in some, api_key_ids=some)
    check(lambda entry: entry.model in MODELS[:2], models=list(MODELS[:2]))
    check(lambda entry: entry.token_id == some[0] and entry.model == MODELS[0], api_key_ids=some[:1], models=MODELS[:1])
    check(lambda _: True, batch=False)
    for nothing in ({"batch": True}, {"user_ids": ["user_1"]}, {"models": ["unknown"]}, {"project_ids": ["nobody"]}):
        check(lambda _: False, **nothing)


@pytest.mark.parametrize(("path", "name"), [("usage/completions", "project_ids"), ("costs", "line_items")])
def test_a_filter_with_a_character_that_no_database_takes_is_refused(
    world: World, url: str, path: str, name: str
) -> None:
    query = {"start_time": BEGIN, name: "a\0"}
    headers = {"authorization": f"Bearer {world.key('acme', 'admin')}"}
    answer = httpx2.get(f"{url}/organization/{path}", params=query, headers=headers)
    assert (answer.status_code, answer.json()["param"]) == (400, name)


def test_lists_may_be_spelled_in_three_ways(world: World, url: str) -> None:
    world.random_entries(60, BEGIN, BEGIN + DAY, seed=5)
    query = f"start_time={BEGIN}&end_time={BEGIN + DAY}"
    headers = {"authorization": f"Bearer {world.key('acme', 'admin')}"}

    def read(spelled: str) -> Any:
        return httpx2.get(f"{url}/organization/usage/completions?{query}&{spelled}", headers=headers).json()

    groups = [
        read(spelled)
        for spelled in (
            "group_by=model&group_by=project_id",
            "group_by[]=model&group_by[]=project_id",
            "group_by%5B%5D=model&group_by%5B%5D=project_id",
            "group_by=model,project_id",
        )
    ]
    assert len(groups[0]["data"][0]["results"]) > 2
    assert all(each == groups[0] for each in groups)
    models = [
        read(f"group_by=model&{spelled}")
        for spelled in (
            "models=llama-3-8b&models=mixtral-8x7b",
            "models[]=llama-3-8b&models[]=mixtral-8x7b",
            "models=llama-3-8b,mixtral-8x7b",
        )
    ]
    assert [row["model"] for row in models[0]["data"][0]["results"]] == ["llama-3-8b", "mixtral-8x7b"]
    assert all(each == models[0] for each in models)


def test_costs_add_up_to_the_nano_dollar(world: World, usage: Any, url: str) -> None:
    world.random_entries(300, BEGIN, BEGIN + 3 * DAY, seed=6)
    expected = world.sums(BEGIN, BEGIN + 3 * DAY, DAY, ("project_id",))
    headers = {"authorization": f"Bearer {world.key('acme', 'admin')}"}
    query = f"start_time={BEGIN + 5}&end_time={BEGIN + 2 * DAY + 7}&group_by=project_id"
    answer = httpx2.get(f"{url}/organization/costs?{query}", headers=headers)
    exact = json.loads(answer.text, parse_float=Decimal)
    found = {
        (bucket["start_time"], row["project_id"]): int(row["amount"]["value"] * 10**9)
        for bucket in exact["data"]
        for row in bucket["results"]
    }
    assert found == {key: value[4] for key, value in expected.items()}  # whole days, though asked in the middle of them

    by = ("project_id", "api_key_id", "line_item")
    result = usage.costs(start_time=BEGIN, end_time=BEGIN + 3 * DAY, group_by=list(by))
    sums = world.sums(BEGIN, BEGIN + 3 * DAY, DAY, ("project_id", "api_key_id", "model"))
    for bucket in result.data:
        for row in bucket.results:
            _, prompt, _, completion, nanos = sums.pop(
                (bucket.start_time, row.project_id, row.api_key_id, row.line_item)
            )
            assert (row.amount.value, row.amount.currency) == (nanos / 10**9, "usd")
            assert (row.quantity, row.quantity_unit) == (prompt + completion, "tokens")
    assert sums == {}


def test_costs_are_filtered_by_whole_line_items(world: World, usage: Any) -> None:
    world.random_entries(200, BEGIN, BEGIN + DAY, seed=7)
    for chosen in ([MODELS[2]], list(MODELS[:2])):
        answer = usage.costs(
            start_time=BEGIN, end_time=BEGIN + DAY, line_items=chosen, group_by=["line_item"], project_ids=["acme"]
        )
        assert sorted(row.line_item for row in answer.data[0].results) == sorted(chosen)
    plain = usage.costs(start_time=BEGIN, end_time=BEGIN + DAY).data[0].results[0]
    assert (plain.line_item, plain.project_id, plain.api_key_id, plain.quantity) == (None,) * 4


def test_a_token_for_usage_sees_its_own_account_only(world: World, url: str) -> None:
    world.random_entries(200, BEGIN, BEGIN + DAY, seed=8)
    asked = {"start_time": BEGIN, "end_time": BEGIN + DAY}
    own = counts(world.sums(BEGIN, BEGIN + DAY, DAY, wanted=lambda entry: entry.account == "zeta"))
    with usage_of(url, world.key("zeta", "usage")) as usage:
        assert told(usage.completions(**asked).data) == own != {}
        assert told(usage.completions(**asked, project_ids=["zeta", "acme"]).data) == own
        for of_others in ({"project_ids": ["acme"]}, {"api_key_ids": world.ids["acme"]}, {"project_ids": ["nobody"]}):
            assert told(usage.completions(**asked, **of_others).data) == {}
        rows = usage.costs(**asked, group_by=["project_id"]).data[0].results
        assert [row.project_id for row in rows] == ["zeta"]


def test_other_tokens_are_refused(world: World, url: str) -> None:
    with usage_of(url, world.key("acme", "inference")) as usage:
        for call in (usage.completions, usage.costs, usage.embeddings):
            with pytest.raises(openai.PermissionDeniedError):
                call(start_time=BEGIN)
    with usage_of(url, "unknown") as usage, pytest.raises(openai.AuthenticationError):
        usage.completions(start_time=BEGIN)


def test_a_bad_parameter_is_named(world: World, url: str) -> None:
    headers = {"authorization": f"Bearer {world.key('acme', 'admin')}"}
    for query, param in BAD:
        answer = httpx2.get(f"{url}/organization/usage/completions?{query}", headers=headers)
        assert answer.status_code == 400, (query, answer.text)
        assert answer.json()["error"]["param"] == answer.json()["param"] == param, query
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_costs_come_by_the_day_only(usage: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        usage.costs(start_time=0, extra_query={"bucket_width": "1h"})
    assert caught.value.param == "bucket_width"
    with pytest.raises(openai.BadRequestError) as caught:
        usage.costs(start_time=0, limit=181)
    assert caught.value.param == "limit"


def test_a_range_that_has_not_begun_has_no_buckets(usage: Any) -> None:
    answer = usage.completions(start_time=int(time.time()) + 7200)
    assert (answer.data, answer.has_more, answer.next_page) == ([], False, None)


def test_other_kinds_of_usage_are_none(world: World, url: str) -> None:
    world.random_entries(20, BEGIN, BEGIN + DAY, seed=9)
    asyncio.run(_other_kinds(url, world.key("acme", "admin")))


async def _other_kinds(url: str, key: str) -> None:
    async with openai.AsyncOpenAI(admin_api_key=key, base_url=url, max_retries=0) as client:
        usage: Any = client.admin.organization.usage
        calls = (usage.embeddings, usage.images, usage.moderations, usage.audio_speeches, usage.audio_transcriptions)
        for call in (*calls, usage.vector_stores, usage.code_interpreter_sessions, usage.web_search_calls):
            answer = await call(start_time=BEGIN, end_time=BEGIN + 2 * DAY, group_by=["project_id"])
            assert [bucket.results for bucket in answer.data] == [[], []]
        answer = await usage.completions(start_time=BEGIN, end_time=BEGIN + DAY)
        assert answer.data[0].results != []
        with pytest.raises(openai.BadRequestError):
            await usage.embeddings(start_time=BEGIN, bucket_width="1w")


def test_the_description_lists_every_route_and_parameter() -> None:
    described = organization.paths()
    assert set(described) == {getattr(route, "path", None) for route in organization.routes()}
    operation = described["/v1/organization/costs"]["get"]
    names = {each["name"] for each in operation["parameters"]}
    assert names == {
        *("start_time", "end_time", "bucket_width", "limit", "page", "group_by"),
        *("project_ids", "user_ids", "api_key_ids", "line_items"),
    }
    assert [each["name"] for each in operation["parameters"] if each["required"]] == ["start_time"]
