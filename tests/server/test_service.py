"""The HTTP surface, over a real socket and the scripted engine, as clients that behave and that do not see it."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from octoai.server import docs, streaming, tokens
from octoai.server.engines import base
from octoai.server.engines.base import Event, Finished, Generation, Started, Usage
from octoai.server.engines.scripted import ScriptedEngine, Step
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Unavailable
from octoai.server.ledger import Tab
from octoai.server.store import requests
from tests.running import InProcess
from tests.talking import MESSAGES, Talk, ask, chat, events, is_idle, metric, request, until

Start = Callable[..., InProcess]
LONG: Sequence[Step] = tuple(step for _ in range(4000) for step in ("word ", 0.005))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """One for all tests that need nothing special of the engine and count nothing."""
    running = InProcess(ScriptedEngine(), tmp_path_factory.mktemp("service"))
    yield running
    running.close()


@pytest.fixture
def talk() -> Iterator[Callable[[InProcess], Talk]]:
    open_: list[Talk] = []

    def start(service: InProcess) -> Talk:
        open_.append(Talk(service))
        return open_[-1]

    yield start
    for each in open_:
        each.close()


# Who may ask


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


# Bodies


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


# Streams


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


def test_choices_and_prompts_make_one_answer(in_process: Start) -> None:
    service = in_process(ScriptedEngine(lambda generation: (str(generation.text), " and", 0.01, " on"), num_slots=2))
    status, _, text = ask(service, "/v1/completions", {"model": "smollm2", "prompt": ["a b", "c"], "n": 2})
    assert status == 200
    whole = json.loads(text)
    said = ["a b and on", "a b and on", "c and on", "c and on"]
    assert [choice["text"] for choice in whole["choices"]] == said
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["usage"]["prompt_tokens"] == 3
    _, _, text = ask(
        service, "/v1/completions", {"model": "smollm2", "prompt": ["a b", "c"], "n": 2, "stream": True, "echo": True}
    )
    streamed = [""] * 4
    for chunk in events(text):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == ["a b" + said[0], "a b" + said[1], "c" + said[2], "c" + said[3]]


def test_three_streamed_choices_open_and_close_once_each(in_process: Start) -> None:
    service = in_process(ScriptedEngine(("a", 0.01, "b"), num_slots=1))
    _, _, text = chat(service, n=3, stream=True, seed=5)
    read = [chunk["choices"][0] for chunk in events(text)]
    assert sorted(choice["index"] for choice in read if "role" in choice["delta"]) == [0, 1, 2]
    assert sorted(choice["index"] for choice in read if choice["finish_reason"]) == [0, 1, 2]
    assert sorted(generation.seed for generation in service.engine.seen) == [5, 6, 7]
    until(lambda: is_idle(service))


def test_seeds_of_choices_stay_within_64_bits(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    assert chat(service, n=3, seed=2**63 - 2)[0] == 200
    assert sorted(generation.seed for generation in service.engine.seen) == [-(2**63), 2**63 - 2, 2**63 - 1]


def test_what_the_tools_of_a_request_come_to_is_found_out_once_for_all_its_choices(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    num_json = base._num_json
    monkeypatch.setattr(base, "_num_json", lambda value: measured.append(value) or num_json(value))
    service = in_process(ScriptedEngine())
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert chat(service, n=8, tools=[tool])[0] == 200
    assert len(service.engine.seen) == 8
    assert len({generation.num_prompt_bytes for generation in service.engine.seen}) == 1
    assert [value for value in measured if value] == [(tool,)]


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


def test_one_failing_choice_ends_them_all(in_process: Start) -> None:
    def script(generation: Generation) -> Sequence[Step]:
        return ("x", 0.05, EngineFailed("it broke")) if generation.seed == 2 else LONG

    service = in_process(ScriptedEngine(script))
    status, _, answer = chat(service, n=3, seed=1)
    assert (status, answer["code"]) == (502, "engine_failed")
    until(lambda: is_idle(service))


# Clients that leave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("moment", ["before the first token", "in the middle", "queued"])
def test_a_client_that_leaves_frees_its_slot_within_a_second(
    in_process: Start, talk: Any, moment: str, stream: bool, n: int
) -> None:
    script: Sequence[Step] = (30.0, "late") if moment == "before the first token" else LONG
    service = in_process(ScriptedEngine(script, num_slots=1 if moment == "queued" else 3))
    engine = service.engine
    first = talk(service)
    first.send("/v1/chat/completions", request(service, stream=stream, n=1 if moment == "queued" else n))
    until(lambda: engine.running == (1 if moment == "queued" else n), 3)
    if moment == "queued":
        second = talk(service)
        second.send("/v1/chat/completions", request(service, stream=stream, n=n))
        # One request takes no more places than there are slots, however many choices it asks for.
        until(lambda: service.queue.num_waiting == 1, 3)
        assert metric(service, "vllm:num_requests_waiting") == 1
        second.close()
        until(lambda: service.queue.num_waiting == 0)
        assert engine.running == 1
    elif moment == "in the middle" and stream:
        first.until(b"word")
    assert metric(service, "vllm:num_requests_running") == engine.running
    first.close()
    until(lambda: is_idle(service))
    assert metric(service, "vllm:num_requests_running") == metric(service, "vllm:num_requests_waiting") == 0
    assert metric(service, "octoai_requests_aborted_total") == (2 if moment == "queued" else 1)
    assert engine.abandoned >= 1


def test_a_request_with_more_choices_than_places_in_the_queue_is_served(in_process: Start) -> None:
    service = in_process(ScriptedEngine(num_slots=2), max_waiting=1)
    status, _, answer = chat(service, n=9)
    assert status == 200
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello, world!"] * 9


def test_a_client_that_leaves_in_its_body_leaves_nothing(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine())
    client = talk(service)
    client.send("/v1/chat/completions", b'{"model"', head="content-length: 5000\r\n")
    time.sleep(0.1)
    client.close()
    assert chat(service)[0] == 200
    until(lambda: is_idle(service))


def test_what_an_aborted_stream_used_is_counted(in_process: Start, talk: Any) -> None:
    service = in_process(ScriptedEngine(LONG))
    client = talk(service)
    client.send("/v1/chat/completions", request(service, stream=True))
    for _ in range(5):
        client.until(b"word")
    client.close()
    until(lambda: is_idle(service))
    assert metric(service, "vllm:generation_tokens_total") >= 5
    assert metric(service, "vllm:prompt_tokens_total") == 2


def test_a_client_that_stops_reading_holds_up_nobody_else(in_process: Start, talk: Any) -> None:
    def script(generation: Generation) -> Sequence[Step]:
        return ("x" * 20_000,) * 2000 if generation.max_tokens > 100 else ("Hello",)

    service = in_process(ScriptedEngine(script, num_slots=2))
    slow = talk(service)
    slow.send("/v1/chat/completions", request(service, stream=True, max_tokens=100_000))
    slow.until(b"xxxx")
    time.sleep(0.3)
    for _ in range(5):
        began = time.monotonic()
        assert chat(service, max_tokens=5)[0] == 200
        assert time.monotonic() - began < 0.5
    assert service.engine.running == 1  # bounded: the engine waits for its reader, and does not fill the memory
    slow.close()
    until(lambda: is_idle(service))


def test_a_client_that_never_reads_again_is_given_up(
    in_process: Start, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SLOW_READER_SECONDS", 0.3)
    service = in_process(ScriptedEngine(("x" * 20_000,) * 2000))
    slow = talk(service)
    slow.send("/v1/chat/completions", request(service, stream=True, max_tokens=100_000))
    slow.until(b"xxxx")
    until(lambda: service.engine.abandoned == 1, 3)
    until(lambda: is_idle(service))
    until(lambda: not service._server.server_state.connections)


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


# What the operator sees

VLLM_NAMES = (
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
    *("cache_config_info", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
    *(
        f"{name}_{part}"
        for name in (
            *("iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens", "request_params_n"),
            *("request_params_max_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds"),
            *("time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
            *("request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
            "request_num_preemptions",
        )
        for part in ("bucket", "sum", "count")
    ),
)


def test_metrics_have_vllms_names_and_labels(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    chat(service)
    until(lambda: is_idle(service))
    status, headers, text = ask(service, "/metrics", authorization="")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = text.decode().splitlines()
    for name in VLLM_NAMES:
        rows = [line for line in lines if line.startswith(f"vllm:{name}{{")]
        assert rows, name
        assert all(f'model_name="{service.model}"' in row and 'engine="scripted"' in row for row in rows)
    assert metric(service, "vllm:generation_tokens_total") == 5
    assert metric(service, "vllm:prompt_tokens_total") == 2
    assert any('finished_reason="stop"' in line for line in lines)


def test_what_each_api_token_used_is_told_to_operators_alone(in_process: Start) -> None:
    """Whoever asks for the metrics now and then would know how long each request of another account was."""
    service = in_process(ScriptedEngine())
    chat(service)
    until(lambda: is_idle(service))

    def said_to(authorization: str) -> dict[str, Any]:
        text = ask(service, "/metrics", authorization=authorization)[2].decode()
        return {family.name: family.samples for family in text_string_to_metric_families(text)}

    operators = said_to(f"Bearer {service.mint('operator', scopes=('admin',)).text}")
    assert {sample.value for sample in operators["octoai_tokens"]} == {2, 0, 5}
    assert len(operators["octoai_cost_usd"]) == 1
    others = {name for name in operators if name not in ("octoai_tokens", "octoai_cost_usd")}
    for authorization in ("", f"Bearer {service.mint('other', scopes=('inference', 'usage')).text}"):
        found = said_to(authorization)
        assert set(found) == others
        assert not any("token_id" in sample.labels for samples in found.values() for sample in samples)
    status, _, body = ask(service, "/metrics", authorization="Bearer octoai_nobody")
    assert (status, json.loads(body)["code"]) == (401, "invalid_api_key")


def test_no_word_of_an_engine_becomes_a_label(in_process: Start) -> None:
    class Wordy(ScriptedEngine):
        async def _play(self, generation: Generation, prompt_tokens: int) -> AsyncGenerator[Sequence[Event]]:
            yield (Started(prompt_tokens), Finished({0: f"zebra{len(self.seen)}"}, Usage(prompt_tokens)))

    service = in_process(Wordy())
    assert [chat(service)[2]["choices"][0]["finish_reason"] for _ in range(3)] == [*("zebra1", "zebra2", "zebra3")]
    until(lambda: is_idle(service))
    text = ask(service, "/metrics")[2].decode()
    assert "zebra" not in text
    (other,) = [line for line in text.splitlines() if 'finished_reason="other"' in line]
    assert other.endswith(" 3.0")


def test_nothing_that_a_client_sends_becomes_a_label(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    chat(service, model="zebra-model")
    chat(service, model="meta-llama-3-8b-instruct")
    chat(service, no_such_zebra=1, user="zebra", temperature="zebra")
    ask(service, "/zebra/path")
    ask(service, "/v1/models/zebra")
    ask(service, "/v1/models", method="PROPFIND")
    ask(service, "/v1/models", authorization="Bearer zebra", x_request_id="zebra")
    text = ask(service, "/metrics")[2].decode()
    assert "zebra" not in text.lower()
    assert "propfind" not in text.lower()
    assert "meta-llama" not in text


def references(node: Any) -> Iterator[str]:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(value)
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]


def test_the_description_is_openapi_and_whole(service: InProcess) -> None:
    spec = json.loads(ask(service, "/openapi.json", authorization="")[2])
    assert spec["openapi"].startswith("3.1")
    assert {"title", "version"} <= spec["info"].keys()
    for reference in references(spec):
        node = spec
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
    for path, item in spec["paths"].items():
        for method, operation in item.items():
            assert method in {"get", "post", "patch", "delete"}
            assert operation["responses"]
            assert all(answer["description"] for answer in operation["responses"].values())
            named = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        schema = spec["components"]["schemas"][name]
        assert "model" in schema["required"]
        assert {"temperature", "stream", "stop", "n"} <= schema["properties"].keys()
    assert b"<h1>" in ask(service, "/docs")[2]


def test_the_description_is_put_together_once(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for no token, and took 3 ms, in which nothing else went on."""
    paths = ("/docs", "/openapi.json")
    first = [ask(service, path)[2] for path in paths]
    monkeypatch.setattr(docs, "document", None)
    assert [ask(service, path)[2] for path in paths] == first


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
