"""What is sent, and what comes back as an answer; for both clients."""

from __future__ import annotations

import enum
import json
import uuid
from collections import deque
from datetime import timedelta
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import pydantic
import pytest

from octoai import (
    ApiConnectionError,
    ApiError,
    ApiTimeoutError,
    ChatMessage,
    ConfigurationError,
)
from octoai._json import encoded
from octoai.text_gen.client import OMIT
from tests.sdk.misbehaving import Exchange, Server, answer, chunk, words


def test_an_answer_is_typed_and_knows_its_request(api: Any, echo: Server) -> None:
    whole = api.chat(api.client(base_url=echo.url))
    assert whole.choices[0].message.content == "hello"
    assert whole.request_id == "req-7"
    assert whole.raw_response.status_code == 200
    assert b"hello" in whole.raw_response.body
    assert "raw_response" not in whole.dict()
    assert "_raw_response" not in dict(whole)
    request = echo.requests[0]
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == "Bearer test-token"
    assert request.headers["content-type"] == "application/json"
    assert request.json["stream"] is False


def test_none_is_sent_as_null_and_what_is_left_out_is_not_sent(api: Any, echo: Server) -> None:
    api.chat(api.client(base_url=echo.url), temperature=None, top_p=OMIT, seed=3)
    assert echo.requests[0].json == {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "m",
        "seed": 3,
        "stream": False,
        "temperature": None,
    }


def test_models_and_other_objects_are_sent_as_json(api: Any, echo: Server) -> None:
    class Kind(enum.StrEnum):
        TEXT = "text"

    messages = [
        ChatMessage(role="tool", content="x", tool_call_id="c"),
        ChatMessage(role="user", content=[{"type": "text", "text": "y"}]),
    ]
    api.chat(api.client(base_url=echo.url), messages=messages, response_format={"type": Kind.TEXT})
    sent = echo.requests[0].json
    assert sent["messages"][0] == {"role": "tool", "content": "x", "tool_call_id": "c"}
    assert sent["messages"][1]["content"] == [{"type": "text", "text": "y"}]
    assert sent["response_format"] == {"type": "text"}


class Item(pydantic.BaseModel):
    kind: str = "item"
    size: int | None = None
    name: str | None = pydantic.Field(default=None, alias="Name")


def test_the_defaults_of_a_users_own_model_are_sent(api: Any, echo: Server) -> None:
    api.chat(api.client(base_url=echo.url), extra_body={"items": [Item(), Item(size=None, Name="n")]})
    assert echo.requests[0].json["items"] == [{"kind": "item"}, {"kind": "item", "size": None, "Name": "n"}]


class Place:
    def __init__(self, name: str) -> None:
        self.name = name
        self.path = PurePosixPath("/a/b")


class Row:
    def keys(self) -> list[str]:
        return ["a"]

    def __getitem__(self, name: str) -> str:
        return name


UNIQUE = uuid.UUID(int=1)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ((n for n in (1, 2)), [1, 2]),
        (deque([1, 2]), [1, 2]),
        (PurePosixPath("/a/b"), "/a/b"),
        (UNIQUE, str(UNIQUE)),
        (Decimal("0.5"), 0.5),
        (Decimal(3), 3),
        (timedelta(minutes=1), 60.0),
        (Place("x"), {"name": "x", "path": "/a/b"}),
        (Row(), {"a": "a"}),
    ],
)
def test_what_the_originals_encoder_took_is_sent(given: Any, sent: Any) -> None:
    assert json.loads(encoded({"it": given})) == {"it": sent}


@pytest.mark.parametrize("given", [object(), len, lambda: 1, int])
def test_what_is_no_json_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent as JSON"):
        encoded({"it": given})


@pytest.mark.parametrize("inputs", [[1, 2], "text", 5, None, Item()])
def test_any_json_can_be_sent_to_an_endpoint(api: Any, serve: Any, inputs: Any) -> None:
    sent = {"kind": "item"} if isinstance(inputs, Item) else inputs
    server = serve(lambda x: x.reply(200, {"got": x.json}))
    assert api.call(api.client(), "infer", server.url, inputs) == {"got": sent}


def test_a_misspelt_parameter_is_a_type_error_that_names_the_nearest(api: Any, echo: Server) -> None:
    client = api.client(base_url=echo.url)
    with pytest.raises(TypeError, match=r"'temprature'.*'temperature'"):
        api.chat(client, temprature=1)
    with pytest.raises(TypeError, match="'prompt'"):
        api.stream(client, prompt="x")
    with pytest.raises(TypeError, match="'max_retrys'"):
        api.chat(client, request_options={"max_retrys": 1})
    with pytest.raises(TypeError, match="'messages'"):
        api.call(client.text_gen, "create_chat_completion", model="m")
    assert not echo.requests


def test_every_request_option_works(api: Any, echo: Server) -> None:
    client = api.client(base_url=echo.url, default_headers={"x-a": "1", "x-b": "2", "x-fern-language": None})
    options = {
        "additional_headers": {"X-B": "3", "user-agent": "mine", "x-none": None},
        "additional_query_parameters": {"q": "a b", "r": [1, 2], "none": None},
        "additional_body_parameters": {"top_k": 4, "model": "other"},
        "timeout_in_seconds": 5,
        "max_retries": 0,
    }
    api.chat(client, request_options=options, extra_body={"loras": []})
    request = echo.requests[0]
    assert request.target == "/v1/chat/completions?q=a%20b&r=1&r=2"
    assert (request.headers["x-a"], request.headers["x-b"], request.headers["user-agent"]) == ("1", "3", "mine")
    assert "x-fern-language" not in request.headers
    assert (request.json["top_k"], request.json["model"], request.json["loras"]) == (4, "other", [])
    assert request.json["messages"]


def test_a_callable_token_is_asked_at_every_request(api: Any, echo: Server) -> None:
    tokens = iter(["one", "two"])
    client = api.client(base_url=echo.url, api_key=lambda: next(tokens))
    api.chat(client)
    api.chat(client)
    assert [x.headers["authorization"] for x in echo.requests] == ["Bearer one", "Bearer two"]


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_a_users_own_http_client_is_used(api: Any, serve: Any, library: str) -> None:
    import importlib

    module = importlib.import_module(library)
    own = (module.Client if api.kind == "sync" else module.AsyncClient)(headers={"x-mine": "1"})
    server = serve(lambda x: x.stream(words()) if x.json["stream"] else x.reply(200, answer()))
    client = api.client(base_url=server.url, httpx_client=own)
    assert api.chat(client)
    assert len(api.all(api.stream(client))) == 3
    assert server.requests[0].headers["x-mine"] == "1"
    server = serve(lambda x: x.stream([chunk("a")], done=False))
    with pytest.raises(ApiError, match="ended"):
        api.all(api.stream(api.client(base_url=server.url, httpx_client=own)))
    with pytest.raises(ApiConnectionError):
        api.chat(api.client(base_url="http://127.0.0.1:9", httpx_client=own, max_retries=0))
    stalled = serve(lambda x: x.seconds_until_closed())
    with pytest.raises(ApiTimeoutError):
        api.chat(api.client(base_url=stalled.url, httpx_client=own, timeout=0.3))
    own.close() if api.kind == "sync" else api.run(own.aclose())


def test_a_header_set_to_none_is_left_out_and_a_host_is_replaced(api: Any, echo: Server) -> None:
    client = api.client(base_url=echo.url, default_headers={"Authorization": None})
    api.chat(client, request_options={"additional_headers": {"Host": "virtual.example", "User-Agent": None}})
    assert echo.requests[0].headers["host"] == "virtual.example"
    assert not {"authorization", "user-agent"} & echo.requests[0].headers.keys()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "3"},
        {"Transfer-Encoding": "chunked"},
        {"X": "a\r\nEvil: 1"},
        {"X": "日本"},
        {"X y": "1"},
        {"": "1"},
    ],
)
def test_headers_that_cannot_be_sent_are_refused(api: Any, echo: Server, headers: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        api.chat(api.client(base_url=echo.url), request_options={"additional_headers": headers})
    assert not echo.requests


def test_header_lines_that_continue_are_read(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.reply(200, answer(), x_request_id="a\r\n  b")

    assert api.chat(api.client(base_url=serve(script).url)).request_id == "a b"
