"""How long a stream is waited for; for both clients."""

from __future__ import annotations

import time
from typing import Any

import pytest

from octoai import (
    ApiTimeoutError,
    Timeout,
)
from tests.sdk.misbehaving import Exchange, chunk, words


def test_a_service_that_keeps_the_body_open_after_the_end_delays_nobody(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a", finish="stop"))
        x.event(b"[DONE]")
        x.seconds_until_closed()

    began = time.monotonic()
    assert api.text(api.stream(api.client(base_url=serve(script).url))) == ["a"]
    assert time.monotonic() - began < 3


def _pings(x: Exchange, first: list[Any], seconds: float = 4.0) -> None:
    x.begin_stream()
    for one in first:
        x.event(one)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        x.part(b": keep-alive\n\n")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("timeout", "first", "deadline"),
    [
        (0.4, [], "first_token"),
        (0.4, [chunk("a")], "idle"),
        (Timeout(idle=0.4), [chunk("a")], "idle"),
        (Timeout(idle=0.4), [], "first_token"),
        (Timeout(first_token=0.4), [chunk(delta={"role": "assistant", "content": ""})], "first_token"),
        (Timeout(total=0.4), [chunk("a")], "total"),
    ],
)
def test_keep_alive_bytes_are_not_content(api: Any, serve: Any, timeout: Any, first: Any, deadline: str) -> None:
    server = serve(lambda x: _pings(x, first))
    began = time.monotonic()
    with pytest.raises(ApiTimeoutError, match=deadline) as caught:
        api.all(api.stream(api.client(base_url=server.url, timeout=timeout)))
    assert 0.3 < time.monotonic() - began < 3
    assert caught.value.deadline == deadline
    assert len(server.requests) == 1


@pytest.mark.parametrize("first", [[], [chunk("a")]])
def test_a_silent_stall_ends_in_time(api: Any, serve: Any, first: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        for one in first:
            x.event(one)
        x.seconds_until_closed()

    began = time.monotonic()
    with pytest.raises(ApiTimeoutError) as caught:
        api.all(api.stream(api.client(base_url=serve(script).url, timeout=0.4)))
    assert 0.3 < time.monotonic() - began < 3
    assert caught.value.partial == ("a" if first else "")


def test_a_slow_reader_is_not_an_idle_service(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        time.sleep(0.5)
        x.event(chunk("b", finish="stop"))
        x.end_stream()

    stream = api.stream(api.client(base_url=serve(script).url, timeout=Timeout(idle=0.3)))
    api.next(stream)
    time.sleep(0.45)
    assert api.next(stream).choices[0].delta.content == "b"


def test_a_slow_first_token_is_waited_for_when_only_that_may_be_slow(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        time.sleep(0.5)
        x.event(chunk("a", finish="stop"))
        x.end_stream()

    client = api.client(base_url=serve(script).url, timeout=Timeout(first_token=3, idle=0.2))
    assert api.text(api.stream(client)) == ["a"]


@pytest.mark.parametrize("deadline", ["total", "first_token"])
def test_connecting_and_the_head_have_no_time_of_their_own(api: Any, serve: Any, deadline: str) -> None:
    """The deadline of the whole holds for an answer whose head drips, too: connecting does not add its own."""

    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\n")
        for _ in range(30):
            time.sleep(0.1)
            x.send(b"x: y\r\n")

    api.all(api.stream(api.client(base_url=serve(lambda x: x.stream(words())).url)))  # imports are not timed
    client = api.client(base_url=serve(script).url, timeout=Timeout(**{"connect": 10, deadline: 0.5}))
    began = time.monotonic()
    with pytest.raises(ApiTimeoutError) as caught:
        api.all(api.stream(client))
    assert caught.value.deadline == deadline
    assert time.monotonic() - began < 1.5
