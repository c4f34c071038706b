"""The HTTP surface, over a real socket and the scripted engine: paths, ids, models, connections, overload."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.store import requests
from tests.running import InProcess, Start
from tests.talking import LONG, MESSAGES, Talk, ask, chat, events, is_idle, request, until

# Paths and methods


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1", 404),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/%2e%2e/%0d%0aset-cookie:x", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("PROPFIND", "/v1/completions", 405),
    ],
)
def test_what_is_not_there_is_said_in_the_one_shape(service: InProcess, method: str, path: str, status: int) -> None:
    got, headers, text = ask(service, path, method=method)
    assert got == status
    answer = json.loads(text)
    assert answer["error"]["message"] == answer["message"]
    assert headers["x-request-id"]
    assert "set-cookie" not in headers
    if status == 405:
        assert headers["allow"]


def test_head_answers_as_get_without_a_body(service: InProcess, talk: Any) -> None:
    for path in ("/health/live", "/v1/models", "/openapi.json"):
        client = talk(service)
        client.send(path, method="HEAD", head="connection: close\r\n")
        head, _, body = client.rest().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert body == b""


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/chat/completions", "/chat/completions"])
def test_paths_that_clients_put_together_wrongly_answer_too(service: InProcess, path: str) -> None:
    assert ask(service, path, request(service))[0] == 200


# Ids


def test_every_answer_has_an_id_also_errors_and_streams(service: InProcess) -> None:
    seen = [
        ask(service, path, body, **more)[1]["x-request-id"]
        for path, body, more in (
            ("/health/live", None, {}),
            ("/health/ready", None, {}),
            ("/metrics", None, {}),
            ("/docs", None, {}),
            ("/nothing", None, {}),
            ("/v1/models", None, {"authorization": "Bearer x"}),
            ("/v1/chat/completions", b"{", {}),
            ("/v1/chat/completions", request(service), {}),
            ("/v1/chat/completions", request(service, stream=True), {}),
            ("/v1/completions", {"model": "smollm2", "prompt": "x"}, {}),
        )
    ]
    assert len(set(seen)) == len(seen)
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", each) for each in seen)


def test_a_sane_id_of_the_client_is_echoed(service: InProcess) -> None:
    for own in ("abc-1", "A.b:c_d", "x" * 128):
        assert ask(service, "/health/live", x_request_id=own)[1]["x-request-id"] == own


@pytest.mark.parametrize("own", ["mine", "req_0123456789abcdef0123456789abcdef"])
def test_an_id_that_comes_twice_is_told_apart_in_the_ledger(service: InProcess, own: str) -> None:
    """Also where it is shaped like one of ours: a proxy may send on what it once was given."""
    given = [
        ask(service, "/v1/chat/completions", request(service), x_request_id=own)[1]["x-request-id"] for _ in range(3)
    ]
    assert given[0] == own
    assert len(set(given)) == 3
    assert all(each.startswith(own) for each in given)
    rows = service.read(lambda db: [row.request_id for each in given for row in requests.named(db, each)])
    assert sorted(rows) == sorted(given)


@pytest.mark.parametrize("own", ["x" * 129, "x" * 1000, "a b", "a\tb", "é", "", "a;b", "<script>", "a,b"])
def test_another_id_is_not(service: InProcess, talk: Any, own: str) -> None:
    client = talk(service)
    client.send("/health/live", method="GET", head=f"x-request-id: {own}\r\n")
    _, headers, _ = client.answer()
    assert headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("own", ["a\rset-cookie: x=1", "a\nset-cookie: x=1", "a\x00b"])
def test_an_id_cannot_carry_a_header_of_its_own(service: InProcess, talk: Any, own: str) -> None:
    client = talk(service)
    client.send("/health/live", method="GET", head=f"x-request-id: {own}\r\nconnection: close\r\n")
    head = client.rest().partition(b"\r\n\r\n")[0].lower()
    assert b"\r\nset-cookie" not in head
    assert b"x=1" not in head


# Connections


def test_a_connection_carries_many_requests(service: InProcess, talk: Any) -> None:
    client = talk(service)
    for body, status in ((request(service), 200), (b"{", 400), ({"model": "x"}, 422), (request(service), 200)):
        client.send("/v1/chat/completions", body)
        assert client.answer()[0] == status


def test_requests_sent_all_at_once_are_answered_in_order(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine(lambda generation: (0.02, f"answer {generation.max_tokens}")))
    client = talk(service)
    for number in range(1, 6):
        client.send("/v1/chat/completions", request(service, max_tokens=number))
    for number in range(1, 6):
        status, _, body = client.answer()
        assert status == 200
        assert json.loads(body)["choices"][0]["message"]["content"] == f"answer {number}"


# Overload and shutdown


def test_a_full_queue_refuses_with_the_time_to_come_back(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine(LONG, num_slots=1), max_waiting=1)
    for _ in range(2):
        talk(service).send("/v1/chat/completions", request(service, stream=True))
    until(lambda: service.queue.num_waiting == 1, 3)
    for stream in (True, False):
        status, headers, answer = chat(service, stream=stream)
        assert (status, answer["code"]) == (503, "overloaded")
        assert int(headers["retry-after"]) >= 1


def test_draining_refuses_the_new_and_finishes_the_running(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine(("a", 0.5, "b")))
    running = talk(service)
    running.send("/v1/chat/completions", request(service, stream=True))
    running.until(b'"a"')
    draining = asyncio.run_coroutine_threadsafe(service.service.drain(), service.loop)  # type: ignore[arg-type]
    until(lambda: service.service.is_draining)
    status, headers, answer = chat(service)
    assert (status, answer["code"]) == (503, "shutting_down")
    assert int(headers["retry-after"]) >= 1
    status, headers, text = ask(service, "/health/ready")
    assert (status, json.loads(text)["status"]) == (503, "draining")
    assert ask(service, "/health/live")[0] == 200
    assert not draining.done()
    running.until(b"data: [DONE]\n\n")
    draining.result(2)


def test_draining_waits_no_longer_than_it_was_told(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine(LONG), drain_seconds=0.3)
    running = talk(service)
    running.send("/v1/chat/completions", request(service, stream=True))
    running.until(b"word")
    began = time.monotonic()
    asyncio.run_coroutine_threadsafe(service.service.drain(), service.loop).result(5)  # type: ignore[arg-type]
    assert 0.25 < time.monotonic() - began < 1


@pytest.fixture
def waiting(in_process: Start, talk: Any) -> Iterator[tuple[InProcess, Talk, sqlite3.Connection]]:
    """A service, a client of it that is not admitted yet, and who it waits for: another has the database."""
    service = in_process(ScriptedEngine())
    lock = sqlite3.connect(service.settings.data_dir / "octoai.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    client = talk(service)
    client.send("/v1/chat/completions", request(service), head="idempotency-key: k1\r\n")
    until(lambda: service.service.num_requests == 1, 3)
    assert not service.service.jobs
    yield service, client, lock
    lock.close()


def test_draining_waits_for_who_is_not_admitted_yet(waiting: tuple[InProcess, Talk, sqlite3.Connection]) -> None:
    service, client, lock = waiting
    draining = asyncio.run_coroutine_threadsafe(service.service.drain(), service.loop)  # type: ignore[arg-type]
    until(lambda: service.service.is_draining)
    time.sleep(0.3)
    assert not draining.done()
    lock.execute("ROLLBACK")
    assert client.answer()[0] == 200
    draining.result(2)
    assert service.engine.seen


@pytest.mark.slow
def test_who_could_not_be_admitted_before_the_end_is_told_so(
    waiting: tuple[InProcess, Talk, sqlite3.Connection],
) -> None:
    service, client, _ = waiting
    draining = asyncio.run_coroutine_threadsafe(service.service.drain(0.2), service.loop)  # type: ignore[arg-type]
    draining.result(2)
    closing = threading.Thread(target=service.close)
    closing.start()
    status, headers, body = client.answer()
    assert (status, json.loads(body)["code"]) == (503, "shutting_down")
    assert int(headers["retry-after"]) >= 1
    assert service.service.num_requests == 0
    closing.join(30)


def test_whatever_waits_for_the_database_at_the_end_is_told_so(
    waiting: tuple[InProcess, Talk, sqlite3.Connection], talk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service, _, _ = waiting
    client = talk(service)
    client.send("/v1/admin/accounts", {"id": "acme", "plan": "free"})
    time.sleep(0.3)
    asyncio.run_coroutine_threadsafe(service.service.drain(0.1), service.loop).result(2)  # type: ignore[arg-type]
    closing = threading.Thread(target=service.close)
    closing.start()
    status, headers, body = client.answer()
    assert (status, json.loads(body)["code"]) == (503, "shutting_down")
    assert int(headers["retry-after"]) >= 1
    closing.join(30)
    assert [each.getMessage() for each in caplog.records if each.exc_info] == []


def test_in_a_drain_the_database_is_not_asked_for_what_a_refusal_says(in_process: Start) -> None:
    """What is refused at the very end is said at once, or not at all."""
    service = in_process(ScriptedEngine())
    service.token = service.mint("limited", limits={"requests_per_minute": 5}).text
    ask(service, "/v1/models")
    asyncio.run_coroutine_threadsafe(service.service.drain(), service.loop).result(2)  # type: ignore[arg-type]
    service.service.admission.books.reader.close()
    status, headers, _ = ask(service, "/v1/chat/completions", request(service))
    assert (status, "x-ratelimit-limit-requests" in headers) == (503, False)


def test_an_engine_that_is_away_is_said_by_readiness_and_by_503(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    paths = ("/health/ready", "/health")  # the second is where vLLM and llama-server are asked
    assert [ask(service, path, authorization="")[0] for path in paths] == [200, 200]
    service.engine.is_ready = False
    for path in paths:
        status, headers, _ = ask(service, path)
        assert (status, headers["retry-after"]) == (503, "2")
    status, headers, answer = chat(service)
    assert (status, answer["code"], headers["retry-after"]) == (503, "engine_not_ready", "2")


# Models, parameters


def test_models_are_listed_with_what_serves_them(service: InProcess) -> None:
    listed = json.loads(ask(service, "/v1/models")[2])
    assert listed["object"] == "list"
    rows = {row["id"]: row for row in listed["data"]}
    assert all(
        row["object"] == "model" and isinstance(row["created"], int) and row["owned_by"] for row in rows.values()
    )
    assert rows["meta-llama-3-8b-instruct"]["served_by"] == service.model
    assert rows["meta-llama-3-8b-instruct"]["price"]["input_usd_per_million"] == "0.15"
    assert "thenlper/gte-large" not in rows
    for name in ("meta-llama-3-8b-instruct", "META-Llama-3-8B-instruct", "smollm2", "mistral-7b-instruct-fp16"):
        status, _, text = ask(service, f"/v1/models/{name}")
        assert status == 200
        assert json.loads(text)["served_by"] == service.model
    status, _, text = ask(service, "/v1/models/gpt-4")
    assert (status, json.loads(text)["code"]) == (404, "model_not_found")


def test_of_the_models_a_token_may_use_no_others_are_listed(service: InProcess) -> None:
    for models in (["META-Llama-3-8B-instruct"], ["smollm2", "mistral-7b-instruct"], ["own"]):
        token = service.mint("some", models=models).text
        listed = json.loads(ask(service, "/v1/models", authorization=f"Bearer {token}")[2])["data"]
        for row in listed:
            sent = request(service, model=row["id"])
            assert ask(service, "/v1/chat/completions", sent, authorization=f"Bearer {token}")[0] == 200
        assert len(listed) == (0 if models == ["own"] else len(models))


def test_of_the_models_a_token_may_not_use_nothing_is_told(service: InProcess) -> None:
    token = f"Bearer {service.mint('some', models=['smollm2']).text}"
    assert ask(service, "/v1/models/smollm2", authorization=token)[0] == 200
    for name, code in (("meta-llama-3-8b-instruct", "permission_denied"), ("meta-llama-3-8b", "model_not_found")):
        sent = request(service, model=name)
        of_chat = ask(service, "/v1/chat/completions", sent, authorization=token)
        of_model = ask(service, f"/v1/models/{name}", authorization=token)
        assert of_chat[0] == of_model[0] == (403 if code == "permission_denied" else 404)
        for _, _, text in (of_chat, of_model):
            assert json.loads(text)["code"] == code
            assert "meta-llama-3-8b-instruct" not in text.decode().replace(f"`{name}`", "")
        assert "price" not in json.loads(of_model[2])


def test_who_asks_for_what_openai_has_elsewhere_is_told_what_to_ask_for(service: InProcess) -> None:
    for path, words in (
        ("/v1/responses", "POST /v1/chat/completions"),
        ("/v1/responses/resp_1", "POST /v1/chat/completions"),
        ("/v1/engines/davinci/completions", "in the body"),
        ("/v1/embeddings", "Only text"),
        ("/v1/other", "GET /openapi.json"),
    ):
        status, _, text = ask(service, path, {})
        assert (status, json.loads(text)["code"]) == (404, "unknown_url")
        assert words in json.loads(text)["message"]


def test_the_model_that_was_asked_for_is_echoed_and_the_one_that_served_is_named(service: InProcess) -> None:
    for stream in (False, True):
        _, headers, answer = chat(service, model="mixtral-8x7b-instruct-fp16", stream=stream)
        assert headers["x-octoai-served-model"] == service.model
        model = events(answer)[0]["model"] if stream else answer["model"]
        assert model == "mixtral-8x7b-instruct-fp16"


def test_what_the_engine_cannot_honour_is_refused_by_name(in_process: Start) -> None:
    service = in_process(ScriptedEngine(refused=("top_k", "logit_bias")))
    for name, value in (("top_k", 5), ("logit_bias", {"1": 5})):
        status, _, answer = chat(service, **{name: value})
        assert (status, answer["code"], answer["param"]) == (400, "unsupported_parameter", name)


def test_what_is_to_be_done_about_it_is_said_and_who_stands_in(in_process: Start) -> None:
    service = in_process(ScriptedEngine(refused=("tools", "top_k")))
    tools = [{"type": "function", "function": {"name": "f"}}]
    _, _, answer = chat(service, tools=tools)
    assert answer["message"] == (
        f"tools: `{service.model}` cannot honour this parameter; ask for a response_format with a json_schema, or "
        "serve a model by another engine (engine_url)"
    )
    _, _, answer = chat(service, model="meta-llama-3-8b-instruct", top_k=5)
    assert answer["message"] == (
        f"top_k: `{service.model}`, which stands in for `meta-llama-3-8b-instruct`, cannot honour this parameter; "
        "leave it out"
    )


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(in_process: Start) -> None:
    service = in_process(ScriptedEngine(context_length=100))
    for stream in (False, True):
        status, _, answer = chat(service, messages=[{"role": "user", "content": "w " * 150}], stream=stream)
        assert (status, answer["code"]) == (400, "context_length_exceeded")
        # The words that clients look for: LiteLLM's ContextWindowExceededError and its fallbacks depend on them.
        assert answer["message"].startswith(
            "This model's maximum context length is 100 tokens, but the prompt has 150 "
        )


@pytest.mark.parametrize("text", ['😀 e\u0301 你好 \u2028 \x00 "quoted" \\ \n [DONE] </script>', "\U0010ffff"])
def test_any_text_comes_back_as_it_was(in_process: Start, text: str) -> None:
    service = in_process(ScriptedEngine(tuple(text)))
    _, _, whole = chat(service)
    _, _, raw = chat(service, stream=True)
    assert raw.isascii()
    assert whole["choices"][0]["message"]["content"] == text
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in events(raw)) == text


def test_the_openai_client_works(service: InProcess) -> None:
    with openai.OpenAI(base_url=service.url + "/v1", api_key=service.token, max_retries=0) as client:
        answer = client.chat.completions.create(model=service.model, messages=MESSAGES)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == "Hello, world!"
        assert answer._request_id.startswith("req_")
        assert service.model in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)  # type: ignore[call-overload]
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.UnprocessableEntityError) as wrong:
            client.chat.completions.create(model=service.model, messages=MESSAGES, temperature=9)  # type: ignore[call-overload]
        assert wrong.value.param == "temperature"


def test_many_clients_at_once_are_all_answered(in_process: Start) -> None:
    service = in_process(ScriptedEngine(("a", 0.01, "b"), num_slots=3))
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda number=number: answers.append(chat(service, stream=number % 2 == 0)[0]))
        for number in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 40
    until(lambda: is_idle(service))
