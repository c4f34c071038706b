"""Clients that leave, or do not read: what becomes of their requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from octoai.server.api import streaming
from octoai.server.engines.base import Generation
from octoai.server.engines.scripted import ScriptedEngine, Step
from tests.running import Start
from tests.talking import LONG, chat, is_idle, metric, request, until


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
