"""Where a call goes: addresses in every spelling, redirects, hosts that are no more; for both clients."""

from __future__ import annotations

from typing import Any

import pytest

from octoai import (
    ApiError,
    ConfigurationError,
)
from octoai.client import InferenceFuture
from tests.sdk.misbehaving import Exchange, Server, answer


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_every_spelling_of_a_base_url_works(api: Any, echo: Server, suffix: str) -> None:
    api.chat(api.client(base_url=echo.url + suffix))
    assert echo.requests[0].target == "/v1/chat/completions"


def test_redirects_stay_within_the_origin(api: Any, serve: Any) -> None:
    other = serve(lambda x: x.reply(200, answer()))

    def script(x: Exchange) -> None:
        if x.target == "/moved/v1/chat/completions":
            x.reply(307, {}, location="/v1/chat/completions")
        elif x.target == "/away/v1/chat/completions":
            x.reply(307, {}, location=f"{other.url}/v1/chat/completions")
        else:
            x.reply(200, answer())

    server = serve(script)
    assert api.chat(api.client(base_url=f"{server.url}/moved"))
    with pytest.raises(ApiError, match="redirects"):
        api.chat(api.client(base_url=f"{server.url}/away"))
    assert not other.requests


@pytest.mark.parametrize("host", ["text.octoai.run", "OctoAI.cloud.", "api.securelink.octo.ai:443"])
def test_dead_hosts_are_never_contacted(api: Any, host: str) -> None:
    url = f"https://{host}/v1"
    with pytest.raises(ApiError, match="OCTOAI_BASE_URL"):
        api.client(base_url=url)
    client = api.client()
    for method, argument in (("infer", url), ("infer_async", url), ("health_check", url)):
        with pytest.raises(ApiError, match="shut down"):
            api.call(client, method, argument, *([{}] if method != "health_check" else []))
    with pytest.raises(ApiError, match="shut down"):
        api.call(client, "is_future_ready", InferenceFuture(response_id="r", poll_url=url))


def test_a_proxy_is_used_where_the_environment_names_one(api: Any, serve: Any, monkeypatch: Any) -> None:
    proxy = serve(lambda x: x.reply(200, answer()))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    api.chat(api.client(base_url="http://service.invalid"))
    assert proxy.requests[0].target.startswith("http://service.invalid/")
    direct = serve(lambda x: x.reply(200, answer()))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    api.chat(api.client(base_url=direct.url))
    assert len(direct.requests) == 1


@pytest.mark.parametrize("location", ["http://[bad", "/a b", "http://octoai.run/", "http://u:p@127.0.0.1/"])
def test_a_redirect_to_nowhere_is_an_api_error(api: Any, serve: Any, location: str) -> None:
    server = serve(lambda x: x.reply(307, {}, location=location))
    with pytest.raises(ApiError, match="redirects"):
        api.chat(api.client(base_url=server.url))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "host", ["octoai\u3002run", "text\uff0eoctoai\uff0erun", "\uff4fctoai.run", "octo\u00adai.run", "octo.ai\u3002"]
)
def test_dead_hosts_are_known_in_every_spelling(api: Any, host: str) -> None:
    with pytest.raises(ConfigurationError, match="shut down"):
        api.client(base_url=f"http://{host}")
    with pytest.raises(ConfigurationError, match="shut down"):
        api.call(api.client(), "infer", f"http://{host}/x", {})


@pytest.mark.parametrize("host", ["octoai%2erun", "a..\u3002b", "[::ffff:octoai.run]"])
def test_a_host_that_is_none_is_an_api_error(api: Any, host: str) -> None:
    with pytest.raises(ApiError):
        api.call(api.client(max_retries=0), "infer", f"http://{host}/x", {})
