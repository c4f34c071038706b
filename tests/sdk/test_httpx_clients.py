"""Calls by an `httpx` client: one that a user brought, or our own behind a proxy."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from octoai import BadRequestError
from tests.sdk.misbehaving import Exchange, answer, words


def mocked(api: Any, handler: Any, library: str = "httpx2", **options: Any) -> Any:
    """A client over a transport without a network."""
    module = pytest.importorskip(library)
    client = module.Client if api.kind == "sync" else module.AsyncClient
    return api.client(
        httpx_client=client(transport=module.MockTransport(lambda request: handler(module, request)), **options)
    )


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_an_answer_that_was_never_on_a_network_is_read(api: Any, library: str) -> None:
    client = mocked(api, lambda module, _: module.Response(200, json=answer()), library)
    assert api.chat(client).choices[0].message.content == "hello"


def test_a_stream_that_was_never_on_a_network_is_read(api: Any) -> None:
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in words()) + b"data: [DONE]\n\n"
    headers = {"content-type": "text/event-stream"}
    client = mocked(api, lambda module, _: module.Response(200, content=body, headers=headers))
    assert "".join(api.text(api.stream(client))) == "w0 w1 w2 "


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_an_answer_that_a_hook_has_read_is_read_again(api: Any, serve: Any, library: str) -> None:
    def script(x: Exchange) -> None:
        if x.number == 1:
            x.reply(200, gzip.compress(json.dumps(answer()).encode()), content_encoding="gzip")
        else:
            x.reply(400, {"error": {"message": "too hot"}})

    async def read(response: Any) -> None:
        await response.aread()

    module = pytest.importorskip(library)
    hooks = {"response": [(lambda response: response.read()) if api.kind == "sync" else read]}
    made = (module.Client if api.kind == "sync" else module.AsyncClient)(event_hooks=hooks)
    client = api.client(base_url=serve(script).url, httpx_client=made)
    assert api.chat(client).choices[0].message.content == "hello"
    with pytest.raises(BadRequestError, match="too hot"):
        api.chat(client)
    if api.kind == "sync":
        made.close()
    else:
        api.run(made.aclose())
