"""What each OpenAI-shaped server calls things, what it cannot honour, and how it counts tokens.

Pure: a `Generation` becomes a path and a body; what comes back is read by `reader`. A dialect knows no sockets.

Every sampling parameter is sent, also at its default: the servers' own defaults differ (llama.cpp's temperature is
0.8, with top_k 40), and the same request must mean the same thing whichever engine answers it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from octoai.server.engines.base import Generation, Message
from octoai.server.engines.openai.choices import tokens_of
from octoai.server.engines.openai.refusable import NOT_OF_OPENAI, refusable
from octoai.server.errors import BadRequest
from octoai.server.json_schema.schema import for_llama_cpp

# Requests (path from the server's root, body) out, their answers in, the number of tokens at the end: None where it
# cannot tell, as of images that it counts as the few tokens that stand for them.
Counting = Generator[tuple[str, bytes], bytes, int | None]

# Answers list the tokens too, which may be millions: they are looked at as text, and no list is made.
_COUNT = re.compile(rb'"count"\s*:\s*([0-9]{1,10})(?=[,}\s])')
_TOKENS = re.compile(rb'"tokens"\s*:\s*\[')

_LEAST_OF_IMAGE = 32  # tokens that one is read as; what stands for it in the text is fewer
_NO_IMAGE = {"type": "text", "text": ""}

_CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
_NOTHING_SAID = {"role": "user", "content": ""}

_PENALTY_WINDOW = 32_768  # tokens; llama.cpp reserves four bytes for each


@dataclass(frozen=True, slots=True)
class Dialect:
    """`renamed` maps our parameter names to the server's; those in `refused` it has no equivalent of. `of_streams` is
    said beside them for a stream. `keeps_alive`: whether a connection can carry another request after one.
    `gives_whole`: whether a brief answer is asked for as a whole.
    """

    name: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    of_streams: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=lambda: {"developer": "system"})
    max_choices: int = 128
    keeps_alive: bool = True
    gives_whole: bool = False

    def unsupported(self, generation: Generation) -> str | None:
        """The first parameter given that this server cannot honour."""
        for name, is_given in refusable(self.refused):
            if is_given(generation):
                return name
        return None

    def path(self, generation: Generation) -> str:
        return "/completions" if generation.messages is None else "/chat/completions"

    def body(self, generation: Generation, model: str, *, is_stream: bool = True) -> bytes:
        body = self._sampling(generation)
        body |= {"model": model, "stream": is_stream, "max_tokens": generation.max_tokens, "n": generation.n}
        body |= self._prompt(generation)
        if is_stream:
            body |= self.of_streams
        if generation.logprobs is not None:
            body |= self._logprobs(generation.logprobs, is_chat=generation.messages is not None)
        if generation.schema is not None:
            body["response_format"] = self._response_format(generation.schema)
        if generation.tools and self._may_call(generation):
            body |= {"tools": generation.tools, "tool_choice": generation.tool_choice or "auto"}
            if not generation.parallel_tool_calls:
                body["parallel_tool_calls"] = False
        return dumped(body)

    def counting(self, generation: Generation, model: str) -> Counting | None:
        """How to ask for the prompt's tokens without generating, of a server that can be asked."""
        return None

    def _may_call(self, generation: Generation) -> bool:
        """A server that ignores `tool_choice` calls none only where it knows of none."""
        return generation.tool_choice != "none" or "tool_choice" not in self.refused

    def _prompt(self, generation: Generation) -> dict[str, Any]:
        if generation.messages is None:
            return {"prompt": generation.tokens if generation.text is None else generation.text}
        messages = [self._message(message) for message in generation.messages]
        if generation.template_kwargs:
            return {"messages": messages, "chat_template_kwargs": generation.template_kwargs}
        return {"messages": messages}

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        role = message["role"]
        return {**message, "role": self.roles[role]} if role in self.roles else message

    def _sampling(self, generation: Generation) -> dict[str, Any]:
        values: dict[str, Any] = {
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": generation.top_k,
            "min_p": generation.min_p,
            "frequency_penalty": generation.frequency_penalty,
            "presence_penalty": generation.presence_penalty,
            "repetition_penalty": generation.repetition_penalty,
            "ignore_eos": generation.ignore_eos,
        }
        if generation.seed is not None:
            values["seed"] = generation.seed
        if generation.min_tokens:
            values["min_tokens"] = generation.min_tokens
        if generation.stop:
            values["stop"] = list(generation.stop)
        if generation.logit_bias:
            values["logit_bias"] = generation.logit_bias
        for name in self.refused.intersection(values):
            del values[name]
        for name in self.renamed:
            if name in values:
                values[self.renamed[name]] = values.pop(name)
        return values

    def _logprobs(self, number: int, *, is_chat: bool) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": number} if is_chat else {"logprobs": number}

    def _response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        if not schema:
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


class LlamaDialect(Dialect):
    """llama.cpp's server, also when it is somebody else's `llama-server`."""

    def counting(self, generation: Generation, model: str) -> Counting | None:
        return None if generation.has_images else self._counting(generation, model)

    def _counting(self, generation: Generation, model: str) -> Counting:
        """As it does itself: the template, for which all may matter but a schema, and then the tokens."""
        if generation.tokens is not None:
            return len(generation.tokens)
        text = generation.text
        if text is None:
            text = orjson.loads((yield "/apply-template", self.body(replace(generation, schema=None), model)))["prompt"]
        asked = {"content": text, "add_special": True, "parse_special": True}
        return _num_listed((yield "/tokenize", orjson.dumps(asked)))

    def _prompt(self, generation: Generation) -> dict[str, Any]:
        """It goes on with the last message by itself, where that is the assistant's, and refuses several of them."""
        values = Dialect._prompt(self, generation)
        if generation.continues:
            values |= _CONTINUED
        elif values.get("messages") and values["messages"][-1]["role"] == "assistant" and not generation.is_prefilled:
            values["messages"].append(_NOTHING_SAID)  # nothing else makes every llama-server begin a new turn
        return values

    def _sampling(self, generation: Generation) -> dict[str, Any]:
        values = Dialect._sampling(self, generation)
        if generation.seed is not None:
            values["seed"] = generation.seed % 0xFFFFFFFF  # 2³²-1 would mean a random one
        if generation.slot is not None:
            values["id_slot"] = generation.slot
        # Elsewhere penalties look at the whole text, here by default at the last 64 tokens.
        return values | {"repeat_last_n": _PENALTY_WINDOW, "samplers": _samplers(generation)}

    def _logprobs(self, number: int, *, is_chat: bool) -> dict[str, Any]:
        return Dialect._logprobs(self, max(1, number), is_chat=is_chat)  # of 0 it says none, also of the token it took

    def _response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "json_object", "schema": for_llama_cpp(schema)} if schema else {"type": "json_object"}


class VllmDialect(Dialect):
    """vLLM, which continues a prefilled answer only when told to; llama.cpp does by itself."""

    def counting(self, generation: Generation, model: str) -> Counting | None:
        return self._counting(generation, model)

    def _counting(self, generation: Generation, model: str) -> Counting:
        """Until 0.16 it counts of an image what stands for it, later all that it is read as: told by asking again,
        without the images."""
        if generation.tokens is not None:
            return len(generation.tokens)
        counted = _num_said((yield "/tokenize", self._asked(generation, model)))
        if not generation.has_images:
            return counted
        text = _num_said((yield "/tokenize", self._asked(without_images(generation), model)))
        return counted if counted - text >= _least_of_images(generation) else None

    def _asked(self, generation: Generation, model: str) -> bytes:
        tools = {"tools": generation.tools} if generation.tools else {}
        return dumped({"model": model, **self._prompt(generation), **tools})

    def _prompt(self, generation: Generation) -> dict[str, Any]:
        values = Dialect._prompt(self, generation)
        return values | _CONTINUED if generation.is_prefilled else values


def _num_listed(said: bytes) -> int:
    """How many tokens llama.cpp lists. Raises ValueError."""
    begins = _TOKENS.search(said)
    if begins is None:
        raise ValueError(said[:100])
    start = begins.end()
    end = said.index(b"]", start)
    return said.count(b",", start, end) + 1 if end > start else 0


def _num_said(said: bytes) -> int:
    """How many there are, as vLLM says. Raises ValueError."""
    count = _COUNT.search(said)
    if count is None:
        raise ValueError(said[:100])
    return tokens_of(int(count[1])) or 0


def _samplers(generation: Generation) -> list[str]:
    """Those that change something, in llama.cpp's own order: each of the others, too, would cost time at every token,
    which at eight requests at once is a tenth of it all. What is most likely passes every bound on likelihood."""
    penalties = (generation.frequency_penalty, generation.presence_penalty, generation.repetition_penalty)
    is_random = generation.temperature > 0
    acting = {
        "penalties": penalties != (0, 0, 1),
        "top_k": is_random and generation.top_k > 0,
        "top_p": is_random and generation.top_p < 1,
        "min_p": is_random and generation.min_p > 0,
        "temperature": True,  # also at 1: a list of nothing might be taken for no list
    }
    return [name for name, acts in acting.items() if acts]


def without_images(generation: Generation) -> Generation:
    """The same chat with an empty text for each image."""
    if not generation.has_images:
        return generation
    return replace(generation, messages=[_without_images(message) for message in generation.messages or ()])


def _without_images(message: Message) -> Message:
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    return {**message, "content": [part if part["type"] == "text" else _NO_IMAGE for part in parts]}


def _least_of_images(generation: Generation) -> int:
    contents = [message.get("content") for message in generation.messages or ()]
    kinds = [part["type"] for parts in contents if isinstance(parts, list) for part in parts]
    return _LEAST_OF_IMAGE * (len(kinds) - kinds.count("text"))


def dumped(body: Mapping[str, Any]) -> bytes:
    """Raises BadRequest."""
    try:
        return orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError as error:  # a number of more than 64 bits, in a schema or a tool
        raise BadRequest(f"The body cannot be passed on to the engine: {error}") from None


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        LlamaDialect(
            "llama.cpp",
            renamed={"repetition_penalty": "repeat_penalty"},
            # Tool calls are not parsed for templates that know no tools, so a forced call would be silently ignored.
            refused=frozenset({"min_tokens", "tools"}),
            # timings: tokens generated so far on every event. return_progress: signs of life while a prompt is read.
            of_streams={"timings_per_token": True, "return_progress": True, "cache_prompt": True},
            max_choices=1,
            keeps_alive=False,  # it closes the connection after every stream, without saying so beforehand
        ),
        VllmDialect(
            "vllm",
            of_streams={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            max_choices=1,  # it makes a request of each choice itself, but refuses several at temperature 0
            gives_whole=True,
        ),
        Dialect(
            "ollama",
            refused=NOT_OF_OPENAI | {"logit_bias", "parallel_tool_calls", "prompt", "tool_choice"},
            of_streams={"stream_options": {"include_usage": True}},
            max_choices=1,
        ),
        Dialect(
            "openai",
            refused=NOT_OF_OPENAI,
            of_streams={"stream_options": {"include_usage": True}},
            roles={},
            gives_whole=True,
        ),
    )
}
