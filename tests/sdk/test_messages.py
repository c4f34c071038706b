"""A request as it leaves: its bytes, where they go, and who sees the token in them."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from octoai import ApiError, ConfigurationError, StreamInterrupted
from octoai._calls import _with_query
from octoai._transport import Request, message_of
from tests.sdk.misbehaving import Exchange, Server, answer


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://bücher.example/x", "xn--bcher-kva.example"),
        ("http://BÜCHER.example:81/x?y", "xn--bcher-kva.example:81"),
        ("http://[::1]:8000/", "[::1]:8000"),
        ("https://Example.com/", "Example.com"),
    ],
)
def test_the_host_is_called_as_the_network_knows_it(url: str, host: str) -> None:
    _, message = message_of(Request("GET", url, {}))
    assert f"\r\nhost: {host}\r\n".encode() in message


def test_a_host_that_the_network_cannot_know_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a valid address"):
        message_of(Request("GET", "http://" + "ü" * 70 + ".example/", {}))


def test_a_query_is_put_before_a_fragment_and_what_is_no_text_is_refused(api: Any, serve: Any) -> None:
    server: Server = serve(lambda x: x.reply(200, answer()))
    client = api.client(base_url=server.url)
    api.call(client, "infer", f"{server.url}/x?a=1#part", {})
    assert server.requests[0].target == "/x?a=1"
    with pytest.raises(ConfigurationError):
        api.call(client, "infer", f"{server.url}/x\udc80", {})
    with pytest.raises(ConfigurationError):
        api.chat(client, request_options={"additional_query_parameters": {"q": "\udc80"}})
    assert len(server.requests) == 1


def test_a_query_beside_a_fragment_is_sent() -> None:
    assert _with_query("http://x/a?b=1#c", {"d": 2}) == "http://x/a?b=1&d=2"
    assert _with_query("http://x/a#c", {"d": 2}) == "http://x/a?d=2"


def test_no_traceback_shows_the_token(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        if x.number == 1:
            x.hang_up()
        elif x.json["stream"]:
            x.begin_stream()
            x.hang_up()
        else:
            x.send(b"SSH-2.0-x\r\n")

    client = api.client(base_url=serve(script).url, max_retries=0, api_key="sesame-of-the-test")
    for fail in (
        lambda: api.chat(client),
        lambda: api.chat(client),
        lambda: api.all(api.stream(client)),
        lambda: api.call(client, "infer", "http://127.0.0.1:9/", {}),
    ):
        with pytest.raises((ApiError, StreamInterrupted)) as caught:
            fail()
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
        assert "message = <a request of" in shown or "request = Request" in shown
        assert "sesame" not in shown
