"""Calls by an `httpx` client: one that a user brought, or our own behind a proxy."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from octoai import (
    ApiConnectionError,
    AsyncOctoAI,
    BadRequestError,
    ConfigurationError,
    NotFoundError,
    OctoAI,
    StreamInterrupted,
)
from tests.sdk.conftest import MESSAGES
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


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_an_answer_that_a_hook_has_refused_is_that_answer(api: Any, serve: Any, library: str, reads: bool) -> None:
    module = pytest.importorskip(library)
    server = serve(lambda x: x.reply(404, {"message": "no such model"}))
    told = pytest.raises(NotFoundError, match="no such model" if reads else "answered 404")
    with own_client(api, module, refusing(api, reads=reads)) as own, told as caught:
        api.chat(api.client(base_url=server.url, httpx_client=own))
    assert caught.value.status_code == 404
    assert len(server.requests) == 1


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_a_good_answer_that_a_hook_has_refused_is_none(api: Any, serve: Any, library: str, reads: bool) -> None:
    module = pytest.importorskip(library)

    def refuse(response: Any) -> None:
        raise module.HTTPStatusError("the signature is wrong", request=response.request, response=response)

    server = serve(lambda x: x.reply(200, answer()))
    with own_client(api, module, refusing(api, reads=reads, refuse=refuse)) as own:
        client = api.client(base_url=server.url, httpx_client=own)
        with pytest.raises(ApiConnectionError, match="ended the call: the signature is wrong"):
            api.chat(client)
    assert len(server.requests) == 1


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_a_redirect_that_a_hook_has_refused_is_followed(api: Any, serve: Any, library: str, reads: bool) -> None:
    module = pytest.importorskip(library)

    def script(x: Exchange) -> None:
        if x.target == "/moved":
            x.reply(200, answer())
        else:
            x.reply(307, {}, location="/moved")

    with own_client(api, module, refusing(api, reads=reads)) as own:
        client = api.client(base_url=serve(script).url, httpx_client=own)
        assert api.chat(client).choices[0].message.content == "hello"


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_what_a_hook_has_refused_is_the_answer_to_a_signed_request_too(api: Any, serve: Any, library: str) -> None:
    module = pytest.importorskip(library)

    class Signed(module.Auth):  # type: ignore[misc,name-defined]
        """Sends a request of its own in place of the one it was given."""

        requires_request_body = True

        def auth_flow(self, request: Any) -> Iterator[Any]:
            headers = {**request.headers, "x-signature": "s"}
            options = {"content": request.content, "extensions": request.extensions}
            yield module.Request(request.method, request.url, headers=headers, **options)

    def script(x: Exchange) -> None:
        if x.number == 1:
            x.reply(429, {"message": "slow down"}, retry_after=0)
        else:
            x.reply(200, answer(id=x.headers["x-signature"]))

    with own_client(api, module, refusing(api, reads=True), auth=Signed()) as own:
        client = api.client(base_url=serve(script).url, httpx_client=own)
        assert api.chat(client).id == "s"


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_what_another_service_tells_a_hook_is_no_answer(api: Any, serve: Any, library: str) -> None:
    module = pytest.importorskip(library)
    keys = serve(lambda x: x.reply(404, {"message": "no such secret"}))
    service = serve(lambda x: x.reply(200, answer()))

    def sign(_request: Any) -> None:
        module.get(keys.url).raise_for_status()

    async def sign_later(_request: Any) -> None:
        async with module.AsyncClient() as asking:
            (await asking.get(keys.url)).raise_for_status()

    hooks = {"request": [sign if api.kind == "sync" else sign_later]}
    told = pytest.raises(ApiConnectionError, match=f"a hook of the HTTP client ended the call.*{keys.url}")
    with own_client(api, module, hooks) as own, told:
        api.chat(api.client(base_url=service.url, httpx_client=own))
    assert not service.requests


def raise_for_status(response: Any) -> None:
    response.raise_for_status()


def refusing(api: Any, *, reads: bool, refuse: Callable[[Any], None] = raise_for_status) -> dict[str, Any]:
    """Hooks that refuse an answer: for its status, as many clients have them, where nothing else is said."""

    def hook(response: Any) -> None:
        if reads:
            response.read()
        refuse(response)

    async def hook_later(response: Any) -> None:
        if reads:
            await response.aread()
        refuse(response)

    return {"response": [hook if api.kind == "sync" else hook_later]}


@contextmanager
def own_client(api: Any, module: Any, hooks: dict[str, Any], **options: Any) -> Iterator[Any]:
    own = (module.Client if api.kind == "sync" else module.AsyncClient)(event_hooks=hooks, **options)
    try:
        yield own
    finally:
        own.close() if api.kind == "sync" else api.run(own.aclose())


@pytest.mark.parametrize("turns", range(5))
def test_a_stream_of_an_own_client_may_be_closed_twice_while_it_is_opened(serve: Any, turns: int) -> None:
    httpx = pytest.importorskip("httpx")
    server = serve(lambda x: x.seconds_until_closed(3))

    async def close_twice() -> None:
        async with httpx.AsyncClient() as own:
            client = AsyncOctoAI(base_url=server.url, api_key="k", httpx_client=own)
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.1)
            await stream.close()
            for _ in range(turns):
                await asyncio.sleep(0)
            await stream.close()
            with pytest.raises(StreamInterrupted, match="it was closed before"):
                await asyncio.wait_for(reading, 2)

    asyncio.run(close_twice())


@pytest.mark.parametrize("brought", [False, True])
def test_a_stream_may_be_closed_while_its_refusal_stalls(serve: Any, brought: bool) -> None:
    httpx = pytest.importorskip("httpx")

    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 404 X\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        x.seconds_until_closed(3)

    async def close() -> None:
        async with httpx.AsyncClient() as own:
            client = AsyncOctoAI(base_url=serve(script).url, api_key="k", httpx_client=own if brought else None)
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.2)
            await stream.close()
            with pytest.raises(StreamInterrupted, match="it was closed before"):
                await asyncio.wait_for(reading, 2)

    asyncio.run(close())


@pytest.mark.parametrize("proxy", ["socks5h://127.0.0.1:9", "foo://127.0.0.1:9", "http://[::1", "http://a:b:c"])
def test_a_proxy_that_cannot_be_used_is_told(api: Any, monkeypatch: Any, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ConfigurationError, match="the proxy of the environment cannot be used"):
        api.chat(api.client(base_url="http://service.invalid"))


def test_an_address_that_is_none_is_told_behind_a_proxy_too(api: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="not a valid address"):
        api.call(api.client(), "infer", "http://[::ffff:nobody.invalid]/", {})


def test_threads_that_ask_at_once_share_one_client(serve: Any, monkeypatch: Any) -> None:
    httpx2 = pytest.importorskip("httpx2")
    made: list[Any] = []

    class Noted(httpx2.Client):  # type: ignore[misc,name-defined]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(httpx2, "Client", Noted)
    monkeypatch.setenv("HTTP_PROXY", serve(lambda x: x.reply(200, answer())).url)
    client, together = OctoAI(base_url="http://service.invalid", api_key="k"), threading.Barrier(8)

    def ask() -> None:
        together.wait(5)
        client.text_gen.create_chat_completion(model="m", messages=MESSAGES)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(not each.is_closed for each in made) == 1
    client.close()
    assert all(each.is_closed for each in made)


def test_a_client_of_the_other_kind_is_refused_at_once(api: Any) -> None:
    for library in ("httpx", "httpx2"):
        module = pytest.importorskip(library)
        wrong = module.AsyncClient() if api.kind == "sync" else module.Client()
        with pytest.raises(TypeError, match=r"takes an httpx\.(Async)?Client, not (Async)?Client"):
            api.client(httpx_client=wrong)


def test_headers_that_are_left_out_are_not_filled_in(api: Any) -> None:
    def handler(module: Any, request: Any) -> Any:
        return module.Response(200, json=answer(id=request.headers.get("user-agent", "none")))

    for library in ("httpx", "httpx2"):
        client = mocked(api, handler, library)
        assert api.chat(client, request_options={"additional_headers": {"user-agent": None}}).id == "none"
        assert api.chat(client).id.startswith("octoai-python")


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_what_no_retry_helps_against_is_not_sent_again(api: Any, library: str) -> None:
    sent: list[Any] = []

    def handler(module: Any, request: Any) -> Any:
        sent.append(request)
        if len(sent) == 1:
            raise module.RemoteProtocolError("illegal status line")
        if len(sent) == 2:
            raise module.ConnectError("failed") from ssl.SSLCertVerificationError("unknown authority")
        if len(sent) == 3:
            raise module.RemoteProtocolError("Server disconnected without sending a response.")
        return module.Response(200, json=answer())

    client = mocked(api, handler, library)
    for _ in range(2):
        with pytest.raises(ApiConnectionError) as caught:
            api.chat(client)
        assert caught.value.attempts == 1
    assert api.chat(client)
    assert len(sent) == 4
