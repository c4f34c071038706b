"""Only type-checked, never run: the public types, as users meet them.

Each `type: ignore` marks a mistake that a type-checker must find; one that it does not find is itself an error.
"""

from __future__ import annotations

from typing import assert_type

import octoai
from octoai import ApiError, AsyncOctoAI, ChatMessage, OctoAI, Timeout
from octoai.client import InferenceFuture
from octoai.core import RequestOptions
from octoai.environment import OctoAIEnvironment
from octoai.text_gen import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatCompletionResponseFormat,
    CompletionResponse,
    UnprocessableEntityError,
)


def clients() -> None:
    OctoAI()
    OctoAI(api_key="t", timeout=3, base_url="http://localhost", max_retries=0, default_headers={"x": "y"})
    OctoAI(api_key=lambda: "t", timeout=Timeout(connect=1, read=2, total=3, first_token=4, idle=5))
    OctoAI(environment=OctoAIEnvironment(default="http://a", image_gen="http://a", text_gen="http://a"), timeout=None)
    OctoAI("t")  # type: ignore[call-arg, arg-type]
    OctoAI(api_key=3)  # type: ignore[arg-type]
    OctoAI(apikey="t")  # type: ignore[call-arg]
    octoai.core.ApiError(status_code=400, body="x")


def plain(client: OctoAI) -> None:
    messages = [ChatMessage(role="user", content="hi")]
    answer = client.text_gen.create_chat_completion(model="m", messages=messages, max_tokens=3, seed=1, top_k=2)
    assert_type(answer, ChatCompletionResponse)
    assert_type(answer.request_id, str | None)
    options: RequestOptions = {"max_retries": 3, "timeout_in_seconds": 2}
    client.text_gen.create_chat_completion(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        temperature=None,
        tool_choice="none",
        response_format=ChatCompletionResponseFormat(type="json_object", schema={}),
        request_options=options,
        extra_body={"anything": 1},
    )
    client.text_gen.create_chat_completion(model="m", messages=messages, temprature=1)  # type: ignore[call-arg]
    client.text_gen.create_chat_completion(model="m")  # type: ignore[call-arg]
    client.text_gen.create_chat_completion(model="m", messages=messages, max_tokens="3")  # type: ignore[arg-type]
    completion = client.text_gen.create_completion(model="m", prompt="once")
    assert_type(completion, CompletionResponse)
    assert_type(completion.choices[0].text, str)
    client.text_gen.create_completion(model="m", messages=messages)  # type: ignore[call-arg]


def streams(client: OctoAI) -> None:
    for chunk in client.text_gen.create_chat_completion_stream(model="m", messages=[]):
        assert_type(chunk, ChatCompletionChunk)
        assert_type(chunk.choices[0].delta.content, str | None)
    with client.text_gen.create_chat_completion_stream(model="m", messages=[]) as stream:
        for text in stream.text():
            assert_type(text, str)
        assert_type(stream.final(), ChatCompletionResponse)
    assert_type(client.text_gen.create_completion_stream(model="m").final(), CompletionResponse)
    client.text_gen.create_chat_completion_stream(model="m", messages=[], stream=True)  # type: ignore[call-arg]


def inference(client: OctoAI) -> None:
    future = client.infer_async("http://localhost/x", {"a": 1})
    assert_type(future, InferenceFuture)
    assert_type(client.is_future_ready(future), bool)
    assert_type(client.health_check("http://localhost/x", timeout=3), int)


async def asynchronous() -> None:
    async with AsyncOctoAI(timeout=3) as client:
        answer = await client.text_gen.create_chat_completion(model="m", messages=[])
        assert_type(answer, ChatCompletionResponse)
        async for chunk in client.text_gen.create_chat_completion_stream(model="m", messages=[]):
            assert_type(chunk, ChatCompletionChunk)
        async with client.text_gen.create_completion_stream(model="m", prompt="p") as stream:
            async for text in stream.text():
                assert_type(text, str)
            assert_type(await stream.final(), CompletionResponse)
        await client.text_gen.create_completion(model="m", promt="p")  # type: ignore[call-arg]
        assert_type(await client.infer_async("http://localhost/x", {}), InferenceFuture)


def errors() -> None:
    try:
        OctoAI()
    except ApiError as error:
        assert_type(error.status_code, int | None)
        assert_type(error.retry_after, float | None)
    UnprocessableEntityError({"detail": []})
    ApiError(400, "x")  # type: ignore[call-arg]
