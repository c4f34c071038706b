"""What refusals, and answers that cannot be read, become; for both clients."""

from __future__ import annotations

from typing import Any

import pytest

from octoai import (
    ApiConnectionError,
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InsufficientQuotaError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ResponseError,
    ServerError,
    UnprocessableEntityError,
    _credentials,
)
from octoai.text_gen import ErrorResponse, HttpValidationError
from tests.sdk.misbehaving import Exchange

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
