"""Whether an engine over HTTP is there: asked at the start, and again while it serves."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from octoai.server.engines.base import Finished, Generation
from octoai.server.engines.openai import engine as openai_http
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.errors import Unavailable
from tests.server.misbehaving import (
    MODELS,
    Upstream,
    answers,
    forever,
    generated,
    raw,
    run,
    soon,
    up,
)


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
        await soon(lambda: engine.is_ready)
        assert isinstance((await generated(engine))[-1], Finished)
        server.close()
        path.unlink(missing_ok=True)
        await soon(lambda: not engine.is_ready)
        await engine.close()

    run(main())


@pytest.mark.parametrize(
    "models",
    [
        *(b"", b"not json", b"[]", b"5", b"null", b'{"data": 5}', b'{"data": [1, null]}', b"{}", b"\xff\xfe"),
        b'{"data": [{"id": "up", "meta": [], "max_model_len": "many"}]}',
        b'{"data": [{"id": "up", "meta": "x"}]}',
        *(b'{"data": [{"id": "up", "max_model_len": %s}]}' % said for said in (b"-1", b"true", b"9.5", b"%d" % 2**40)),
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
            await soon(lambda: engine.is_ready and engine.context_length == 4096)

    run(main())


def test_a_server_that_accepts_and_says_nothing_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.2)

    async def main() -> None:
        began = time.monotonic()
        async with up(Upstream(models=raw(b"", 30.0))) as engine:
            assert time.monotonic() - began < 2
            assert not engine.is_ready

    run(main())


def test_a_server_too_busy_with_its_answers_to_list_its_models_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "PROBE_SECONDS", 0.2)

    async def main() -> None:
        upstream = Upstream(forever)
        async with up(upstream) as engine:
            long = Generation(max_tokens=9000, text="x")
            async with aclosing(engine.generate(long, on_text=lambda _: True)) as batches:
                await anext(batches)
                reading = asyncio.ensure_future(anext(batches))
                upstream.models = raw(b"", 30.0)
                for _ in range(20):
                    await asyncio.sleep(0.05)
                    assert engine.is_ready
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            await soon(lambda: not engine.is_ready)

    run(main())


def test_a_server_that_cannot_be_asked_for_want_of_descriptors_is_not_away() -> None:
    async def main() -> None:
        async with up(Upstream(), dialect="llama.cpp") as engine:  # which keeps no connection
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            try:
                assert await engine.connect() is None
                with pytest.raises(Unavailable) as full:
                    await generated(engine)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert full.value.code == "overloaded"
            assert engine.is_ready

    run(main())


def test_one_that_wants_another_key_is_not_ready() -> None:
    async def main() -> None:
        async with up(Upstream(models=answers(401, b"{}"))) as engine:
            assert not engine.is_ready

    run(main())
