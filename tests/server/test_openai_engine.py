"""`OpenAIEngine` against a server that misbehaves in every way servers do."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octoai.server.engines import arrivals, openai_http
from octoai.server.engines.base import Delta, Deltas, Event, Finished, Generation, Started, Usage
from octoai.server.engines.exchange import Pool
from octoai.server.engines.openai_http import OpenAIEngine
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Refusal, Unavailable
from tests.running import InProcess
from tests.talking import Talk, chat, events, metric, request, until

GENERATION = Generation(max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
UNSEEN = replace(GENERATION, is_stream=False)  # before its end
MODELS = {"object": "list", "data": [{"id": "up", "object": "model", "max_model_len": 4096}]}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
Reply = Callable[["Upstream", asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str = "", reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}\n\n'
WHOLE = (event("Hel"), event("lo"), event("", "stop"), USAGE, DONE)


def says(*blocks: bytes | float, end: bool = True, head: bytes = HEAD) -> Reply:
    """Events, with pauses in seconds between them; then the end of the body, or only that of the connection."""

    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for block in blocks:
            if isinstance(block, bytes):
                writer.write(chunk(block))
                await writer.drain()
            else:
                await asyncio.sleep(block)
        writer.write(b"0\r\n\r\n" if end else b"")

    return reply


def answers(status: int, body: bytes, *headers: bytes) -> Reply:
    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        lines = b"".join(b"%s\r\n" % header for header in headers)
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%s\r\n%s" % (status, len(body), lines, body))

    return reply


def raw(data: bytes, pause: float = 0) -> Reply:
    async def reply(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await asyncio.sleep(pause)

    return reply


async def forever(upstream: Upstream, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    while True:
        writer.write(chunk(event("word ")))
        await writer.drain()
        await asyncio.sleep(0.01)


class Upstream:
    """Answers /v1/models properly, and every generation with `reply`. Knows who is connected, and what was asked."""

    def __init__(self, reply: Reply | None = None, models: Reply | None = None) -> None:
        self.reply = reply or says(*WHOLE)
        self.models = models or answers(200, json.dumps(MODELS).encode())
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.num_generating = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:])
                raw_lines = dict(line.split(": ", 1) for line in lines[1:])
                headers["authorization"] = next(
                    (value for name, value in raw_lines.items() if name.lower() == "authorization"), ""
                )
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests.append((lines[0], headers, body))
                if lines[0].startswith("GET"):
                    await self.models(self, writer)
                else:
                    await self._generate(reader, writer)
                await writer.drain()
                if self.is_last(lines[0]):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def is_last(self, line: str) -> bool:
        return not line.startswith("GET")

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until it is said, or the other end hangs up."""
        self.num_generating += 1
        replying = asyncio.ensure_future(self.reply(self, writer))
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([replying, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.num_generating -= 1
            for task in (replying, leaving):
                task.cancel()
            await asyncio.gather(replying, leaving, return_exceptions=True)


@asynccontextmanager
async def up(upstream: Upstream, unix: Path | None = None, **options: Any) -> AsyncIterator[OpenAIEngine]:
    if unix is None:
        server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    else:
        server = await asyncio.start_unix_server(upstream.serve, unix)
        url = f"unix:{unix}"
    engine = OpenAIEngine(url, model="up", **{"dialect": "vllm", **options})
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()
        server.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 20))


async def generated(engine: OpenAIEngine, generation: Generation = GENERATION) -> list[Event]:
    async with aclosing(engine.generate(generation)) as batches:
        return [event async for batch in batches for event in batch]


def refused(reply: Reply, kind: type[Refusal], *, after: int = 0, **options: Any) -> Refusal:
    """What becomes of an answer like this, after so many deltas."""
    caught: list[Refusal] = []

    async def main() -> None:
        async with up(Upstream(reply), **options) as engine:
            for generation in (GENERATION, UNSEEN):
                deltas = 0
                with pytest.raises(kind) as raised:
                    async with aclosing(engine.generate(generation)) as batches:
                        async for batch in batches:
                            deltas += num_deltas(batch)
                assert deltas == after
                caught.append(raised.value)

    run(main())
    first, second = caught
    assert first.body() == second.body()
    return first


def num_deltas(batch: Sequence[Event]) -> int:
    return sum(
        1 if isinstance(event, Delta) else len(event.texts) for event in batch if isinstance(event, Delta | Deltas)
    )


@pytest.mark.parametrize("is_unix", [False, True], ids=["http", "unix"])
def test_an_answer_is_read_and_the_key_is_sent(tmp_path: Path, is_unix: bool) -> None:
    async def main() -> None:
        upstream = Upstream()
        async with up(upstream, tmp_path / "s" if is_unix else None, key="Secret-Key", context_length=99) as engine:
            assert engine.is_ready
            assert engine.context_length == 4096  # what the server says, over what was configured
            assert await generated(engine) == [
                Started(0),
                Delta(0, "Hel", 1),
                Delta(0, "lo", 2),
                Finished({0: "stop"}, Usage(4, 0, 2)),
            ]
            text = Generation(max_tokens=1, text="x")
            await generated(engine, text)
        assert [line.split()[:2] for line, _, _ in upstream.requests] == [
            ["GET", "/v1/models"],
            ["POST", "/v1/chat/completions"],
            ["POST", "/v1/completions"],
        ]
        assert {headers["authorization"] for _, headers, _ in upstream.requests} == {"Bearer Secret-Key"}
        asked = json.loads(upstream.requests[1][2])
        assert (asked["model"], asked["stream"]) == ("up", True)

    run(main())


def test_without_a_key_none_is_sent() -> None:
    async def main() -> None:
        upstream = Upstream()
        async with up(upstream) as engine:
            await generated(engine)
        assert {headers["authorization"] for _, headers, _ in upstream.requests} == {""}

    run(main())


@pytest.mark.parametrize("size", [1, 7])
def test_it_does_not_matter_how_bytes_are_cut(size: int) -> None:
    text = b"".join([event("H\u00e9"), b": comment\n\n", b"event: x\r\n", event("\U0001f600"), *WHOLE[2:]])
    text = text.replace(b"\\u00e9", "é".encode()).replace(b"\\ud83d\\ude00", "😀".encode())
    blocks = [text[start : start + size] for start in range(0, len(text), size)]

    async def main() -> None:
        async with up(Upstream(says(*blocks))) as engine:
            said = [event.text for event in await generated(engine) if isinstance(event, Delta)]
            assert said == ["Hé", "😀"]

    run(main())


@pytest.mark.parametrize(
    ("reply", "deltas"),
    [
        (says(event("a"), event("b"), 0.05, end=False), 2),
        (says(event("a"), 0.05, end=True), 1),
        (says(event("a"), event("", "stop"), 0.05, end=True), 1),
        (says(event("a"), 0.05, DONE), 1),
        (says(event("a"), 0.05, b"data: {nonsense\n\n"), 1),
        (says(event("a"), 0.05, b"data: [1]\n\n"), 1),
        (says(event("a"), 0.05, b'data: {"error": {"message": "CUDA out of memory"}}\n\n'), 1),
        (says(event("a"), 0.05, b"data: " + b"x" * 3_000_000), 1),
        (raw(HEAD + chunk(event("a")) + b"zz\r\n", 0.05), 1),
        (raw(b"this is no HTTP at all\r\n\r\n", 0.05), 0),
        (raw(b"", 0.0), 0),
        (says(end=True), 0),
        (answers(200, b"<html>hello</html>"), 0),
        (answers(200, b'{"choices": []}'), 0),
    ],
    ids=[
        *("dies", "ends without [DONE]", "ends without [DONE] but with a reason", "[DONE] without a reason"),
        *("not JSON", "not an object", "an error", "no end of an event", "broken chunks", "not HTTP", "hangs up"),
        *("nothing", "a page", "a whole answer"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(reply: Reply, deltas: int) -> None:
    failure = refused(reply, EngineFailed, after=deltas)
    assert failure.status == 502
    assert "127.0.0.1" not in failure.message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, BadRequest), (422, BadRequest), (429, Unavailable), (503, Unavailable)),
        *((500, EngineFailed), (401, EngineFailed), (404, EngineFailed), (204, EngineFailed)),
    ],
)
def test_its_refusals_become_ours(status: int, kind: type[Refusal]) -> None:
    refused(answers(status, b'{"error": {"message": "no"}}' if status != 204 else b""), kind)


def test_its_word_on_a_prompt_too_long_becomes_ours() -> None:
    message = "This model's maximum context length is 4096 tokens. However, your request has 5000 input tokens."
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}).encode()
    refusal = refused(answers(400, body), ContextLengthExceeded)
    assert "4096" in refusal.message
    assert "5000" in refusal.message


def test_an_endless_error_is_not_read_to_its_end() -> None:
    reply = says(*([b"x" * 60_000] * 3), 30.0, head=HEAD.replace(b"200 OK", b"500 X"))
    began = time.monotonic()
    refused(reply, EngineFailed)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("reply", "deltas"),
    [(raw(b"", 30.0), 0), (raw(HEAD, 30.0), 0), (says(event("a"), 30.0), 1)],
    ids=["before its head", "before its first event", "in the middle"],
)
def test_a_server_that_falls_silent_is_given_up(reply: Reply, deltas: int) -> None:
    began = time.monotonic()
    refused(reply, EngineFailed, after=deltas, stall_seconds=0.3)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("generation", [GENERATION, UNSEEN], ids=["stream", "unseen"])
def test_an_answer_is_whole_at_its_done_also_where_the_body_never_ends(generation: Generation) -> None:
    async def main() -> None:
        async with up(Upstream(says(*WHOLE, 30.0))) as engine:
            began = time.monotonic()
            assert isinstance((await generated(engine, generation))[-1], Finished)
            assert time.monotonic() - began < 2

    run(main())


def slowly(num: int, *end: bytes) -> Reply:
    words = [event(f"{number} ") for number in range(num)]
    return says(*(each for word in words for each in (word, 0.01)), *end)


def test_what_nobody_sees_before_its_end_is_read_in_larger_batches_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrivals, "GATHER_SECONDS", 30.0)  # the end of the answer ends it, and of the connection

    async def main() -> None:
        upstream, sizes = Upstream(slowly(20, event("", "stop"), USAGE, DONE)), []
        async with up(upstream) as engine:
            for generation in (GENERATION, UNSEEN):
                async with aclosing(engine.generate(generation)) as batches:
                    sizes.append([num_deltas(batch) async for batch in batches])
            upstream.reply = slowly(20)
            with pytest.raises(EngineFailed):
                await generated(engine, UNSEEN)
        streamed, unseen = sizes
        assert sum(streamed) == sum(unseen) == 20
        assert len(streamed) > 15
        assert len(unseen) == 2
        assert unseen[0] < 5

    run(main())


@pytest.mark.parametrize("generation", [GENERATION, UNSEEN], ids=["stream", "unseen"])
def test_what_had_come_when_the_engine_broke_off_is_counted(generation: Generation) -> None:
    async def main() -> None:
        left: list[Sequence[Event]] = []
        async with up(Upstream(says(event("a"), 0.05, event("b"), event("c"), end=False))) as engine:
            batches = engine.generate(generation, left.append)
            await anext(batches)
            await asyncio.sleep(0.2)  # the rest, and the end of the connection, are here before they are asked for
            with pytest.raises(EngineFailed):
                async for _ in batches:
                    pass
        assert left == [[Started(0), Delta(0, "", 3)]]

    run(main())


def test_what_was_gathered_when_its_client_left_is_counted() -> None:
    async def main() -> None:
        left: list[Sequence[Event]] = []
        async with up(Upstream(says(event("a"), 0.01, event("b"), event("c"), 30.0))) as engine:
            batches = engine.generate(UNSEEN, left.append)
            await anext(batches)
            reading = asyncio.ensure_future(anext(batches))
            await asyncio.sleep(arrivals.GATHER_SECONDS / 2)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await batches.aclose()
        assert left == [[Started(0), Delta(0, "", 3)]]

    run(main())


def test_leaving_closes_the_connection_within_a_second() -> None:
    async def main() -> None:
        upstream = Upstream(forever)
        async with up(upstream) as engine:
            async with aclosing(engine.generate(GENERATION)) as batches:
                await anext(batches)
                assert upstream.num_generating == 1
            await _soon(lambda: upstream.num_generating == 0)

            upstream.reply = raw(b"", 30.0)  # and before its first byte
            task = asyncio.create_task(generated(engine))
            await _soon(lambda: upstream.num_generating == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await _soon(lambda: upstream.num_generating == 0)

    run(main())


class Unimpressed(Upstream):
    """Ends its answer as if its client were still there, and keeps the connection open."""

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.reply(self, writer)
        await writer.drain()
        await asyncio.sleep(0.5)


def test_a_connection_that_was_hung_up_is_not_used_again_though_its_answer_came_to_an_end() -> None:
    async def main() -> None:
        upstream = Unimpressed(says(event("Hel"), 0.1, event("lo"), event("", "stop"), USAGE, DONE))
        async with up(upstream) as engine:
            async with aclosing(engine.generate(GENERATION)) as batches:
                await anext(batches)
            assert isinstance((await generated(engine))[-1], Finished)

    run(main())


async def _soon(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(1):
        while not fact():
            await asyncio.sleep(0.01)


def test_a_server_that_comes_later_is_found_and_one_that_goes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.1)

    async def main() -> None:
        path = tmp_path / "s"
        engine = OpenAIEngine(f"unix:{path}", model="up")
        await engine.start()
        assert not engine.is_ready
        with pytest.raises(Unavailable) as absent:
            await generated(engine)
        assert absent.value.headers["retry-after"]
        upstream = Upstream()
        server = await asyncio.start_unix_server(upstream.serve, path)
        await _soon(lambda: engine.is_ready)
        assert isinstance((await generated(engine))[-1], Finished)
        server.close()
        path.unlink(missing_ok=True)
        await _soon(lambda: not engine.is_ready)
        await engine.close()

    run(main())


@pytest.mark.parametrize(
    "models",
    [
        *(b"", b"not json", b"[]", b"5", b"null", b'{"data": 5}', b'{"data": [1, null]}', b"{}", b"\xff\xfe"),
        b'{"data": [{"id": "up", "meta": [], "max_model_len": "many"}]}',
        b'{"data": [{"id": "up", "meta": "x"}]}',
        b'{"data": [{"id": "other"}, {"id": "third"}]}',
    ],
)
def test_garbage_about_its_models_harms_nothing(models: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.05)

    async def main() -> None:
        upstream = Upstream(models=answers(200, models))
        async with up(upstream, context_length=77) as engine:
            assert engine.context_length == 77
            await asyncio.sleep(0.12)
            upstream.models = answers(200, json.dumps(MODELS).encode())
            await _soon(lambda: engine.is_ready and engine.context_length == 4096)

    run(main())


def test_a_server_that_accepts_and_says_nothing_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.2)

    async def main() -> None:
        began = time.monotonic()
        async with up(Upstream(models=raw(b"", 30.0))) as engine:
            assert time.monotonic() - began < 2
            assert not engine.is_ready

    run(main())


def test_one_that_wants_another_key_is_not_ready() -> None:
    async def main() -> None:
        async with up(Upstream(models=answers(401, b"{}"))) as engine:
            assert not engine.is_ready

    run(main())


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def main() -> None:
        async with up(Upstream()) as engine:
            assert isinstance((await generated(engine))[-1], Finished)

    run(main())


# Through the whole service


class InThread:
    """The server in a loop of its own, for a service in another."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(upstream.serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self.loop).result(5)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


@pytest.fixture
def upstream() -> Iterator[InThread]:
    running = InThread(Upstream())
    yield running
    running.close()


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
