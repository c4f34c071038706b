"""Counting the tokens of a prompt before it is read: as the engine will count them, or not at all."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octoai.server.engines.base import Delta, Event, Finished, Generation, Started
from octoai.server.engines.openai.dialects import DIALECTS
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import BadRequest, EngineFailed, Refusal, Unavailable
from tests.server.misbehaving import (
    Reply,
    Upstream,
    answers,
    raw,
    run,
    up,
)

CHAT = Generation(
    max_tokens=1, messages=[{"role": "developer", "content": "Hi"}, {"role": "assistant", "content": "A"}]
)
TEXT = Generation(max_tokens=1, text="Hello my")
TOKENS = Generation(max_tokens=1, tokens=[19556, 957, 3])


def by_path(**said: Any) -> Reply:
    """An answer for each path asked for; others are not known."""

    async def reply(upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        path = upstream.requests[-1][0].split()[1].strip("/").replace("-", "_")
        known = path in said
        await answers(200 if known else 404, json.dumps(said.get(path)).encode())(upstream, writer)

    return reply


LLAMA = by_path(apply_template={"prompt": "<Hi>"}, tokenize={"tokens": [1, 2, 3, 4]})
VLLM = by_path(tokenize={"count": 5, "max_model_len": 8, "tokens": []})


def counts(dialect: str, reply: Reply, *asked: Generation) -> tuple[list[int | None], list[tuple[str, Any]]]:
    """The counts of each, and the paths and bodies it took."""
    upstream, counts = Upstream(reply), []

    async def main() -> None:
        async with up(upstream, dialect=dialect) as engine:
            counts.extend([await engine.count_tokens(each) for each in asked])

    run(main())
    posted = [request for request in upstream.requests if request[0].startswith("POST")]
    return counts, [(line.split()[1], json.loads(said)) for line, _, said in posted]


def test_llama_cpp_is_asked_for_the_template_and_the_tokens() -> None:
    numbers, asked = counts("llama.cpp", LLAMA, CHAT, TEXT, TOKENS)
    assert numbers == [4, 4, 3]
    assert [path for path, _ in asked] == ["/apply-template", "/tokenize", "/tokenize"]
    assert [message["role"] for message in asked[0][1]["messages"]] == ["system", "assistant"]
    assert asked[1][1] == {"content": "<Hi>", "add_special": True, "parse_special": True}
    assert asked[2][1]["content"] == "Hello my"


def test_no_grammar_is_made_to_count_tokens() -> None:
    numbers, asked = counts("llama.cpp", LLAMA, replace(CHAT, schema={"type": "object"}))
    assert numbers == [4]
    assert "response_format" not in asked[0][1]


def test_vllm_is_asked_for_the_tokens_of_what_it_would_be_asked_to_continue() -> None:
    numbers, asked = counts("vllm", VLLM, CHAT, TEXT, TOKENS)
    assert numbers == [5, 5, 3]
    assert [path for path, _ in asked] == ["/tokenize", "/tokenize"]
    assert (asked[0][1]["model"], asked[0][1]["continue_final_message"]) == ("up", True)
    assert asked[0][1]["messages"][0]["role"] == "system"
    assert asked[1][1] == {"model": "up", "prompt": "Hello my"}


@pytest.mark.parametrize("dialect", ["openai", "ollama"])
def test_others_are_not_asked(dialect: str) -> None:
    assert counts(dialect, VLLM, CHAT, TEXT, TOKENS) == ([None] * 3, [])


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
def test_a_server_without_such_a_path_cannot_tell(dialect: str) -> None:
    assert counts(dialect, by_path(), CHAT, TEXT)[0] == [None, None]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (answers(400, b'{"error": {"message": "roles must alternate"}}'), BadRequest),
        (answers(500, b"{}"), EngineFailed),
        (answers(503, b"{}"), Unavailable),
        *((answers(200, said), EngineFailed) for said in (b"{}", b"[]", b"5", b"null", b"no", b'{"tokens": 5}')),
        (answers(200, b'{"count": "many", "prompt": 5}'), EngineFailed),
        (raw(b"", 0), EngineFailed),
    ],
)
@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
def test_its_refusals_to_count_become_ours(dialect: str, reply: Reply, kind: type[Refusal]) -> None:
    with pytest.raises(kind):
        counts(dialect, reply, TEXT)


@pytest.mark.parametrize("count", [-500, True, 5.0, "12", 2**31, 1e300])
def test_a_count_that_is_no_number_of_tokens_is_not_believed(count: Any) -> None:
    with pytest.raises(EngineFailed):
        counts("vllm", by_path(tokenize={"count": count}), TEXT)


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
def test_a_server_that_takes_too_long_to_count_cannot_tell(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octoai.server.engines.openai.engine.COUNT_SECONDS", 0.1)
    assert counts(dialect, raw(b"", 30), TEXT)[0] == [None]
    slow = raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", 30)
    assert counts(dialect, slow, TEXT)[0] == [None]


def test_a_long_prompt_has_more_time_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octoai.server.engines.openai.engine.COUNT_SECONDS", 0.1)

    async def slowly(upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        await VLLM(upstream, writer)

    long = Generation(max_tokens=1, text="word " * 200_000)
    assert counts("vllm", slowly, TEXT, long)[0] == [None, 5]


@pytest.mark.parametrize("num_tokens", [700_000, 5_000_000])
def test_all_the_tokens_of_a_long_prompt_may_be_listed(num_tokens: int) -> None:
    listed = b'{"count": %d, "tokens": [%s10]}' % (num_tokens, b"100000," * num_tokens)  # the second: 35 MB
    assert counts("vllm", answers(200, listed), TEXT)[0] == [num_tokens if len(listed) < 32 * 2**20 else None]


IMAGE = {"type": "image_url", "image_url": {"url": "https://a.b/c"}}
IMAGES = Generation(
    max_tokens=1,
    messages=[
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, IMAGE, IMAGE]},
    ],
)


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("numbers", [[], [7], [7] * 1_000_000], ids=len)
def test_of_the_tokens_listed_only_the_number_is_made(dialect: str, numbers: list[int]) -> None:
    counting = DIALECTS[dialect].counting(TEXT, "up")
    assert counting is not None
    next(counting)
    said = json.dumps({"count": len(numbers), "max_model_len": 8, "tokens": numbers}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(StopIteration) as counted:
            counting.send(said)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert counted.value.value == len(numbers)


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
def test_what_stands_for_an_image_is_not_taken_for_its_tokens(dialect: str) -> None:
    texts = Generation(max_tokens=1, messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    said = by_path(apply_template={"prompt": "<Hi>"}, tokenize={"count": 4, "tokens": [1, 2, 3, 4]})
    numbers, asked = counts(dialect, said, texts, IMAGES)
    assert numbers == [4, None]
    if dialect == "llama.cpp":  # which is not even sent the images
        assert asked == counts(dialect, said, texts)[1]


@pytest.mark.parametrize(("with_images", "expected"), [(1200, 1200), (4 + 64, 68), (4 + 2 * 8, None)])
def test_images_that_vllm_counts_as_what_they_are_read_as_are_counted(with_images: int, expected: int | None) -> None:
    async def reply(upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        count = with_images if b"image_url" in upstream.requests[-1][2] else 4
        await answers(200, json.dumps({"count": count, "tokens": []}).encode())(upstream, writer)

    numbers, asked = counts("vllm", reply, IMAGES)
    assert numbers == [expected]
    words = [message["content"] for message in asked[-1][1]["messages"]]
    assert words == ["Hi", [{"type": "text", "text": text} for text in ("Hi", "", "")]]


def test_a_server_that_is_not_there_counts_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        engine = OpenAIEngine(f"unix:{tmp_path / 's'}", model="up", dialect="vllm")
        with pytest.raises(Unavailable):
            await engine.count_tokens(TEXT)
        await engine.close()

    run(main())


def test_a_scripted_engine_counts_as_it_reports() -> None:
    async def main() -> None:
        engine = ScriptedEngine(num_late_tokens=2)
        for each in (CHAT, TEXT, TOKENS):
            events = [event async for batch in engine.generate(each) for event in batch]
            assert isinstance(events[-1], Finished)
            assert await engine.count_tokens(each) == events[-1].usage.prompt_tokens
        told: list[Sequence[Event]] = []
        async with aclosing(engine.generate(Generation(max_tokens=9, text="a b"), told.append)) as batches:
            await anext(batches)
        assert told == [(Started(2), Delta(0, "", 3))]

    run(main())
