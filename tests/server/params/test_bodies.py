"""Bodies of requests: how large, of which type, and how one that cannot be read is refused."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from octoai.server.engines.scripted import ScriptedEngine
from tests.running import InProcess, Start
from tests.talking import ask, request


def test_a_body_that_says_it_is_too_large_is_not_read(service: InProcess, talk: Any) -> None:
    client = talk(service)
    client.send("/v1/chat/completions", head="content-length: 10000001\r\n")
    status, headers, body = client.answer()
    assert (status, json.loads(body)["code"]) == (413, "body_too_large")
    assert headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/admin/tokens"])
def test_a_length_may_begin_with_any_number_of_zeros(service: InProcess, talk: Any, path: str) -> None:
    """HTTP allows them; Python reads no number of more than 4300 digits."""
    body = json.dumps(request(service) if path.endswith("completions") else {"name": "t"}).encode()
    for length, status in ((len(body), 200), (10_000_001, 413)):
        client = talk(service)
        client.send(path, body, head=f"content-length: {length:05000}\r\n")
        assert client.answer()[0] == status


def test_a_body_that_turns_out_too_large_is_not_kept(service: InProcess, talk: Any) -> None:
    client = talk(service)
    client.send("/v1/chat/completions", head="transfer-encoding: chunked\r\n")
    block = b"%x\r\n%s\r\n" % (1_000_000, b" " * 1_000_000)
    try:
        for _ in range(11):
            client.socket.sendall(block)
    except (BrokenPipeError, ConnectionResetError):
        pass
    status, _, body = client.answer()
    assert (status, json.loads(body)["code"]) == (413, "body_too_large")


def test_ten_megabytes_are_read(in_process: Start) -> None:
    service = in_process(ScriptedEngine(context_length=10**9))
    body = json.dumps(request(service)).encode().ljust(10_000_000)
    status, _, text = ask(service, "/v1/chat/completions", body)
    assert status == 200, text


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json"])
def test_a_body_is_json_whatever_its_type_says(service: InProcess, kind: str | None) -> None:
    headers = {} if kind is None else {"content_type": kind}
    assert ask(service, "/v1/chat/completions", json.dumps(request(service)).encode(), **headers)[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 422, "invalid_value"),
        (b'{"model": "smollm2"}', 422, "invalid_value"),
        (b'{"model": "nothing", "messages": [{"role": "user"}]}', 404, "model_not_found"),
        (b'{"model": "smollm2", "messages": [{"role": "user"}], "peft": "x"}', 400, "unsupported_parameter"),
    ],
)
def test_a_wrong_body_is_refused_in_the_one_shape(service: InProcess, body: bytes, status: int, code: str) -> None:
    seen = len(service.engine.seen)
    got, headers, text = ask(service, "/v1/chat/completions", body)
    answer = json.loads(text)
    assert (got, answer["code"], answer["error"]["code"]) == (status, code, code)
    assert answer["object"] == "error"
    assert headers["x-request-id"]
    assert isinstance(answer.get("detail", []), list)
    assert ("detail" in answer) == (status == 422)
    assert len(service.engine.seen) == seen


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/admin/accounts"])
def test_a_packed_body_is_refused_by_the_header_that_says_so(service: InProcess, path: str) -> None:
    plain = json.dumps({"id": "packed"} if "admin" in path else request(service)).encode()
    status, _, text = ask(service, path, gzip.compress(plain), content_encoding="gzip")
    answer = json.loads(text)
    assert (status, answer["code"], answer["object"]) == (415, "unsupported_content_encoding", "error")
    assert answer["message"] == "Content-Encoding: gzip is not read here; send the body as it is, without this header."
    assert ask(service, path, plain, content_encoding="Identity")[0] in (200, 201)
