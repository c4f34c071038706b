"""A brief request that its client leaves: it comes to its end, is billed, and is there for a retry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import pytest

from octoai.server.api import streaming
from octoai.server.engines.openai.engine import OpenAIEngine
from tests.running import InProcess
from tests.server.keyed import rows
from tests.server.misbehaving import InThread, Upstream
from tests.talking import Talk, metric, request, until

PATH = "/v1/chat/completions"
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
ANSWER = {"choices": [CHOICE], "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}}
Start = Callable[..., InProcess]
Ask = Callable[..., Talk]
KEY = "idempotency-key: one\r\n"


class Held(Upstream):
    """Answers as a whole, once it may."""

    def __init__(self) -> None:
        super().__init__(self._reply)
        self.may_answer = asyncio.Event()

    async def _reply(self, _: Upstream, writer: asyncio.StreamWriter) -> None:
        await self.may_answer.wait()
        said = json.dumps(ANSWER).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)

    @property
    def num_asked(self) -> int:
        return sum(line.startswith("POST") for line, _, _ in self.requests)


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


def reaches(held: InThread) -> None:
    until(lambda: held.upstream.num_generating > 0, 3)


def outcomes(service: InProcess) -> list[str | None]:
    return [row.outcome for row in rows(service)]


def release(held: InThread) -> None:
    assert isinstance(held.upstream, Held)
    held.loop.call_soon_threadsafe(held.upstream.may_answer.set)


def served(in_process: Start, held: InThread, **options: int) -> InProcess:
    return in_process(OpenAIEngine(held.url, model="up", dialect="vllm", **options))


def test_it_comes_to_its_end_and_is_billed(held: InThread, in_process: Start, ask: Ask) -> None:
    service = served(in_process, held)
    client = ask(service)
    reaches(held)
    client.close()
    until(lambda: metric(service, "octoai_requests_aborted_total") == 0 and len(service.service.jobs) == 1, 3)
    release(held)
    until(lambda: not service.service.jobs, 3)
    until(lambda: outcomes(service) == ["finished"], 3)
    (row,) = rows(service)
    assert (row.prompt_tokens, row.completion_tokens) == (4, 3)
    assert metric(service, "octoai_requests_aborted_total") == 0


def test_its_retry_under_a_key_has_its_answer(held: InThread, in_process: Start, ask: Ask) -> None:
    service = served(in_process, held)
    client = ask(service, KEY)
    reaches(held)
    client.close()
    again = ask(service, KEY)
    release(held)
    status, headers, body = again.answer()
    assert (status, headers["idempotent-replayed"]) == (200, "true")
    assert json.loads(body)["choices"][0]["message"]["content"] == "Hello"
    until(lambda: outcomes(service) == ["finished"], 3)
    assert isinstance(held.upstream, Held)
    assert held.upstream.num_asked == 1


def test_one_that_still_waits_for_its_turn_is_not_begun(held: InThread, in_process: Start, ask: Ask) -> None:
    service = served(in_process, held, num_slots=1)
    first = ask(service)
    reaches(held)
    second = ask(service)
    until(lambda: service.queue.num_waiting == 1, 3)
    second.close()
    until(lambda: service.queue.num_waiting == 0, 3)
    release(held)
    assert first.answer()[0] == 200
    until(lambda: not service.service.jobs, 3)
    assert isinstance(held.upstream, Held)
    assert held.upstream.num_asked == 1


@pytest.mark.parametrize("more", [{"max_tokens": 33}, {"stream": True}, {"n": 2}, {"prompt_bytes": 17_000}])
def test_others_end_with_their_client(held: InThread, in_process: Start, ask: Ask, more: dict[str, object]) -> None:
    service = served(in_process, held)
    if size := more.pop("prompt_bytes", 0):
        more["messages"] = [{"role": "user", "content": "x" * int(str(size))}]
    client = ask(service, **more)
    reaches(held)
    client.close()
    until(lambda: held.upstream.num_generating == 0 and not service.service.jobs, 3)


def test_it_does_not_go_on_for_long(
    held: InThread, in_process: Start, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "RUN_ON_SECONDS", 0.1)
    service = served(in_process, held)
    client = ask(service)
    reaches(held)
    client.close()
    until(lambda: held.upstream.num_generating == 0 and not service.service.jobs, 3)
    until(lambda: metric(service, "octoai_requests_aborted_total") == 1, 3)


def test_when_its_first_token_was_there_is_not_said(held: InThread, in_process: Start, ask: Ask) -> None:
    service = served(in_process, held)
    release(held)
    assert ask(service).answer()[0] == 200
    until(lambda: metric(service, "vllm:e2e_request_latency_seconds_count") == 1, 3)
    assert metric(service, "vllm:request_inference_time_seconds_count") == 1
    for name in ("time_to_first_token", "time_per_output_token", "request_decode_time"):
        assert metric(service, f"vllm:{name}_seconds_count") == 0
