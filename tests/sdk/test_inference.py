"""Any endpoint: inferences, their results later or as a stream, and its health; for both clients."""

from __future__ import annotations

import time
from typing import Any

import pytest

from octoai import (
    ApiError,
    ApiTimeoutError,
    AuthenticationError,
    NotFoundError,
    ResponseError,
    ServerError,
)
from octoai.client import InferenceFuture
from tests.sdk.misbehaving import Exchange, chunk


def test_a_result_may_be_elsewhere_which_gets_no_token(api: Any, serve: Any) -> None:
    store = serve(lambda x: x.reply(200, {"out": 1}))

    def script(x: Exchange) -> None:
        if x.target == "/poll":
            x.reply(200, {"status": "completed", "response_url": f"{server.url}/result"})
        else:
            x.reply(302, {}, location=f"{store.url}/signed?x=1")

    server = serve(script)
    client = api.client(default_headers={"x-secret": "s"})
    future = InferenceFuture(response_id="r", poll_url=f"{server.url}/poll")
    assert api.call(client, "get_future_result", future) == {"out": 1}
    assert server.requests[1].headers["authorization"] == "Bearer test-token"
    (asked,) = store.requests
    assert asked.target == "/signed?x=1"
    assert asked.headers.keys() == {"host", "accept", "accept-encoding", "user-agent"}


def test_a_place_of_results_that_refuses_does_not_want_our_token(api: Any, serve: Any) -> None:
    store = serve(lambda x: x.reply(401, b"<Error>expired</Error>", content_type="application/xml"))

    def script(x: Exchange) -> None:
        if x.target == "/away":
            x.reply(302, {}, location=f"{store.url}/signed")
        elif x.target == "/done":
            x.reply(200, {"status": "completed", "response_url": f"{store.url}/signed"})
        else:
            x.reply(401, {"message": "who are you?"})

    server = serve(script)
    client = api.client(base_url=server.url, api_key=None)
    for target in ("away", "done"):
        with pytest.raises(AuthenticationError) as caught:
            api.call(client, "get_future_result", InferenceFuture(response_id="r", poll_url=f"{server.url}/{target}"))
        assert "No token was sent" not in str(caught.value)
    with pytest.raises(AuthenticationError, match="No token was sent"):
        api.call(client, "get_future_result", InferenceFuture(response_id="r", poll_url=f"{server.url}/here"))


def test_the_health_of_another_service_is_not_asked(api: Any, serve: Any) -> None:
    login = serve(lambda x: x.reply(200, b"<html>Sign in</html>", content_type="text/html"))
    server = serve(lambda x: x.reply(302, {}, location=f"{login.url}/login" if x.target == "/out" else "/out"))
    with pytest.raises(ApiError, match=f"redirects to {login.url}/login, which is not followed"):
        api.call(api.client(), "health_check", f"{server.url}/health")
    assert len(server.requests) == 2
    assert not login.requests


@pytest.mark.parametrize("more", [{}, {"response_url": None}, {"response_url": 3}])
def test_a_result_without_a_place_is_an_api_error(api: Any, serve: Any, more: Any) -> None:
    future = InferenceFuture(
        response_id="r", poll_url=serve(lambda x: x.reply(200, {"status": "completed", **more})).url
    )
    with pytest.raises(ResponseError, match="response_url"):
        api.call(api.client(), "get_future_result", future)


def test_inference_sends_the_token(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        state = {"status": "completed" if x.number > 3 else "running", "response_url": f"{server.url}/result"}
        if x.method == "POST" and "x-octoai-async" in x.headers:
            x.reply(200, {"response_id": "r", "poll_url": f"{server.url}/poll"})
        elif x.method == "POST":
            x.reply(201, x.json)
        else:
            x.reply(200, {"out": 1} if x.target == "/result" else state)

    server = serve(script)
    client = api.client(base_url=server.url)
    assert api.call(client, "infer", f"{server.url}/any", {"a": b"bytes"}) == {"a": "bytes"}
    future = api.call(client, "infer_async", f"{server.url}/any", {})
    assert future.response_id == "r"
    assert api.call(client, "is_future_ready", future) is False
    assert api.call(client, "get_future_result", future) == {"out": 1}
    assert api.call(client, "is_future_ready", future) is True
    assert {x.headers["authorization"] for x in server.requests} == {"Bearer test-token"}


def test_a_failed_inference_raises(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(200, {"status": "failed"}))
    with pytest.raises(ApiError, match="failed"):
        api.call(api.client(), "is_future_ready", InferenceFuture(response_id="r", poll_url=server.url))


def test_an_inference_streams_legal_events(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.part(b': c\n\nevent: e\ndata: true\n\ndata:{"a": 1}\n\n')
        x.end_stream(done=x.json["done"])

    server = serve(script)
    client = api.client()
    for done in (True, False):
        assert api.all(client.infer_stream(server.url, {"done": done})) == [True, {"a": 1}]
    assert api.all(client.infer_stream(server.url, {"done": True}, map_fn=str)) == ["True", "{'a': 1}"]


def test_an_inference_stream_of_chunks_that_is_cut_off_raises(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream([chunk("a")], done=False))
    with pytest.raises(ApiError, match="ended"):
        api.all(api.client().infer_stream(server.url, {"stream": True}))


def test_health_is_asked_until_it_is_good(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(503 if x.number == 1 else 200, {}))
    assert api.call(api.client(), "health_check", server.url) == 200
    server = serve(lambda x: x.reply(404, {}))
    with pytest.raises(NotFoundError):
        api.call(api.client(), "health_check", server.url)
    server = serve(lambda x: x.reply(503, {}))
    with pytest.raises(ServerError):
        api.call(api.client(), "health_check", server.url, timeout=0.5)


def test_health_is_asked_once_where_there_is_no_time_to_ask_again(api: Any, serve: Any) -> None:
    def slow(x: Exchange) -> None:
        time.sleep(0.1)
        x.reply(200, {})

    assert api.call(api.client(), "health_check", serve(slow).url, timeout=0) == 200
    silent = serve(lambda x: x.seconds_until_closed())
    with pytest.raises(ApiTimeoutError):
        api.call(api.client(timeout=0.2), "health_check", silent.url)
