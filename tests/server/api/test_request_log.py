"""What is logged of a request, and of one that is refused: who and why, never its text."""

from __future__ import annotations

import logging

import pytest

from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import EngineFailed
from tests.running import Start
from tests.talking import Talk, ask, chat, is_idle, metric, request, until


def test_one_line_is_logged_per_request_without_its_text(in_process: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    service = in_process(ScriptedEngine(("secret", "answer")))
    chat(service, messages=[{"role": "user", "content": "the zebra crosses"}], user="zebra")
    chat(service, messages=[{"role": "zebra", "content": 5}])
    until(lambda: any(record.name == "octoai.request" for record in caplog.records))
    (line,) = [record.fields for record in caplog.records if record.name == "octoai.request"]  # type: ignore[attr-defined]
    assert (line["model"], line["completion_tokens"], line["prompt_tokens"]) == (service.model, 2, 3)
    assert (line["outcome"], line["finish_reason"], line["account"]) == ("finished", "stop", "default")
    assert line["total_ms"] >= line["first_token_ms"] >= 0
    everything = " ".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "zebra" not in everything
    assert "secret" not in everything
    assert service.token not in everything


def test_every_refusal_is_one_line_that_says_who_and_why_without_the_text(
    in_process: Start, caplog: pytest.LogCaptureFixture
) -> None:
    service = in_process(ScriptedEngine((EngineFailed("it broke"),)))
    limited = service.mint("limited", limits={"requests_per_minute": 1})
    caplog.set_level(logging.INFO)
    chat(service, model="no-such-model")
    chat(service, messages=[{"role": "user", "content": {"zebra": "zebra"}}])
    ask(service, "/v1/models", authorization="Bearer octoai_zebra")
    ask(service, "/v1/nowhere")
    for _ in range(2):
        ask(service, "/v1/chat/completions", request(service), authorization=f"Bearer {limited.text}")
    unread = Talk(service)
    unread.socket.sendall(b"zebra\r\n\r\n")
    answered = unread.rest()
    unread.close()
    until(lambda: is_idle(service))
    lines = [record.fields for record in caplog.records if record.name == "octoai.refusal"]  # type: ignore[attr-defined]
    assert [(line["status"], line["error"], line["param"], line["account"]) for line in lines] == [
        (404, "model_not_found", "model", "default"),
        (422, "invalid_value", "messages.0.content", "default"),
        (401, "invalid_api_key", None, None),
        (404, "unknown_url", None, None),
        (429, "rate_limit_exceeded", None, "default"),
        (400, "invalid_http", None, None),
    ]
    assert metric(service, "octoai_refusals_total") == len(lines) + 1  # with that of the job
    assert f"x-request-id: {lines[5]['request_id']}\r\n".encode() in answered
    assert "`no-such-model`" in lines[0]["reason"]
    assert (lines[2]["method"], lines[2]["path"]) == ("GET", "/v1/models")
    assert lines[4]["token"] == limited.id
    (job,) = [record.fields for record in caplog.records if record.name == "octoai.request"]  # type: ignore[attr-defined]
    assert job["error"] == "engine_failed"
    assert "zebra" not in str(lines)
