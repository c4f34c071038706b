"""LlamaIndex's OctoAI integration 0.7.0, as published, with our distribution in place of the original SDK."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from tests.running import Serve

pytestmark = [
    pytest.mark.compat,
    pytest.mark.model,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]

MODEL = "meta-llama-3-8b-instruct"


@pytest.fixture
def llm(served: Serve, monkeypatch: pytest.MonkeyPatch) -> Any:
    from llama_index.llms.octoai import OctoAI

    monkeypatch.setenv("OCTOAI_BASE_URL", served.url)
    return OctoAI(model=MODEL, token=served.token, max_tokens=20, temperature=0.0)


def messages() -> list[Any]:
    from llama_index.core.base.llms.types import ChatMessage, MessageRole

    return [
        ChatMessage(role=MessageRole.SYSTEM, content="You are a poet."),
        ChatMessage(role=MessageRole.USER, content="Write a blog about Seattle"),
    ]


def test_our_distribution_satisfies_what_it_requires() -> None:
    assert importlib.metadata.version("llama-index-llms-octoai") == "0.7.0"
    required = importlib.metadata.requires("llama-index-llms-octoai") or []
    assert any(line.startswith("octoai<2") or line.startswith("octoai>=") for line in required)
    assert importlib.metadata.version("octoai").startswith("1.")


def test_complete(llm: Any) -> None:
    answer = llm.complete("Write a blog about Seattle")
    assert len(answer.text.split()) > 5
    assert answer.raw["usage"]


def test_stream_complete(llm: Any) -> None:
    parts = list(llm.stream_complete("Write a blog about Seattle"))
    assert len(parts) > 5
    assert "".join(part.delta for part in parts) == parts[-1].text


def test_chat(llm: Any) -> None:
    answer = llm.chat(messages())
    assert answer.message.role.value == "assistant"
    assert len(answer.message.content.split()) > 5


def test_stream_chat(llm: Any) -> None:
    parts = list(llm.stream_chat(messages()))
    assert len(parts) > 5
    assert "".join(part.delta for part in parts) == parts[-1].message.content
