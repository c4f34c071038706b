"""A head that its connection has had before means what it means when it is parsed, however its bytes come."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from octoai.server import ids, tokens
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.http import heads
from octoai.server.http.heads import Head, KnownHead
from octoai.server.http.protocol import protocol_for
from tests.running import InProcess
from tests.server.pipes import PATH, Pipe, Recording, request


async def _sent(blocks: list[bytes], *, knows: bool) -> tuple[list[tuple[dict[bytes, bytes], bytes]], int, bool]:
    edge, pipe = Recording(), Pipe()
    config = uvicorn.Config(lambda *_: None, log_config=None, lifespan="off", ws="none")  # type: ignore[arg-type]
    config.load()
    protocol: Any = protocol_for(edge)(config, ServerState(), {})  # type: ignore[arg-type]
    protocol.connection_made(pipe)
    for block in blocks:
        if not knows:
            protocol._known = None
        if not pipe.is_closed:
            protocol.data_received(block)
        for _ in range(5):
            await asyncio.sleep(0)
    protocol.connection_lost(None)
    return edge.seen, pipe.written.count(b"HTTP/1.1 200 OK"), pipe.is_closed


REQUESTS = st.builds(
    request,
    st.sampled_from(["a", "a", "a", "b"]),
    st.one_of(
        st.binary(max_size=30),
        st.sampled_from(
            [
                b"",
                b"\r\n\r\n",
                b"\r\ncontent-length: 3\r\n\r\n",
                request("a", b"inner", ""),
                b"x" * 300,
                b"\r\n\r\n" * 300,
            ]
        ),
    ),
    st.sampled_from(["", "", "", "", "chunked", "zeros", "last", "blank"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(REQUESTS, max_size=6), st.lists(st.integers(0, 3000), max_size=6), st.booleans())
@example([request("a", b"12", ""), request("a", b"3", "close"), request("a", b"4", "")], [], False)
@example([request("a", b"12", ""), request("a", b"12", "") + request("a", b"345", "") + b"GET"], [120], False)
def test_known_or_parsed_it_is_the_same_request(requests: list[bytes], places: list[int], is_each: bool) -> None:
    data = b"".join(requests)
    blocks = requests
    if not is_each:
        ends = sorted(place % (len(data) + 1) for place in places)
        blocks = [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
    blocks = [block for block in blocks if block]
    assert asyncio.run(_sent(blocks, knows=True)) == asyncio.run(_sent(blocks, knows=False))


def learnt(data: bytes) -> KnownHead | None:
    num_lines = data.partition(b"\r\n\r\n")[0].count(b"\n")
    return heads.known(Head(PATH, {}, keep_alive=True, expects_continue=False), num_lines, data)


def test_a_second_request_is_known_by_its_head() -> None:
    known = learnt(request("a", b"12", ""))
    assert known is not None
    second = request("a", b"3456789012", "")
    assert known.read(second) == (10, len(second) - 10)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        (b"Bearer a", b"Bearer b"),
        (b"content-length: 2", b"content-length: +2"),
        (b"content-length: 2", b"content-length: 2 "),
        (b"content-length: 2", b"content-length: "),
        (b"content-length: 2", b"content-length: 1000000000"),
        (b"content-length: 2", b"content-length: 2\r\ncontent-length: 3"),
        (b"content-length: 2", b"content-length: 2\r\ntransfer-encoding: chunked"),
        (b"content-length: 2", "content-length: ²".encode()),
        (b"POST", b"GET"),
        (b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_a_head_that_differs_in_more_than_its_length_is_not_known(given: bytes, other: bytes) -> None:
    first = request("a", b"12", "")
    known = learnt(first)
    assert known is not None
    assert given in first
    assert known.read(first.replace(given, other)) is None


@pytest.mark.parametrize(
    "data",
    [
        request("a", b"12", "chunked"),
        request("a", b"12", "") + request("a", b"12", ""),  # which one was parsed last?
        request("a", b"12", "")[:40],
        # To some parsers the head has ended before.
        b"POST / HTTP/1.1\nhost: x\ncontent-length: 99\n\n\r\ncontent-length: 3\r\n\r\n",
    ],
)
def test_what_may_mean_something_else_is_not_learnt(data: bytes) -> None:
    assert heads.known(Head(PATH, {}, keep_alive=True, expects_continue=False), 2, data) is None


def test_one_request_is_parsed_as_it_came_and_many_a_few_at_a_time() -> None:
    long = request("a" * 3000, b'{\r\n "a": 1\r\n}', "")
    short = b"GET / HTTP/1.1\r\n\r\n"
    for whole in (long, long[:2000], b"\r\n" + long, short, b"[1,\n2]" * 2000, long + short[:-2]):
        assert heads.few(whole) == whole
    assert heads.few(long * 2) == long.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    for many in (short * 1000, b"12" + short * 1000, b"\r\n\r\n" * 1000):
        assert heads.few(many) == many[:512]


def test_a_token_that_is_revoked_is_refused_on_a_connection_that_has_used_it(in_process: Any) -> None:
    service: InProcess = in_process(ScriptedEngine())
    minted = service.mint("other")
    body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": "hi"}]})
    message = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {minted.text}\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:

        def status() -> bytes:
            connection.sendall(f"{message}\r\n\r\n{body}".encode())
            return connection.recv(65536).split()[1]

        assert [status() for _ in range(3)] == [b"200"] * 3
        service.books(lambda db: tokens.revoke(db, minted.id))
        until = time.monotonic() + 1
        while status() == b"200":
            assert time.monotonic() < until
        assert status() == b"401"


def test_ids_are_random_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make() for make in (ids.new_request_id, ids.new_record_id, ids.new_answer_id) for _ in range(2000)]
    assert len(set(made)) == len(made)
    assert {len(each) for each in made} == {36, 32, 37}
    monkeypatch.setattr(ids, "time", SimpleNamespace(time_ns=iter(range(10**18, 10**19, 10**9)).__next__))
    records = [ids.new_record_id() for _ in range(100)]
    assert records == sorted(records)
