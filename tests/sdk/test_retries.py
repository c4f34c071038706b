"""What is sent again and what is not, and when a call ends; for both clients."""

from __future__ import annotations

import json
import re
import time
from email.utils import formatdate
from typing import Any

import pytest

from octoai import (
    ApiConnectionError,
    ApiError,
    ApiTimeoutError,
    BadRequestError,
    RateLimitError,
    ServerError,
    Timeout,
)
from tests.sdk.misbehaving import Exchange, answer, words


def test_a_bad_request_is_not_retried(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(400, {}))
    with pytest.raises(BadRequestError):
        api.chat(api.client(base_url=server.url))
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
@pytest.mark.parametrize("streams", [False, True])
def test_failures_that_may_pass_are_retried(api: Any, serve: Any, status: int, streams: bool) -> None:
    def script(x: Exchange) -> None:
        if x.number < 3:
            x.reply(status, {"message": "later"}, retry_after_ms=10)
        elif streams:
            x.stream(words())
        else:
            x.reply(200, answer())

    server = serve(script)
    client = api.client(base_url=server.url)
    assert len(api.all(api.stream(client))) == 3 if streams else api.chat(client)
    keys = {x.headers["idempotency-key"] for x in server.requests}
    assert len(server.requests) == 3
    assert len(keys) == 1
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", keys.pop())
    assert [x.headers.get("x-octoai-retry-count") for x in server.requests] == [None, "1", "2"]


def test_retries_end(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(503, {}, retry_after_ms=1))
    with pytest.raises(ServerError) as caught:
        api.chat(api.client(base_url=server.url, max_retries=1))
    assert len(server.requests) == caught.value.attempts == 2
    with pytest.raises(ServerError):
        api.chat(api.client(base_url=server.url), request_options={"max_retries": 0})
    assert len(server.requests) == 3


def test_the_time_to_retry_is_honoured(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.reply(429, {}, retry_after="0.5") if x.number == 1 else x.reply(200, answer())

    began = time.monotonic()
    api.chat(api.client(base_url=serve(script).url))
    assert 0.5 <= time.monotonic() - began < 3


@pytest.mark.parametrize("date", [False, True])
def test_a_wait_beyond_the_cap_is_raised_at_once_with_its_value(api: Any, serve: Any, date: bool) -> None:
    value = formatdate(time.time() + 3600, usegmt=True) if date else "3600"
    server = serve(lambda x: x.reply(429, {}, retry_after=value))
    began = time.monotonic()
    with pytest.raises(RateLimitError) as caught:
        api.chat(api.client(base_url=server.url))
    assert time.monotonic() - began < 3
    assert caught.value.retry_after == pytest.approx(3600, abs=5)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "should", "sent"), [(400, "true", 3), (503, "false", 1)])
def test_the_service_may_say_whether_to_retry(api: Any, serve: Any, status: int, should: str, sent: int) -> None:
    server = serve(lambda x: x.reply(status, {}, x_should_retry=should, retry_after_ms=1))
    with pytest.raises(ApiError):
        api.chat(api.client(base_url=server.url))
    assert len(server.requests) == sent


def test_a_connection_closed_before_an_answer_is_retried(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.hang_up() if x.number == 1 else x.reply(200, answer()))
    assert api.chat(api.client(base_url=server.url))
    server = serve(lambda x: x.reset() if x.number == 1 else x.stream(words()))
    assert api.all(api.stream(api.client(base_url=server.url)))


def test_a_kept_connection_that_died_is_replaced_without_a_retry(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        if x.connection == 1 and x.number > 1:
            x.reset()
        else:
            x.reply(200, answer())

    server = serve(script)
    client = api.client(base_url=server.url, max_retries=0)
    api.chat(client)
    api.chat(client)
    assert server.connections == 2


def test_an_idle_connection_closed_by_the_service_is_not_used(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.reply(200, answer())
        if x.number == 1:
            x.hang_up()

    server = serve(script)
    client = api.client(base_url=server.url, max_retries=0)
    api.chat(client)
    time.sleep(0.1)
    api.chat(client)
    assert len(server.requests) == 2


def test_an_answer_cut_off_is_not_asked_for_again(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        x.hang_up()

    server = serve(script)
    with pytest.raises(ApiConnectionError):
        api.chat(api.client(base_url=server.url))
    assert len(server.requests) == 1


def test_a_service_that_never_answers_times_out_once(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.seconds_until_closed())
    began = time.monotonic()
    with pytest.raises(ApiTimeoutError, match="read"):
        api.chat(api.client(base_url=server.url, timeout=0.4))
    assert 0.3 < time.monotonic() - began < 3
    assert len(server.requests) == 1


def test_the_total_includes_retries(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(503, {}, retry_after="2"))
    began = time.monotonic()
    with pytest.raises(ServerError):
        api.chat(api.client(base_url=server.url, timeout=Timeout(total=0.5)))
    assert time.monotonic() - began < 0.5


def test_an_answer_that_drips_ends_at_the_total(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(100):
            x.send(b" ")
            time.sleep(0.05)

    began = time.monotonic()
    with pytest.raises(ApiTimeoutError, match="total"):
        api.chat(api.client(base_url=serve(script).url, timeout=Timeout(total=0.5)))
    assert time.monotonic() - began < 3


def test_a_head_that_drips_is_no_silence(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\nx: ")
        for _ in range(8):
            time.sleep(0.1)
            x.send(b"y")
        data = json.dumps(answer()).encode()
        x.send(b"\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))

    assert api.chat(api.client(base_url=serve(script).url, timeout=0.5))
