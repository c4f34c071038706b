"""Streams that their clients leave, in every way there is: what is billed is what the engine wrote."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest

from octoai.server.store import Place, connect, requests
from octoai.server.store.audit import verify
from octoai.server.store.requests import RequestRow
from tests.asking import CHAT, Client, Raw, is_ready
from tests.load.aborts import differences, left, settled, target_of
from tests.load.clients import Leave, Load, Request
from tests.load.places import serve
from tests.load.upstream import Order, Upstream
from tests.running import Serve
from tests.talking import until


@pytest.fixture
def service(upstream: Upstream, tmp_path: Path) -> Iterator[Serve]:
    running = serve(tmp_path, upstream)
    yield running
    running.stop(signal.SIGKILL)


def all_left(upstream: Upstream, service: Serve, *, over_sockets: int, by_sdks: int) -> None:
    told = left(service, over_sockets=over_sockets, by_sdks=by_sdks)
    books, written = settled(service, upstream)
    assert differences(books, told, written) == []
    assert all(row.status == "settled" and row.cost_nanos == row.worth_nanos for row in books.rows)
    assert sum(each.completion_tokens > 0 for each in written.values()) > len(told) / 2
    assert service.run("ledger", "verify").returncode == 0


def test_what_was_left_is_billed_to_the_token(upstream: Upstream, service: Serve) -> None:
    all_left(upstream, service, over_sockets=160, by_sdks=40)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_that_were_left_are_billed_to_the_token(upstream: Upstream, service: Serve) -> None:
    all_left(upstream, service, over_sockets=800, by_sdks=200)


def test_several_choices_at_once_that_were_left_are_billed_to_the_token(upstream: Upstream, service: Serve) -> None:
    def several(number: int) -> Request:
        return Request(
            Order(number, num_tokens=3000, pace=0.005),
            n=3,
            leave=Leave(tokens=number % 30 + 1),
            headers={"x-request-id": f"left-{number}"},
        )

    told = Load(target_of(service), several, numbers=itertools.count(), total=60).start().join()
    books, written = settled(service, upstream)
    assert differences(books, told, written) == []


def test_of_an_engine_that_breaks_off_no_more_is_billed_than_it_wrote(upstream: Upstream, service: Serve) -> None:
    def breaking(number: int) -> Request:
        order = Order(number, num_tokens=30, pace=0.001, breaks_after=number)
        return Request(order, stream=number % 2 == 0, headers={"x-request-id": f"broken-{number}"})

    told = Load(target_of(service), breaking, numbers=itertools.count(1), total=40).start().join()
    books, written = settled(service, upstream)
    assert {each.status for each in told} == {200, 502}
    for each in told:
        (row,) = books.by_request_id[f"broken-{each.number}"]
        assert each.num_seen <= row.completion_tokens <= written[each.number].completion_tokens
        assert row.outcome == ("failed" if each.number < 30 else row.outcome)


# The real engine

MOST_UNSEEN = 100  # tokens that may be on their way to a client when it goes: about a second of them


def rows_of(service: Serve, ids: Sequence[str]) -> list[RequestRow | None]:
    """Of each the newest row."""
    with closing(connect(Place(service.data_dir))) as db:
        verify(db)
        return [next(reversed(requests.named(db, request_id)), None) for request_id in ids]


def begun(client: Client, chance: random.Random) -> Raw:
    stream = Raw(client, {**CHAT, "max_tokens": 2000, "ignore_eos": True, "stream": True})
    stream.read_until(b'"content":"', 60)
    read_for(stream, chance.uniform(0, 0.4))
    return stream


def read_for(stream: Raw, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        stream.socket.settimeout(left)
        with suppress(TimeoutError):
            stream.received += stream.socket.recv(65536)


def request_id(stream: Raw) -> str:
    (line,) = (line for line in stream.received.split(b"\r\n") if line.startswith(b"x-request-id: "))
    return line.partition(b": ")[2].decode()


def seen(stream: Raw) -> int:
    """Every token that had a text of its own."""
    said = [
        json.loads(line[6:])
        for line in stream.received.split(b"\n")
        if line.startswith(b"data: {") and line[-1:] == b"}"
    ]
    return sum(bool(each["choices"][0]["delta"].get("content")) for each in said if "choices" in each)


def left_of_the_real_engine(served: Serve, rounds: int) -> None:
    client, chance = Client(served), random.Random()
    streams = []
    for _ in range(rounds):
        four = [begun(client, chance) for _ in range(4)]
        for stream in four:
            stream.socket.close()
        streams += four
    ids = [request_id(stream) for stream in streams]
    until(lambda: all(row and row.status == "settled" for row in rows_of(served, ids)), 10)
    for stream, row in zip(streams, rows_of(served, ids), strict=True):
        assert row is not None
        assert row.prompt_tokens > 0
        assert seen(stream) <= row.completion_tokens <= seen(stream) + MOST_UNSEEN


@pytest.mark.slow
@pytest.mark.model
def test_what_was_left_of_the_real_engine_is_what_its_clients_had_and_little_more(served: Serve) -> None:
    left_of_the_real_engine(served, rounds=4)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_that_were_left_of_the_real_engine(served: Serve) -> None:
    left_of_the_real_engine(served, rounds=25)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
def test_requests_whose_engine_was_killed_are_billed_by_what_it_had_generated(
    embedded_model: Path, tmp_path: Path
) -> None:
    service = Serve(tmp_path)
    client, chance = Client(service), random.Random()
    until(lambda: is_ready(client), 30)
    for _ in range(2):
        streams = [begun(client, chance) for _ in range(3)]
        (engine,) = service.children()
        os.kill(engine, signal.SIGKILL)
        answers = [stream.read_to_the_end() for stream in streams]
        assert all(b"engine_failed" in answer for answer in answers)
        ids = [request_id(stream) for stream in streams]
        until(lambda ids=ids: all(row and row.status == "settled" for row in rows_of(service, ids)), 10)
        for stream, row in zip(streams, rows_of(service, ids), strict=True):
            assert row is not None
            assert row.outcome == "failed"
            assert seen(stream) <= row.completion_tokens <= seen(stream) + 5
        until(lambda dead=engine: service.children() not in ([], [dead]) and is_ready(client), 30)
    assert client.chat()["usage"]["completion_tokens"] == 12
    assert service.run("ledger", "verify").returncode == 0
    service.stop(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
def test_a_service_killed_with_the_real_engine_bills_what_its_clients_had(embedded_model: Path, tmp_path: Path) -> None:
    chance = random.Random()
    for _ in range(2):
        service = Serve(tmp_path)
        streams = [begun(Client(service), chance) for _ in range(4)]
        had = [seen(stream) for stream in streams]
        read_for(streams[0], 1.1)
        service.stop(signal.SIGKILL)
        service = Serve(tmp_path)
        for stream, before, row in zip(
            streams, had, rows_of(service, [request_id(each) for each in streams]), strict=True
        ):
            stream.read_to_the_end()
            assert row is not None
            assert row.status == "interrupted"
            assert before <= row.completion_tokens <= seen(stream) + MOST_UNSEEN
        assert service.run("ledger", "verify").returncode == 0
        service.stop(signal.SIGKILL)
