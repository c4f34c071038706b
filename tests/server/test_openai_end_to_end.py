"""The whole service before a server of somebody else's that misbehaves."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from octoai.server import app
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.engines.openai.exchange import Pool
from octoai.server.settings import Settings
from tests.running import InProcess
from tests.server.misbehaving import (
    InThread,
    Upstream,
    answers,
    event,
    forever,
    says,
)
from tests.talking import Talk, chat, events, metric, request, until


@pytest.fixture
def upstream() -> Iterator[InThread]:
    running = InThread(Upstream())
    yield running
    running.close()


def test_a_key_that_comes_from_a_file_goes_without_its_line_break(
    upstream: InThread, in_process: Callable[..., InProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "the-key\n")
    model = {"id": "far", "engine_url": upstream.url, "engine_key_env": "FAR_KEY"}
    settings = Settings.model_validate({"data_dir": tmp_path, "cache_dir": tmp_path, "models": [model]})
    (deployment,) = app.router(settings, app.catalogue(settings), {}).deployments
    assert chat(in_process(deployment.engine))[0] == 200
    assert {headers["authorization"] for _, headers, _ in upstream.upstream.requests} == {"Bearer the-key"}


def test_the_service_passes_on_and_breaks_off_as_its_engine_does(
    upstream: InThread, in_process: Callable[..., InProcess]
) -> None:
    service = in_process(OpenAIEngine(upstream.url, model="up", dialect="vllm"))
    _, _, answer = chat(service)
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["usage"]["prompt_tokens"] == 4
    _, _, text = chat(service, stream=True, stream_options={"include_usage": True})
    assert events(text)[-1]["usage"]["completion_tokens"] == 2

    upstream.upstream.reply = says(event("a"), 0.05, end=False)
    status, _, answer = chat(service)
    assert (status, answer["code"]) == (502, "engine_failed")
    client = Talk(service)
    client.send("/v1/chat/completions", request(service, stream=True))
    said = client.rest()
    client.close()
    assert b'"content":"a"' in said
    assert json.loads(said.rpartition(b"data: ")[2].split(b"\n\n")[0])["error"]["code"] == "engine_failed"
    assert not said.endswith(b"0\r\n\r\n")

    for reply, expected in (
        (answers(429, b"{}"), 503),
        (answers(500, b"{}"), 502),
        (answers(400, b'{"error": {"message": "no"}}'), 400),
    ):
        upstream.upstream.reply = reply
        for stream in (False, True):
            assert chat(service, stream=stream)[0] == expected
    assert service.queue.num_running == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_other_servers_slot_too(
    upstream: InThread, in_process: Callable[..., InProcess], stream: bool
) -> None:
    upstream.upstream.reply = forever
    service = in_process(OpenAIEngine(upstream.url, model="up", dialect="vllm"))
    client = Talk(service)
    client.send("/v1/chat/completions", request(service, stream=stream))
    until(lambda: upstream.upstream.num_generating == 1, 3)
    time.sleep(0.1)
    client.close()
    until(lambda: upstream.upstream.num_generating == 0)
    until(lambda: service.queue.num_running == 0)
    assert metric(service, "octoai_requests_aborted_total") == 1


class Resetting(Upstream):
    """Keeps connections open, and resets each when a second generation comes on it, without a byte of an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.served: set[asyncio.StreamWriter] = set()
        self.num_resets = 0

    def is_last(self, line: str) -> bool:
        return False

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer in self.served:
            self.num_resets += 1
            writer.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
            raise ConnectionResetError
        self.served.add(writer)
        await self.reply(self, writer)


def test_a_kept_connection_that_is_reset_costs_no_request(in_process: Callable[..., InProcess]) -> None:
    upstream = Resetting()
    running = InThread(upstream)
    try:
        service = in_process(OpenAIEngine(running.url, model="up", dialect="vllm"))
        assert [chat(service)[0] for _ in range(6)] == [200] * 6
        assert upstream.num_resets > 0
    finally:
        running.close()


def test_a_body_that_nobody_read_is_not_taken_for_the_next_answer() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(asyncio.IncompleteReadError):
            while path := (await reader.readuntil(b"\r\n\r\n")).split()[1]:
                writer.write(b"HTTP/1.1 404 X\r\ncontent-length: %d\r\n\r\n%b" % (len(path), path))

    async def ask() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with closing(pool), closing(server):
            with closing(pool.exchange("GET", "/first")) as exchange:
                assert await exchange.answered(5) == 404
            with closing(pool.exchange("GET", "/second")) as exchange:
                await exchange.answered(5)
                return await exchange.body(99, 5)

    assert asyncio.run(ask()) == b"/second"
