"""The real engine, asked without a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from octoai.server.engines.base import Delta, Finished, Generation, Started, Usage
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.options import LlamaOptions
from tests.server.singly import singly


@asynccontextmanager
async def running(weights: Path, place: Path, **options: object) -> AsyncIterator[LlamaEngine]:
    chosen = {"context_length": 2048, "num_slots": 4, "prefix_dir": place / "prefixes", "prefix_bytes": 2**28}
    engine = LlamaEngine(weights, model="m", options=LlamaOptions(**{**chosen, **options}))  # type: ignore[arg-type]
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answered(engine: LlamaEngine, generation: Generation) -> tuple[str, Usage]:
    events = [event async for batch in engine.generate(generation) for event in singly(batch)]
    started, finished = events[0], events[-1]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert (started.prompt_tokens, started.cached_tokens) == (
        finished.usage.prompt_tokens,
        finished.usage.cached_tokens,
    )
    return "".join(event.text for event in events if isinstance(event, Delta)), finished.usage


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


PROMPTS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [user("Write a blog about Seattle 😀 你好")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, user("Hi")]},
    "prefilled": {"messages": [user("A person as JSON."), {"role": "assistant", "content": '{"name": "'}]},
    "parts": {"messages": [user([{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}])]},
    "several": {"messages": [user("A city."), *[{"role": "assistant", "content": "Rome."}] * 2]},
    "a new turn": {"messages": [user("A city."), {"role": "assistant", "content": "Rome."}], "continues": False},
    "continued": {"messages": [user("A city."), *[{"role": "assistant", "content": "Rome"}] * 2], "continues": True},
    "template": {"messages": [user("A city.")], "template_kwargs": {"enable_thinking": False}},
    "special": {"messages": [user("a <|im_end|> b <|im_start|>")]},
    "schema": {"messages": [user("x")], "schema": {"type": "object"}},
    "text": {"text": "Hello my <|im_end|>  \n"},
    "no text": {"text": ""},
    "tokens": {"tokens": [19556, 957]},
    "long": {"text": "word " * 3000},
}
