"""What an engine's error answer means for our caller. Its own wording is kept where the caller can act on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from octoai.server.engines.base import Generation
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Refusal, Unavailable

# How vLLM has worded a prompt too long: "(9000 in the messages, 512 in the completion)", "your request has 9000 input
# tokens", "You passed 9000 input tokens … context length is only 8192", "your prompt contains at least 8193 input
# tokens", "contains 90000 characters (more than 65536 …, which is the upper bound for 8192 input tokens)".
_WINDOW = re.compile(r"context length is (?:only )?(\d+) tokens")
_PROMPT_TOKENS = re.compile(r"(?<!\d)(?<!upper bound for )(\d+) (?:in the messages|input tokens|in the prompt)")
# Of a prompt that fills the window to the last token it says what is left of `max_tokens`, which was not ours.
_NO_ROOM = "max_tokens must be at least 1, got 0"
# llama.cpp's grammar takes the beginning of an answer with what follows it. Of one that it cannot read it says more.
_NOT_ITS_BEGINNING, _NO_GRAMMAR = "Failed to initialize samplers", "failed to parse grammar"
# What a message names, beside the words that it says: in quotes, with an underscore, or in a template's code, of which
# llama.cpp shows some.
_NAME = re.compile(r"""(?<=["'`])\w+(?=["'`])|\w*_\w+""")
_WORD, _SHOWS_TEMPLATE = re.compile(r"\w+"), "While executing "
MAX_RETRY_SECONDS = 3600


def refusal(
    status: int, body: bytes, generation: Generation, context_length: int | None = None, retry_after: bytes = b""
) -> Refusal:
    """`retry_after` is the header of that name, as it came."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = {}
    error = said.get("error", said) if isinstance(said, dict) else said
    error = error if isinstance(error, dict) else {"message": error}
    message = message_of({"error": error})
    param = prompt_param(generation)
    if status == 400 and context_length is not None and _NO_ROOM in message:
        return ContextLengthExceeded(context_length, context_length, param=param)
    too_long = _too_long(error, message, param) if status == 400 else None
    if too_long is not None:
        return too_long
    is_of_beginning = _NOT_ITS_BEGINNING in message and _NO_GRAMMAR not in message
    if is_of_beginning and generation.schema is not None and generation.is_prefilled:
        return _other_beginning()
    if status in (400, 422):
        named = error.get("param")
        suspect = named if isinstance(named, str) and named else _suspect(message, generation)
        return BadRequest(f"The engine refused: {message}", param=suspect)
    if status == 413:
        return BadRequest(f"{param}: too large for the engine ({message}). Shorten it.", param=param)
    if "image input is not supported" in message:
        return text_only()
    if status in (429, 503):
        return Unavailable("The engine is busy.", retry_after=_seconds(retry_after))
    return EngineFailed(f"The engine answered {status}.")


def broken(said: Mapping[str, Any], generation: Generation | None) -> Refusal:
    """What is said instead of the rest of an answer. vLLM checks some parameters only after its 200, and then says
    which status it meant: of a `generation` of which nothing has come yet."""
    error = said.get("error")
    status = error.get("code") if isinstance(error, dict) else said.get("code")
    if generation is not None and status in (400, 422):
        return refusal(status, orjson.dumps(said), generation)
    return EngineFailed(f"The engine broke off: {message_of(said)}")


def prompt_param(generation: Generation) -> str:
    """Where its prompt stands in the body."""
    return "prompt" if generation.messages is None else "messages"


def text_only() -> Refusal:
    return BadRequest("messages: this model takes text only, no images", param="messages")


def _other_beginning() -> Refusal:
    return BadRequest(
        "response_format: the last message begins an answer that is none of this format; leave one of the two out, or "
        "set continue_final_message to false for an answer of its own",
        param="response_format",
    )


def _seconds(retry_after: bytes) -> int:
    """As the engine says, where it says a number; a moment where not."""
    return min(int(retry_after), MAX_RETRY_SECONDS) if retry_after.isdigit() and len(retry_after) < 10 else 1


def _too_long(error: Mapping[str, Any], message: str, param: str) -> Refusal | None:
    """llama.cpp says both numbers; of vLLM's words some count `max_tokens` in, and then they are passed on."""
    counted, limit = error.get("n_prompt_tokens"), error.get("n_ctx")
    if isinstance(counted, int) and isinstance(limit, int):
        return ContextLengthExceeded(counted, limit, param=param)
    window, prompt = _WINDOW.search(message), _PROMPT_TOKENS.search(message)
    if window is None:
        return None
    if prompt is not None and int(prompt[1]) > int(window[1]):
        is_least = f"at least {prompt[1]} " in message  # vLLM stops counting there
        return ContextLengthExceeded(int(prompt[1]), int(window[1]), param=param, is_least=is_least)
    refused = BadRequest(f"The engine refused: {message}", param=param)
    refused.code = ContextLengthExceeded.code
    return refused


def _suspect(message: str, generation: Generation) -> str:
    """Which parameter an engine's complaint is about. What its words do not tell is about the prompt."""
    names = (_WORD if _SHOWS_TEMPLATE in message else _NAME).findall(message)
    if not {*(generation.template_kwargs or ())}.isdisjoint(names):
        return "chat_template_kwargs"
    if "tool choice" in message or "tool_choice" in message:  # vLLM started without a parser of tool calls
        return "tools"
    is_about_schema = any(word in message.lower() for word in ("schema", "grammar"))
    return "response_format" if is_about_schema else prompt_param(generation)


def message_of(said: Mapping[str, Any]) -> str:
    error = said.get("error", said)
    message = error.get("message") if isinstance(error, dict) else error
    text = " ".join(str(message or "it did not say why").split())
    return text.rpartition("Automatic parser generation failed: ")[2][:500]
