"""The interface of an engine: a `Generation` goes in; `Started`, `Delta`s (or `Deltas`) and `Finished` come out.

Engines know neither accounts nor our HTTP API. What one cannot honour it says beforehand (`unsupported`), so that
the request can be refused by name instead of being answered with something else.

None of these values is changed once it is made, but for what it remembers of itself. They are not `frozen`, because to
make one would take three times as long then, and one is made for every token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import orjson

from octoai.server.errors import BadRequest

Message = Mapping[str, Any]
BYTES_PER_TOKEN = 4  # of English, about
LONGEST_CONTEXT = 2**17  # where an engine does not say what it has


@dataclass(slots=True)
class Generation:
    """One prompt to continue, with every sampling parameter decided.

    Exactly one of `messages` (a chat), `text` or `tokens` (a raw prompt: text, or the model's token ids) is set.
    `logprobs` is how many alternatives to report per token (0: only the chosen one), None for none at all.
    `schema` constrains the text to JSON: a JSON Schema, or {} for any object. `top_k` 0 means no limit. `continues`:
    whether the answer is to go on where the last message, which is the assistant's, ends; None where nobody has said.
    `template_kwargs` are for the template that makes a prompt of messages. `slot` is for llama.cpp alone: which of its
    slots is to read it. `is_stream`: somebody reads the answer as it comes; otherwise events may come in larger
    batches, after the first.
    """

    max_tokens: int
    messages: Sequence[Message] | None = None
    continues: bool | None = None
    template_kwargs: Mapping[str, Any] | None = None
    text: str | None = None
    tokens: Sequence[int] | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    schema: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    slot: int | None = None
    is_stream: bool = True
    prompt_bytes: int | None = field(default=None, repr=False, compare=False)  # once somebody has asked

    def with_at_most(self, max_tokens: int, why: str) -> Generation:
        """With no more `max_tokens` than that. Raises BadRequest, which says why, where `min_tokens` are more."""
        if self.min_tokens > max_tokens:
            raise BadRequest(f"min_tokens: at most {max_tokens} here; {why}", param="min_tokens")
        return self if self.max_tokens <= max_tokens else replace(self, max_tokens=max_tokens)

    @property
    def num_prompt_bytes(self) -> int:
        """About how much text there is to take apart. It is found out once: what is made of this by `replace` is of the
        same text, and knows it."""
        if self.prompt_bytes is None:
            self.prompt_bytes = self._num_prompt_bytes()
        return self.prompt_bytes

    def _num_prompt_bytes(self) -> int:
        if self.tokens is not None:
            return BYTES_PER_TOKEN * len(self.tokens)
        if self.messages is None:
            return len(self.text or "")
        beside = _num_json(self.tools) + _num_json(self.schema) + _num_json(self.template_kwargs)
        return sum(map(_num_bytes, self.messages)) + beside

    @property
    def is_prefilled(self) -> bool:
        """Whether the answer goes on where the last message ends. Where nobody has said, that is an answer which has
        begun: not one of several in a row, nor calls of tools, after which comes a new turn."""
        messages = self.messages or ()
        if self.continues is not None or not messages or messages[-1]["role"] != "assistant":
            return bool(self.continues)
        is_alone = len(messages) == 1 or messages[-2]["role"] != "assistant"
        return is_alone and not messages[-1].get("tool_calls") and not is_empty(messages[-1])

    @property
    def has_images(self) -> bool:
        contents = [message.get("content") for message in self.messages or ()]
        return any(part["type"] != "text" for parts in contents if isinstance(parts, list) for part in parts)

    def most_tokens(self, context_length: int | None) -> int:
        """About what the prompt and the longest answers come to, before anything is counted: no choice comes to more
        than a context, whatever was asked."""
        asked = self.num_prompt_bytes // BYTES_PER_TOKEN + self.max_tokens * self.n + 1
        return min(asked, (context_length or LONGEST_CONTEXT) * self.n)


def is_empty(message: Message) -> bool:
    """Whether it neither says nor calls anything."""
    content = message.get("content")
    says = any(part.get("text", True) for part in content) if isinstance(content, list) else bool(content)
    return not (says or message.get("reasoning_content") or message.get("tool_calls"))


def _num_bytes(message: Message) -> int:
    content = message.get("content")
    size = len(content) if isinstance(content, str) else _num_json(content)
    return size + _num_json(message["tool_calls"]) if "tool_calls" in message else size


def _num_json(value: Any) -> int:
    if not value:
        return 0
    try:
        return len(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS))
    except orjson.JSONEncodeError:  # a number of more than 64 bits
        return len(str(value))


@dataclass(slots=True)
class Usage:
    """Tokens as the engine counted them; `cached_tokens` are those of the prompt that it did not compute again,
    `reasoning_tokens` those of the completion that the model thought before it answered."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


NOTHING = Usage()


@dataclass(slots=True)
class Started:
    """The prompt has been read; the first token is here. Nothing was sent before this that could not be refused."""

    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class Delta:
    """More of choice `index`. `completion_tokens` is how many it has in all so far, as the engine counts.
    `reasoning` is what the model thinks before it answers, where the engine tells that from its text."""

    index: int
    text: str
    completion_tokens: int
    logprobs: Sequence[Mapping[str, Any]] | None = None
    tool_calls: Sequence[Mapping[str, Any]] | None = None
    reasoning: str = ""


@dataclass(slots=True)
class Deltas:
    """`Delta`s of the only choice that are text and nothing else (with `is_reasoning`: reasoning and nothing else), in
    an answer without logprobs: their texts, and their `completion_tokens`.

    What comes in one read is often hundreds of them, and an object for each would be most of the work.
    """

    texts: Sequence[str]
    counts: Sequence[int]
    is_reasoning: bool = False

    def __iter__(self) -> Iterator[Delta]:
        for text, count in zip(self.texts, self.counts, strict=True):
            yield Delta(0, "", count, reasoning=text) if self.is_reasoning else Delta(0, text, count)


@dataclass(slots=True)
class Finished:
    """The end of every choice: why each ended (by index), and what it all came to."""

    reasons: Mapping[int, str]
    usage: Usage


Event = Started | Delta | Deltas | Finished
# Told once how far an answer came that did not come to its end for the one who read it.
OnLeft = Callable[[Sequence[Event]], object]
# Offered text, `Delta`s and `Deltas` alone, in the loop as it arrives. It says whether it took it.
OnText = Callable[[Sequence[Event]], bool]


class Engine(Protocol):
    """What generates. `num_slots` requests run at once; more would wait inside, where nobody sees them.

    `max_choices` is how many choices (`n`) one request may ask for; more become several requests.
    """

    num_slots: int
    max_choices: int
    context_length: int | None

    @property
    def is_ready(self) -> bool: ...

    async def start(self) -> None:
        """Return when it answers; raises EngineFailed when it never will."""

    async def close(self) -> None: ...

    def unsupported(self, generation: Generation) -> str | None:
        """The name of the first parameter that this engine cannot honour, or None."""

    async def count_tokens(self, generation: Generation) -> int | None:
        """Prompt tokens of this generation, exactly as `generate` would count them; None where the engine cannot tell
        beforehand. Raises as `generate` does."""

    def generate(
        self, generation: Generation, on_left: OnLeft | None = None, on_text: OnText | None = None
    ) -> AsyncGenerator[Sequence[Event]]:
        """Events in batches, as they came in one read. Closing the iterator, or cancelling who reads it, frees the
        engine's slot, and returns within a second.

        What the engine had written by then is read all the same, and `on_left` is called once, before that returns:
        with how far everything had come, in `Started` (of a prompt still being read: with as much as was read) and one
        `Delta` without text a choice, or in `Finished`. So it is when the engine breaks off. Of an answer that it gives
        as a whole nothing is known before that.

        While the next batch is waited for, an engine may offer it to `on_text` instead: what that takes is not given
        here. It is not called before the first batch was given, and what it raises is raised here.

        Raises BadRequest for what only the engine can know (a schema it cannot compile, a prompt too long),
        EngineFailed when it breaks off, Unavailable when it cannot start now.
        """
