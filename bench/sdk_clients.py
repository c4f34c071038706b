"""How each SDK is called: one adapter per shape of interface, the same four methods on all.

Imported by `sdk_driver` in an SDK's own environment, so each adapter imports its SDK when it is made. What a stream
yields here is the text of the object that the SDK yielded, and nothing is done to it in between.
"""

import importlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

MESSAGES = [
    {"role": "system", "content": "Below is an instruction that describes a task."},
    {"role": "user", "content": "Write a blog about Seattle"},
]


class Octoai:
    """octoai 1.11 and ours have the same interface; only how to say where the service is differs."""

    def __init__(self, url: str) -> None:
        from octoai.client import AsyncOctoAI, OctoAI
        from octoai.text_gen import ChatMessage

        where = self.where(url)
        self.now, self.later = OctoAI(api_key="bench", **where), AsyncOctoAI(api_key="bench", **where)
        self.messages = [ChatMessage(**message) for message in MESSAGES]

    def where(self, url: str) -> dict[str, Any]:
        from octoai.environment import OctoAIEnvironment

        return {"environment": OctoAIEnvironment(default=url, image_gen=url, text_gen=url)}

    def ask(self) -> str:
        answer = self.now.text_gen.create_chat_completion(model="bench", messages=self.messages, max_tokens=150)
        return answer.choices[0].message.content

    def stream(self, model: str) -> Iterator[str | None]:
        generation = self.now.text_gen
        for chunk in generation.create_chat_completion_stream(model=model, messages=self.messages, max_tokens=150):
            yield chunk.choices[0].delta.content

    async def ask_async(self) -> str:
        generation = self.later.text_gen
        answer = await generation.create_chat_completion(model="bench", messages=self.messages, max_tokens=150)
        return answer.choices[0].message.content

    async def stream_async(self, model: str) -> AsyncIterator[str | None]:
        stream = self.later.text_gen.create_chat_completion_stream
        async for chunk in stream(model=model, messages=self.messages, max_tokens=150):
            yield chunk.choices[0].delta.content


class Ours(Octoai):
    def where(self, url: str) -> dict[str, Any]:
        return {"base_url": url}


class OpenaiShaped:
    """openai, groq, together: `client.chat.completions.create`."""

    def __init__(self, url: str, module: str, names: tuple[str, str], suffix: str = "") -> None:
        made_from = importlib.import_module(module)
        now, later = (getattr(made_from, name) for name in names)
        self.now = now(api_key="bench", base_url=url + suffix)
        self.later = later(api_key="bench", base_url=url + suffix)

    def ask(self) -> str:
        answer = self.now.chat.completions.create(model="bench", messages=MESSAGES, max_tokens=150)
        return answer.choices[0].message.content

    def stream(self, model: str) -> Iterator[str | None]:
        create = self.now.chat.completions.create
        for chunk in create(model=model, messages=MESSAGES, max_tokens=150, stream=True):
            yield chunk.choices[0].delta.content

    async def ask_async(self) -> str:
        answer = await self.later.chat.completions.create(model="bench", messages=MESSAGES, max_tokens=150)
        return answer.choices[0].message.content

    async def stream_async(self, model: str) -> AsyncIterator[str | None]:
        create = self.later.chat.completions.create
        async for chunk in await create(model=model, messages=MESSAGES, max_tokens=150, stream=True):
            yield chunk.choices[0].delta.content


class Anthropic:
    """`messages.create(stream=True)`: its raw events, the cheaper of its two ways."""

    def __init__(self, url: str) -> None:
        import anthropic

        self.now = anthropic.Anthropic(api_key="bench", base_url=url)
        self.later = anthropic.AsyncAnthropic(api_key="bench", base_url=url)
        self.call = {"system": MESSAGES[0]["content"], "messages": MESSAGES[1:], "max_tokens": 150}

    def ask(self) -> str:
        return self.now.messages.create(model="bench", **self.call).content[0].text

    def stream(self, model: str) -> Iterator[str | None]:
        for event in self.now.messages.create(model=model, stream=True, **self.call):
            if event.type == "content_block_delta":
                yield event.delta.text

    async def ask_async(self) -> str:
        return (await self.later.messages.create(model="bench", **self.call)).content[0].text

    async def stream_async(self, model: str) -> AsyncIterator[str | None]:
        async for event in await self.later.messages.create(model=model, stream=True, **self.call):
            if event.type == "content_block_delta":
                yield event.delta.text


class Ollama:
    """A JSON object per line, at `/api/chat`."""

    def __init__(self, url: str) -> None:
        import ollama

        self.now, self.later = ollama.Client(host=url), ollama.AsyncClient(host=url)

    def ask(self) -> str:
        return self.now.chat(model="bench", messages=MESSAGES).message.content

    def stream(self, model: str) -> Iterator[str | None]:
        for part in self.now.chat(model=model, messages=MESSAGES, stream=True):
            yield part.message.content

    async def ask_async(self) -> str:
        return (await self.later.chat(model="bench", messages=MESSAGES)).message.content

    async def stream_async(self, model: str) -> AsyncIterator[str | None]:
        async for part in await self.later.chat(model=model, messages=MESSAGES, stream=True):
            yield part.message.content


class Mistralai:
    def __init__(self, url: str) -> None:
        from mistralai.client import Mistral

        self.client = Mistral(api_key="bench", server_url=url)

    def ask(self) -> str:
        answer = self.client.chat.complete(model="bench", messages=MESSAGES, max_tokens=150)
        return answer.choices[0].message.content

    def stream(self, model: str) -> Iterator[str | None]:
        for event in self.client.chat.stream(model=model, messages=MESSAGES, max_tokens=150):
            yield event.data.choices[0].delta.content

    async def ask_async(self) -> str:
        answer = await self.client.chat.complete_async(model="bench", messages=MESSAGES, max_tokens=150)
        return answer.choices[0].message.content

    async def stream_async(self, model: str) -> AsyncIterator[str | None]:
        async for event in await self.client.chat.stream_async(model=model, messages=MESSAGES, max_tokens=150):
            yield event.data.choices[0].delta.content


CLIENTS: dict[str, Callable[[str], Any]] = {
    "ours": Ours,
    "octoai": Octoai,
    "openai": lambda url: OpenaiShaped(url, "openai", ("OpenAI", "AsyncOpenAI"), "/v1"),
    "groq": lambda url: OpenaiShaped(url, "groq", ("Groq", "AsyncGroq")),
    "together": lambda url: OpenaiShaped(url, "together", ("Together", "AsyncTogether"), "/v1"),
    "anthropic": Anthropic,
    "ollama": Ollama,
    "mistralai": Mistralai,
}
