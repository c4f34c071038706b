"""The `openai` client, sync and async, as an OpenAI user has it, with only the base URL changed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from pydantic import BaseModel, Field

from tests.running import Serve

pytestmark = [pytest.mark.compat, pytest.mark.model, pytest.mark.anyio]

MODEL = "meta-llama-3-8b-instruct"
CHAT = [{"role": "user", "content": "Write a blog about Seattle"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def client(served: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.token, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(served: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.token, max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 12
    assert answer._request_id


def test_stream_with_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=12, temperature=0, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Hi"}]
    with client.chat.completions.stream(model=MODEL, messages=question, max_tokens=200, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


async def test_async_chat(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content


async def test_async_stream(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=12, temperature=0, stream=True
    )
    text = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(text).strip()


def test_completions_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello my", max_tokens=4, temperature=0, logprobs=2)
    assert answer.choices[0].text
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs) == 4
    streamed = client.completions.create(model=MODEL, prompt="Hello my", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed)


def test_structured_output(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: str = Field(max_length=20)  # bounded, or a small model may go on until max_tokens
        is_rainy: bool

    answer = client.chat.completions.parse(
        model=MODEL, messages=CHAT, max_tokens=200, temperature=0, response_format=City
    )
    message = answer.choices[0].message
    assert message.parsed is not None
    assert json.loads(message.content)["is_rainy"] == message.parsed.is_rainy


def test_models(client: openai.OpenAI) -> None:
    ids = {model.id for model in client.models.list()}
    assert {"smollm2-135m-instruct", MODEL} <= ids
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "no-such-model"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.UnprocessableEntityError, "temperature"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.BadRequestError, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ],
)
def test_errors_arrive_typed(client: openai.OpenAI, change: dict, error: type, param: str) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "max_tokens": 4, **change})
    assert raised.value.param == param
    assert raised.value.request_id


def test_a_wrong_token_is_an_authentication_error(served: Serve) -> None:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
