"""Who may ask the service, and what those who may not are told."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from octoai.server import tokens
from tests.running import InProcess
from tests.talking import ask, request


def test_a_missing_or_wrong_token_is_refused_before_the_body_is_sent(service: InProcess, talk: Any) -> None:
    seen = len(service.engine.seen)
    for token in ("", "authorization: Bearer octoai_wrong\r\n", "authorization: Basic x\r\n"):
        client = talk(service)
        began = time.monotonic()
        client.send("/v1/chat/completions", head=token + "content-length: 9000000\r\n", auth=False)
        status, headers, body = client.answer()
        assert time.monotonic() - began < 0.5
        assert (status, headers["www-authenticate"]) == (401, "bearer")
        assert json.loads(body)["code"] == "invalid_api_key"
    assert len(service.engine.seen) == seen


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/smollm2", "/v1/chat/completions", "/v1/completions"])
def test_everything_under_v1_wants_a_token(service: InProcess, path: str) -> None:
    status, headers, text = ask(
        service, path, None if "models" in path else b"not json", authorization="Bearer " + service.token[:-1] + "!"
    )
    assert status == 401
    assert headers["x-request-id"]
    assert json.loads(text)["error"]["code"] == "invalid_api_key"


def test_a_token_revoked_by_another_process_is_refused_within_a_second(service: InProcess) -> None:
    minted = service.mint("other")
    assert ask(service, "/v1/models", authorization=f"Bearer {minted.text}")[0] == 200
    service.books(lambda db: tokens.revoke(db, minted.id))
    until = time.monotonic() + 1
    while ask(service, "/v1/models", authorization=f"Bearer {minted.text}")[0] == 200:
        assert time.monotonic() < until
    assert ask(service, "/v1/models", authorization=f"Bearer {minted.text}")[0] == 401


def test_a_body_is_not_asked_for_from_a_client_that_may_not_ask(service: InProcess, talk: Any) -> None:
    wrong, right = talk(service), talk(service)
    head = "content-length: 5\r\nexpect: 100-continue\r\n"
    wrong.send("/v1/chat/completions", head=head + "authorization: Bearer x\r\n", auth=False)
    assert wrong.until(b"\r\n").startswith(b"HTTP/1.1 401")
    right.send("/v1/chat/completions", head=head)
    assert right.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")


def test_a_token_for_many_models_is_told_some_of_them(service: InProcess) -> None:
    """A refusal named all of a thousand: 234 kB."""
    token = service.mint("many", models=[f"org/model-{number:04}" for number in range(1000)]).text
    few = service.mint("few", models=["org/model-1", "own"]).text

    def refusal(token: str) -> str:
        status, _, text = ask(service, "/v1/chat/completions", request(service), authorization=f"Bearer {token}")
        error = json.loads(text)["error"]
        assert (status, error["param"]) == (403, "model")
        return str(error["message"]).partition("; it may use ")[2]

    assert refusal(token) == ", ".join(f"org/model-{number:04}" for number in range(20)) + " and 980 more."
    assert refusal(few) == "org/model-1, own."
