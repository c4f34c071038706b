"""A brief request to a quick engine, which is asked for the whole answer; also when its client leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from octoai.server.admission import Admission
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.store.requests import RequestRow
from tests.running import InProcess
from tests.server.keyed import rows
from tests.server.misbehaving import WHOLE, InThread, Upstream, says
from tests.talking import Talk, metric, request, until

PATH = "/v1/chat/completions"
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
ANSWER = {"choices": [CHOICE], "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}}
Start = Callable[..., InProcess]
Ask = Callable[..., Talk]


class Held(Upstream):
    """Answers as a whole, once it may."""

    def __init__(self) -> None:
        super().__init__(self._reply)
        self.may_answer = asyncio.Event()

    async def _reply(self, _: Upstream, writer: asyncio.StreamWriter) -> None:
        await self.may_answer.wait()
        said = json.dumps(ANSWER).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)


@pytest.fixture
def held() -> Iterator[InThread]:
    running = InThread(Held())
    yield running
    running.close()


@pytest.fixture
def ask(talk: Callable[[InProcess], Talk]) -> Callable[..., Talk]:
    """Sends a request on a connection of its own."""

    def sent(service: InProcess, head: str = "", **params: object) -> Talk:
        client = talk(service)
        client.send(PATH, request(service, **{"max_tokens": 8, **params}), head=head)
        return client

    return sent


def release(held: InThread) -> None:
    assert isinstance(held.upstream, Held)
    held.loop.call_soon_threadsafe(held.upstream.may_answer.set)


@pytest.fixture
def service(in_process: Start, held: InThread, ask: Ask) -> InProcess:
    """Its engine has answered quickly before."""
    reply, held.upstream.reply = held.upstream.reply, says(*WHOLE)
    service = in_process(OpenAIEngine(held.url, model="up", dialect="vllm"))
    assert ask(service).answer()[0] == 200
    held.upstream.reply = reply
    return service


def settled(service: InProcess) -> RequestRow:
    """The one after that."""
    until(lambda: not service.service.jobs and [row.status for row in rows(service)] == ["settled", "settled"], 3)
    return rows(service)[-1]


def test_it_is_billed_as_it_came(service: InProcess, held: InThread, ask: Ask) -> None:
    release(held)
    status, _, body = ask(service).answer()
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "Hello")
    row = settled(service)
    assert (row.outcome, row.prompt_tokens, row.completion_tokens) == ("finished", 4, 3)


def test_its_client_leaves_and_it_is_billed_where_it_comes_in_a_moment(
    service: InProcess, held: InThread, ask: Ask
) -> None:
    client = ask(service)
    until(lambda: held.upstream.num_generating == 1, 3)
    client.close()
    time.sleep(0.1)
    assert held.upstream.num_generating == 1
    release(held)
    row = settled(service)
    assert (row.prompt_tokens, row.completion_tokens) == (4, 3)


def test_its_client_leaves_and_its_slot_is_free_within_a_second(service: InProcess, held: InThread, ask: Ask) -> None:
    client = ask(service)
    until(lambda: held.upstream.num_generating == 1, 3)
    client.close()
    until(lambda: held.upstream.num_generating == 0 and service.queue.num_running == 0, 1.2)
    until(lambda: metric(service, "octoai_requests_aborted_total") == 1, 3)


def test_when_its_first_token_was_there_is_not_said(service: InProcess, held: InThread, ask: Ask) -> None:
    names = ("time_to_first_token_seconds", "request_decode_time_seconds", "time_per_output_token_seconds")

    def counts() -> list[float]:
        return [metric(service, f"vllm:{name}_count") for name in names]

    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 1, 3)
    before = counts()
    release(held)
    assert ask(service).answer()[0] == 200
    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 2, 3)
    assert metric(service, "vllm:request_inference_time_seconds_count") == 2
    assert counts() == before


def test_a_client_that_left_before_it_was_admitted_has_nothing_asked_for(
    service: InProcess, held: InThread, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = Admission.admit

    async def slowly(*given: Any, **named: Any) -> Any:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(0.3)
        return await admit(*given, **named)

    monkeypatch.setattr(Admission, "admit", slowly)
    client = ask(service)
    time.sleep(0.1)
    num_asked = len(held.upstream.requests)
    client.close()
    until(lambda: metric(service, "octoai_requests_aborted_total") == 1, 3)
    assert len(held.upstream.requests) == num_asked


def test_tokens_are_counted_by_iteration_however_they_come(service: InProcess, held: InThread, ask: Ask) -> None:
    release(held)
    assert ask(service).answer()[0] == 200
    name = "vllm:time_to_first_token_seconds_count"
    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 2, 3)
    before = metric(service, name)
    held.upstream.reply = says(b"".join(WHOLE))
    ask(service, stream=True).until(b"[DONE]")
    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 3, 3)
    assert metric(service, "vllm:iteration_tokens_total_sum") == 2 + 3 + 2
    assert metric(service, name) == before + 1  # somebody saw it, also where it came with all others


def test_choices_that_each_come_in_one_are_counted_once(service: InProcess, held: InThread, ask: Ask) -> None:
    release(held)
    assert ask(service, n=3).answer()[0] == 200
    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 2, 3)
    assert (
        metric(service, "vllm:iteration_tokens_total_sum") == metric(service, "vllm:generation_tokens_total") == 2 + 9
    )


def test_choices_after_one_of_a_single_token_are_counted_by_iteration_too(
    service: InProcess, held: InThread, ask: Ask
) -> None:
    counts = iter([1, 3, 3])

    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        usage = {"prompt_tokens": 4, "completion_tokens": next(counts)}
        said = json.dumps({**ANSWER, "usage": usage}).encode()
        await asyncio.sleep(0.02 * usage["completion_tokens"])  # the single one is there first
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)

    held.upstream.reply = reply
    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 1, 3)
    gaps = metric(service, "vllm:inter_token_latency_seconds_count")
    assert ask(service, n=3).answer()[0] == 200
    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 2, 3)
    assert (
        metric(service, "vllm:iteration_tokens_total_sum") == metric(service, "vllm:generation_tokens_total") == 2 + 7
    )
    assert metric(service, "vllm:inter_token_latency_seconds_count") == gaps
