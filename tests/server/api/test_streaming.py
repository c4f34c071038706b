"""Streams over a real socket: when text leaves, and how they end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

import openai
import pytest

from octoai.server.engines.base import Event, Generation
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Unavailable
from octoai.server.ledger.ledger import Tab
from tests.running import Start
from tests.talking import MESSAGES, chat, events, is_idle, metric, request, until


def test_the_end_of_the_events_and_of_the_body_leave_in_one_write(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine(("a", 0.05, "b", 0.05)))
    client = talk(service)
    client.send("/v1/chat/completions", request(service, stream=True))
    blocks = []
    while not blocks or not blocks[-1].endswith(b"0\r\n\r\n"):
        blocks.append(client.socket.recv(65536))
        assert blocks[-1]
    assert blocks[-1].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b'"finish_reason":"stop"' in blocks[-1]
    client.send("/health/live", method="GET")  # the connection is as good as new
    assert client.answer()[0] == 200


def test_events_leave_as_they_come(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine(("first", 0.4, "second")))
    client = talk(service)
    client.send("/v1/chat/completions", request(service, stream=True))
    began = time.monotonic()
    head = client.until(b"\r\n\r\n").lower()
    client.until(b'"first"')
    assert time.monotonic() - began < 0.3
    assert b"content-type: text/event-stream" in head
    assert b"x-accel-buffering: no" in head
    assert b"x-octoai-served-model: " + service.model.encode() in head
    client.until(b'"second"')


def test_an_error_in_mid_stream_is_an_event_and_a_body_without_its_end(in_process: Start, talk: Any) -> None:
    for error, code in ((EngineFailed("it broke"), "engine_failed"), (ValueError("internal detail"), None)):
        service = in_process(ScriptedEngine(("one ", "two ", 0.02, error)))
        client = talk(service)
        client.send("/v1/chat/completions", request(service, stream=True))
        said = client.rest()
        assert said.startswith(b"HTTP/1.1 200")
        assert b'"content":"two "' in said
        last = json.loads(said.rpartition(b"data: ")[2].split(b"\n\n")[0])
        assert last["error"]["code"] == code
        assert last["error"]["message"] == last["message"]
        assert b"internal detail" not in said
        assert b"[DONE]" not in said
        assert not said.endswith(b"0\r\n\r\n")
        until(partial(is_idle, service))
        assert metric(service, "octoai_requests_failed_total") == 1


def test_the_openai_client_notices_an_error_in_mid_stream(in_process: Start) -> None:
    service = in_process(ScriptedEngine(("one ", EngineFailed("it broke"))))
    with openai.OpenAI(base_url=service.url + "/v1", api_key=service.token, max_retries=0) as client:
        stream = client.chat.completions.create(model=service.model, messages=MESSAGES, stream=True)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="it broke"):
            list(stream)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineFailed("it broke"), 502, "engine_failed"),
        (Unavailable("later", retry_after=3), 503, "unavailable"),
        (BadRequest("no", param="response_format"), 400, "invalid_value"),
        (ContextLengthExceeded(9000, 8192, param="messages"), 400, "context_length_exceeded"),
        (RuntimeError("internal detail"), 500, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_an_engine_refuses_before_its_first_token_is_a_plain_answer(
    in_process: Start, error: Exception, status: int, code: str | None, stream: bool
) -> None:
    service = in_process(ScriptedEngine((error,)))
    got, headers, answer = chat(service, stream=stream)
    assert (got, answer["code"], headers["content-type"]) == (status, code, "application/json")
    assert "internal detail" not in json.dumps(answer)
    assert ("retry-after" in headers) == (status == 503)
    until(lambda: is_idle(service))


def test_an_engine_that_breaks_off_a_whole_answer_is_a_502(in_process: Start) -> None:
    service = in_process(ScriptedEngine(("one ", "two ", EngineFailed("it broke"))))
    status, _, answer = chat(service)
    assert (status, answer["code"]) == (502, "engine_failed")
    assert metric(service, "octoai_requests_failed_total") == 1


def test_usage_is_in_the_stream_only_when_asked_for(in_process: Start) -> None:
    service = in_process(ScriptedEngine(("a", "b")))
    for options, wanted in (
        (None, False),
        ({}, False),
        ({"include_usage": False}, False),
        ({"include_usage": True}, True),
    ):
        _, _, text = chat(service, stream=True, stream_options=options)
        read = events(text)
        assert all(len(chunk["choices"]) == 1 for chunk in read)
        assert bool(read[-1].get("usage")) is wanted
    assert read[-1]["usage"]["completion_tokens"] == 2


class AtOnce(ScriptedEngine):
    """Gives a whole answer in one batch."""

    async def generate(self, generation: Generation, *others: Any) -> AsyncGenerator[Sequence[Event]]:
        yield [event async for batch in super().generate(generation, *others) for event in batch]


def test_no_text_leaves_before_the_request_is_on_disk_however_it_comes(
    in_process: Start, monkeypatch: pytest.MonkeyPatch, talk: Any
) -> None:
    synced = threading.Event()

    async def durable(_: Tab) -> None:
        while not synced.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(Tab, "is_durable", False)
    monkeypatch.setattr(Tab, "durable", durable)
    service = in_process(AtOnce())
    client = talk(service)
    client.send("/v1/chat/completions", request(service, stream=True, n=2))
    client.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.socket.recv(1)
    synced.set()
    client.socket.settimeout(5)
    client.until(b"[DONE]")
