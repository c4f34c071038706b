"""What is sent, what errors become, and what is sent again; for both clients."""

from __future__ import annotations

import enum
import json
import re
import time
import uuid
from collections import deque
from datetime import timedelta
from decimal import Decimal
from email.utils import formatdate
from pathlib import PurePosixPath
from typing import Any

import pydantic
import pytest

from octoai import (
    ApiConnectionError,
    ApiError,
    ApiTimeoutError,
    AuthenticationError,
    BadRequestError,
    ChatMessage,
    ConfigurationError,
    ConflictError,
    InsufficientQuotaError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ResponseError,
    ServerError,
    Timeout,
    UnprocessableEntityError,
    _credentials,
)
from octoai._json import encoded
from octoai.client import InferenceFuture
from octoai.text_gen import ErrorResponse, HttpValidationError
from octoai.text_gen.client import OMIT
from tests.sdk.misbehaving import Exchange, Server, answer, chunk, words


@pytest.fixture
def echo(serve: Any) -> Server:
    return serve(lambda x: x.reply(200, answer(), x_request_id="req-7"))


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


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_every_spelling_of_a_base_url_works(api: Any, echo: Server, suffix: str) -> None:
    api.chat(api.client(base_url=echo.url + suffix))
    assert echo.requests[0].target == "/v1/chat/completions"


def test_a_callable_token_is_asked_at_every_request(api: Any, echo: Server) -> None:
    tokens = iter(["one", "two"])
    client = api.client(base_url=echo.url, api_key=lambda: next(tokens))
    api.chat(client)
    api.chat(client)
    assert [x.headers["authorization"] for x in echo.requests] == ["Bearer one", "Bearer two"]


CLASSES = {
    400: BadRequestError,
    401: AuthenticationError,
    402: InsufficientQuotaError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: UnprocessableEntityError,
    429: RateLimitError,
    500: InternalServerError,
    503: ServerError,
    413: ApiError,
}


@pytest.mark.parametrize("status", CLASSES)
@pytest.mark.parametrize("nested", [True, False])
def test_every_status_has_its_error(api: Any, serve: Any, status: int, nested: bool) -> None:
    said = {"message": "because", "type": "t", "code": "c", "param": "p"}
    server = serve(lambda x: x.reply(status, {"error": said} if nested else said, x_request_id="r"))
    with pytest.raises(ApiError) as caught:
        api.chat(api.client(base_url=server.url, max_retries=0))
    error = caught.value
    assert type(error) is CLASSES[status]
    assert (error.status_code, error.message, error.code, error.param) == (status, "because", "c", "p")
    assert error.request_id == "r"
    assert f"status_code: {status}, body: " in str(error)


def test_validation_errors_and_server_errors_have_typed_bodies(api: Any, serve: Any) -> None:
    detail = [{"loc": ["body", "n"], "msg": "too big", "type": "value"}]
    server = serve(lambda x: x.reply(422, {"detail": detail}))
    with pytest.raises(UnprocessableEntityError, match="too big") as caught:
        api.chat(api.client(base_url=server.url))
    assert isinstance(caught.value.body, HttpValidationError)
    server = serve(lambda x: x.reply(500, {"object": "error", "message": "m", "type": "internal_error"}))
    with pytest.raises(InternalServerError) as failed:
        api.chat(api.client(base_url=server.url, max_retries=0))
    assert isinstance(failed.value.body, ErrorResponse)


@pytest.mark.parametrize("body", [b"<html>", b"", b'"text"', b'{"detail": "a string"}', b"\xff"])
@pytest.mark.parametrize("status", [422, 500, 404])
def test_error_bodies_of_any_form_are_api_errors(api: Any, serve: Any, status: int, body: bytes) -> None:
    server = serve(lambda x: x.reply(status, body))
    with pytest.raises(CLASSES[status]):
        api.chat(api.client(base_url=server.url, max_retries=0))


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b"\xff"])
def test_an_answer_that_is_not_one_is_an_api_error(api: Any, serve: Any, body: bytes) -> None:
    with pytest.raises(ResponseError):
        api.chat(api.client(base_url=serve(lambda x: x.reply(200, body)).url))


def test_a_missing_token_is_explained(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(401, {"message": "who are you?"}))
    with pytest.raises(AuthenticationError) as caught:
        api.chat(api.client(base_url=server.url, api_key=None))
    for way in ("api_key", "OCTOAI_TOKEN", "credentials.toml"):
        assert way in str(caught.value)
    assert "authorization" not in server.requests[0].headers


def refusal(api: Any, client: Any) -> str:
    with pytest.raises(AuthenticationError) as caught:
        api.chat(client)
    return str(caught.value)


def test_a_token_that_is_refused_is_said_where_it_is_from(
    api: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda x: x.reply(401, {"message": "not a valid token."}))
    _credentials.write(endpoint=server.url, token="secret-stored")
    from_file = refusal(api, api.client(api_key=None))
    assert f"not a valid token. The token that was sent is that of the credentials file {_credentials.path()} (" in (
        from_file
    )
    monkeypatch.setenv("OCTOAI_API_KEY", "secret-old")
    from_variable = refusal(api, api.client(api_key=None))
    assert "is that of the environment variable OCTOAI_API_KEY; unset it to send the one that the " in from_variable
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == ["Bearer secret-stored", "Bearer secret-old"]
    given = refusal(api, api.client(base_url=server.url))
    own_header = refusal(api, api.client(default_headers={"authorization": "Bearer secret-own"}, api_key=None))
    for said in (given, own_header):
        assert "was sent" not in said
    for said in (from_file, from_variable, given, own_header):
        assert "secret" not in said


def test_of_another_token_only_one_that_would_be_sent_is_told(
    api: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda x: x.reply(401, {"message": "not a valid token"}))
    monkeypatch.setenv("OCTOAI_TOKEN", "t")
    for endpoint, token in (("http://127.0.0.1:1", "another"), (server.url, "t"), (server.url, "")):
        _credentials.write(endpoint=endpoint, token=token)
        said = refusal(api, api.client(base_url=server.url, api_key=None))
        assert "is that of the environment variable OCTOAI_TOKEN (status_code" in said
    _credentials.path().write_text("endpoint = [")
    assert "variable OCTOAI_TOKEN (status_code" in refusal(api, api.client(base_url=server.url, api_key=None))


def test_a_missing_token_that_is_stored_for_another_address_is_said_whom_it_is_for(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.reply(401, {"message": "who are you?"}))
    _credentials.write(endpoint="http://somebody:pw@localhost:7001/v1", token="secret-stored")
    said = refusal(api, api.client(base_url=server.url, api_key=None))
    assert f"credentials file {_credentials.path()}, whose token is for http://localhost:7001 only (" in said
    assert "secret-stored" not in said
    assert "authorization" not in server.requests[0].headers


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


def test_nobody_listening_is_a_connection_error_that_helps(api: Any) -> None:
    with pytest.raises(ApiConnectionError, match="octoai serve") as caught:
        api.chat(api.client(base_url="http://127.0.0.1:9", max_retries=1))
    assert caught.value.attempts == 2


@pytest.mark.parametrize("garbage", [b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nbroken\r\n\r\n"])
def test_an_answer_that_is_not_http_is_an_api_error(api: Any, serve: Any, garbage: bytes) -> None:
    def script(x: Exchange) -> None:
        x.send(garbage)
        x.hang_up()

    with pytest.raises(ApiError):
        api.chat(api.client(base_url=serve(script).url, max_retries=0))


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


def test_a_proxy_is_used_where_the_environment_names_one(api: Any, serve: Any, monkeypatch: Any) -> None:
    proxy = serve(lambda x: x.reply(200, answer()))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    api.chat(api.client(base_url="http://service.invalid"))
    assert proxy.requests[0].target.startswith("http://service.invalid/")
    direct = serve(lambda x: x.reply(200, answer()))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    api.chat(api.client(base_url=direct.url))
    assert len(direct.requests) == 1


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


def test_header_lines_that_continue_are_read(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.reply(200, answer(), x_request_id="a\r\n  b")

    assert api.chat(api.client(base_url=serve(script).url)).request_id == "a b"


def test_a_head_that_drips_is_no_silence(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.send(b"HTTP/1.1 200 OK\r\nx: ")
        for _ in range(8):
            time.sleep(0.1)
            x.send(b"y")
        data = json.dumps(answer()).encode()
        x.send(b"\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))

    assert api.chat(api.client(base_url=serve(script).url, timeout=0.5))
