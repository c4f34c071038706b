"""What each OpenAI-shaped server calls things, what it cannot honour, and how it counts tokens.

Pure: a `Generation` becomes a path and a body; a server's events become ours (`Reader`). A dialect knows no sockets.

Every sampling parameter is sent, also at its default: the servers' own defaults differ (llama.cpp's temperature is
0.8, with top_k 40), and the same request must mean the same thing whichever engine answers it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from octoai.server.engines.base import Delta, Event, Finished, Generation, Started, Usage
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Refusal, Unavailable

_JSON_SCHEMA_NAME = "answer"
_PENALTY_WINDOW = 32_768  # tokens; llama.cpp reserves four bytes for each
# How vLLM has worded a prompt too long: "(9000 in the messages, 512 in the completion)", "your request has 9000 input
# tokens", "You passed 9000 input tokens … context length is only 8192", "your prompt contains at least 8193 input
# tokens", "contains 90000 characters (more than 65536 …, which is the upper bound for 8192 input tokens)".
_WINDOW = re.compile(r"context length is (?:only )?(\d+) tokens")
_PROMPT_TOKENS = re.compile(r"(?<!\d)(?<!upper bound for )(\d+) (?:in the messages|input tokens|in the prompt)")
# Of a prompt that fills the window to the last token it says what is left of `max_tokens`, which was not ours.
_NO_ROOM = "max_tokens must be at least 1, got 0"


@dataclass(frozen=True, slots=True)
class Dialect:
    """`renamed` maps our parameter names to the server's; those in `refused` it has no equivalent of.

    `keeps_alive`: whether a connection can carry another request after a stream.
    """

    name: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=lambda: {"developer": "system"})
    max_choices: int = 128
    keeps_alive: bool = True

    def unsupported(self, generation: Generation) -> str | None:
        """The first parameter given that this server cannot honour."""
        for name in sorted(self.refused):
            if name in _GIVEN and _GIVEN[name](generation):
                return name
        return None

    def path(self, generation: Generation) -> str:
        return "/completions" if generation.messages is None else "/chat/completions"

    def body(self, generation: Generation, model: str) -> bytes:
        body = {
            "model": model,
            "stream": True,
            "max_tokens": generation.max_tokens,
            "n": generation.n,
            **self._prompt(generation),
            **self._sampling(generation),
            **self._logprobs(generation),
            **self.extra,
        }
        if generation.schema is not None:
            body["response_format"] = self._response_format(generation.schema)
        if generation.tools:
            body |= {"tools": generation.tools, "tool_choice": generation.tool_choice or "auto"}
        try:
            return orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS)
        except orjson.JSONEncodeError as error:  # a number of more than 64 bits, in a schema or a tool
            raise BadRequest(f"The body cannot be passed on to the engine: {error}") from None

    def _prompt(self, generation: Generation) -> dict[str, Any]:
        if generation.messages is None:
            return {"prompt": generation.tokens if generation.text is None else generation.text}
        return {"messages": [self._message(message) for message in generation.messages]}

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
        optional = {"seed": generation.seed, "stop": list(generation.stop), "logit_bias": dict(generation.logit_bias)}
        values |= {name: value for name, value in optional.items() if value not in (None, [], {})}
        return {self.renamed.get(name, name): value for name, value in values.items() if name not in self.refused}

    def _logprobs(self, generation: Generation) -> dict[str, Any]:
        if generation.logprobs is None:
            return {}
        if generation.messages is None:
            return {"logprobs": generation.logprobs}
        return {"logprobs": True, "top_logprobs": generation.logprobs}

    def _response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        if not schema:
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"name": _JSON_SCHEMA_NAME, "schema": schema, "strict": True}}


class LlamaDialect(Dialect):
    """llama.cpp's server, also when it is somebody else's `llama-server`."""

    def _sampling(self, generation: Generation) -> dict[str, Any]:
        values = Dialect._sampling(self, generation)
        if generation.seed is not None:
            values["seed"] = generation.seed % 0xFFFFFFFF  # 2³²-1 would mean a random one
        # Elsewhere penalties look at the whole text, here by default at the last 64 tokens.
        return values | {"repeat_last_n": _PENALTY_WINDOW}

    def _response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "json_object", "schema": schema} if schema else {"type": "json_object"}


class VllmDialect(Dialect):
    """vLLM, which continues a prefilled answer only when told to; llama.cpp does by itself."""

    def _prompt(self, generation: Generation) -> dict[str, Any]:
        values = Dialect._prompt(self, generation)
        last = values["messages"][-1] if values.get("messages") else {}
        if last.get("role") == "assistant" and not last.get("tool_calls"):
            values |= {"add_generation_prompt": False, "continue_final_message": True}
        return values


# How each refusable parameter shows that it was given: at its default it asks for nothing.
_GIVEN: dict[str, Any] = {
    "frequency_penalty": lambda g: g.frequency_penalty != 0,
    "ignore_eos": lambda g: g.ignore_eos,
    "logit_bias": lambda g: bool(g.logit_bias),
    "logprobs": lambda g: g.logprobs is not None,
    "min_p": lambda g: g.min_p != 0,
    "presence_penalty": lambda g: g.presence_penalty != 0,
    "prompt": lambda g: g.tokens is not None,
    "repetition_penalty": lambda g: g.repetition_penalty != 1,
    "tools": lambda g: bool(g.tools) and g.tool_choice != "none",
    "top_k": lambda g: g.top_k != 0,
}

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        LlamaDialect(
            "llama.cpp",
            renamed={"repetition_penalty": "repeat_penalty"},
            # Tool calls are not parsed for templates that know no tools, so a forced call would be silently ignored.
            refused=frozenset({"tools"}),
            # timings: tokens generated so far on every event. return_progress: signs of life while a prompt is read.
            extra={"timings_per_token": True, "return_progress": True, "cache_prompt": True},
            max_choices=1,
            keeps_alive=False,  # it closes the connection after every stream, without saying so beforehand
        ),
        VllmDialect(
            "vllm",
            extra={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            # It makes a request of each choice itself, but refuses several at temperature 0.
            max_choices=1,
        ),
        Dialect(
            "ollama",
            refused=frozenset({"ignore_eos", "logit_bias", "min_p", "prompt", "repetition_penalty", "top_k"}),
            extra={"stream_options": {"include_usage": True}},
            max_choices=1,
        ),
        Dialect(
            "openai",
            refused=frozenset({"ignore_eos", "min_p", "repetition_penalty", "top_k"}),
            extra={"stream_options": {"include_usage": True}},
            roles={},
        ),
    )
}


class Reader:
    """Reads one answer's events. `Finished` comes last, with the sum of what the server counted."""

    def __init__(self, generation: Generation | None = None) -> None:
        self._generation = generation
        self._started = False
        self._counted: dict[int, int] = {}
        self._reasons: dict[int, str] = {}
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens: int | None = None

    def events(self, payloads: Iterable[bytes]) -> list[Event]:
        """Events for the data of one or more server-sent events."""
        events: list[Event] = []
        for payload in payloads:
            if payload == b"[DONE]":
                events.append(self._finished())
            else:
                self._read_checked(_decoded(payload), events)
        return events

    def _read_checked(self, chunk: Mapping[str, Any], events: list[Event]) -> None:
        try:
            self._read(chunk, events)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise EngineFailed("The engine sent an event of a shape that is not the protocol's.") from None

    def _read(self, chunk: Mapping[str, Any], events: list[Event]) -> None:
        if chunk.get("error") or chunk.get("object") == "error":
            raise self._broken(chunk)
        choices = chunk.get("choices") or ()
        self._count(chunk, choices)
        for choice in choices:
            delta = self._delta(choice)
            if delta is not None:
                self._start(events)
                events.append(delta)
            if choice.get("finish_reason"):
                self._start(events)
                self._reasons[choice.get("index", 0)] = choice["finish_reason"]

    def _broken(self, chunk: Mapping[str, Any]) -> Refusal:
        """vLLM checks some parameters only after its 200, and then says which status it meant."""
        error = chunk.get("error")
        status = error.get("code") if isinstance(error, dict) else chunk.get("code")
        if self._generation is not None and not self._started and status in (400, 422):
            return refusal(status, orjson.dumps(chunk), self._generation)
        return EngineFailed(f"The engine broke off: {_message_of(chunk)}")

    def _start(self, events: list[Event]) -> None:
        if not self._started:
            self._started = True
            events.append(Started(self._prompt_tokens, self._cached_tokens))

    def _count(self, chunk: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> None:
        """Tokens so far: llama.cpp says them in `timings`, vLLM in `usage`; otherwise one a delta is counted."""
        timings, usage = chunk.get("timings"), chunk.get("usage")
        if usage:
            self._prompt_tokens = usage.get("prompt_tokens") or self._prompt_tokens
            details = usage.get("prompt_tokens_details") or {}
            self._cached_tokens = details.get("cached_tokens") or self._cached_tokens
            self._completion_tokens = usage.get("completion_tokens")
        elif timings:
            self._cached_tokens = timings["cache_n"]
            self._prompt_tokens = timings["cache_n"] + timings["prompt_n"]
            self._completion_tokens = timings["predicted_n"]
        for choice in choices:
            index = choice.get("index", 0)
            if len(choices) == 1 and self._completion_tokens is not None:
                others = sum(count for other, count in self._counted.items() if other != index)
                self._counted[index] = max(self._counted.get(index, 0), self._completion_tokens - others)
            elif _has_text(choice):
                self._counted[index] = self._counted.get(index, 0) + 1

    def _delta(self, choice: Mapping[str, Any]) -> Delta | None:
        said = choice.get("delta")
        text = (choice.get("text") if said is None else said.get("content")) or ""
        calls = None if said is None else said.get("tool_calls")
        if not isinstance(text, str):
            raise TypeError(text)
        logprobs = _logprobs(choice.get("logprobs"))
        if not text and not calls and not logprobs:  # a token that only begins a character has a logprob, but no text
            return None
        index = choice.get("index", 0)
        return Delta(index, text, self._counted.get(index, 0), logprobs, calls)

    def _finished(self) -> Finished:
        if not self._reasons:
            raise EngineFailed("The engine ended its answer without saying why.")
        completion_tokens = sum(self._counted.values()) if self._completion_tokens is None else self._completion_tokens
        return Finished(self._reasons, Usage(self._prompt_tokens, self._cached_tokens, completion_tokens))


def _decoded(payload: bytes) -> Mapping[str, Any]:
    try:
        chunk = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise EngineFailed("The engine sent an event that is not JSON.") from None
    if not isinstance(chunk, dict):
        raise EngineFailed("The engine sent an event that is not an object.")
    return chunk


def _has_text(choice: Mapping[str, Any]) -> bool:
    said = choice.get("delta") or choice
    return bool(said.get("content") or said.get("text") or said.get("tool_calls"))


def _logprobs(reported: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """One entry a token, in OctoAI's form, from the chat form or the completions' older four parallel lists."""
    if not reported:
        return None
    if reported.get("content") is not None:
        return [
            {**_entry(token), "top_logprobs": [_entry(other) for other in token.get("top_logprobs") or ()]}
            for token in reported["content"]
        ]
    tokens, values = reported.get("tokens") or [], reported.get("token_logprobs") or []
    tops = reported.get("top_logprobs") or [{}] * len(tokens)
    return [
        {
            **_entry({"token": token, "logprob": value}),
            "top_logprobs": [_entry({"token": name, "logprob": other}) for name, other in (top or {}).items()],
        }
        for token, value, top in zip(tokens, values, tops, strict=False)
    ]


def _entry(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["token"]
    raw = token.get("bytes")
    logprob = token["logprob"]
    return {
        "token": text,
        # -inf is no JSON number: the servers' own floor for "never" is this one.
        "logprob": -9999.0 if logprob is None or logprob < -9999.0 else logprob,
        "bytes": list(text.encode("utf-8", "replace")) if raw is None else raw,
    }


def refusal(status: int, body: bytes, generation: Generation, context_length: int | None = None) -> Refusal:
    """What a server's error answer means for our caller. Its own wording is kept where the caller can act on it."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = {}
    error = said.get("error", said) if isinstance(said, dict) else {}
    error = error if isinstance(error, dict) else {"message": str(error)}
    message = _message_of({"error": error})
    param = "prompt" if generation.messages is None else "messages"
    if status == 400 and context_length is not None and _NO_ROOM in message:
        return ContextLengthExceeded(context_length, context_length, param=param)
    too_long = _too_long(error, message, param) if status == 400 else None
    if too_long is not None:
        return too_long
    if status in (400, 422):
        return BadRequest(f"The engine refused: {message}", param=error.get("param") or _suspect(message, param))
    if "image input is not supported" in message:
        return BadRequest("messages: this model takes text only, no images", param="messages")
    if status in (429, 503):
        return Unavailable("The engine is busy.", retry_after=1)
    return EngineFailed(f"The engine answered {status}.")


def _too_long(error: Mapping[str, Any], message: str, param: str) -> Refusal | None:
    """llama.cpp says both numbers; of vLLM's words some count `max_tokens` in, and then they are passed on."""
    counted, limit = error.get("n_prompt_tokens"), error.get("n_ctx")
    if isinstance(counted, int) and isinstance(limit, int):
        return ContextLengthExceeded(counted, limit, param=param)
    window, prompt = _WINDOW.search(message), _PROMPT_TOKENS.search(message)
    if window is None:
        return None
    if prompt is not None and int(prompt[1]) > int(window[1]):
        exceeded = ContextLengthExceeded(int(prompt[1]), int(window[1]), param=param)
        if f"at least {prompt[1]} " in message:  # vLLM stops counting there
            exceeded.message = exceeded.message.replace("prompt has ", "prompt has at least ")
        return exceeded
    refused = BadRequest(f"The engine refused: {message}", param=param)
    refused.code = ContextLengthExceeded.code
    return refused


def _suspect(message: str, param: str) -> str:
    """Which parameter an engine's complaint is about. What its words do not tell is about the prompt."""
    if "tool choice" in message or "tool_choice" in message:  # vLLM started without a parser of tool calls
        return "tools"
    is_about_schema = any(word in message.lower() for word in ("schema", "grammar"))
    return "response_format" if is_about_schema else param


def _message_of(said: Mapping[str, Any]) -> str:
    error = said.get("error", said)
    message = error.get("message") if isinstance(error, dict) else error
    text = " ".join(str(message or "it did not say why").split())
    return text.rpartition("Automatic parser generation failed: ")[2][:500]
