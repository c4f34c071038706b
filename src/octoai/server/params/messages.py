"""A chat's messages as engines are told them, and what is said of how they become a prompt.

Pure. An assistant's text at the end is an answer that has begun, and the engine goes on with it; two fields of vLLM's
say otherwise, or the same. What old clients drop on the way is put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from octoai.server.engines.base import Message, is_empty
from octoai.server.errors import BadRequest
from octoai.server.params.bodies import invalid

MAX_TEMPLATE_BYTES = 16 * 1024  # of what a template is told: as JSON

# Parameters of what makes a prompt with a template, and what that tells it of the request and the model: to say them
# again would replace the conversation, or other parts of the request, behind the back of what was checked.
_OF_RENDERERS = frozenset(
    {
        *("add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "conversation", "eos_token"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("tokenize", "tokenizer_kwargs", "tools", "truncation"),
    }
)


def told(messages: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    said = [_message(message, index) for index, message in enumerate(messages)]
    # An answer that has not begun is a new one; llama.cpp would go on in the middle of its header.
    if len(said) > 1 and said[-1]["role"] == "assistant" != said[-2]["role"] and is_empty(said[-1]):
        said.pop()
    return tuple(said)


def continues(params: Mapping[str, Any], messages: tuple[Message, ...]) -> bool | None:
    """Whether the answer is to go on with the last message, which is the assistant's; None where nobody says."""
    goes_on, begins = params.get("continue_final_message"), params.get("add_generation_prompt")
    if goes_on is None and begins is None:
        return None
    if goes_on is not None and goes_on == begins:
        raise BadRequest(
            "continue_final_message: the opposite of add_generation_prompt; leave one of the two out",
            param="continue_final_message",
        )
    last = messages[-1]
    if not (goes_on or begins is False):
        return False if last["role"] == "assistant" else None
    if last["role"] != "assistant" or last.get("tool_calls") or is_empty(last):
        name = "continue_final_message" if goes_on else "add_generation_prompt"
        raise BadRequest(f"{name}: only a text of the assistant's, as the last message, can be continued", param=name)
    return True


def template_kwargs(params: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a chat's template is to be told besides; None for nothing."""
    values: Mapping[str, Any] | None = params.get("chat_template_kwargs")
    if not values:
        return None
    for key in sorted(_OF_RENDERERS.intersection(values)):
        name = f"chat_template_kwargs.{key}"
        raise BadRequest(f"{name}: decided by the request itself and the model; leave it out", param=name)
    if _num_bytes(values) > MAX_TEMPLATE_BYTES:
        said = f"chat_template_kwargs: at most {MAX_TEMPLATE_BYTES} bytes of JSON, with numbers of at most 64 bits"
        raise BadRequest(said, param="chat_template_kwargs")
    return values


def _num_bytes(values: Mapping[str, Any]) -> float:
    try:
        return len(orjson.dumps(values))
    except orjson.JSONEncodeError:
        return math.inf


def without_nulls(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Null means the same as leaving it out."""
    return {name: value for name, value in values.items() if value is not None} if None in values.values() else values


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Parts and calls get the `type` that the original SDK dropped. Without content, an assistant's refusal is its
    text, or else there is none."""
    said = {**without_nulls(message)}
    refusal = said.pop("refusal", "")
    content = said.get("content") or refusal
    if isinstance(content, list):
        content = [_part(part, (index, number)) for number, part in enumerate(content)]
    said["content"] = content
    if "tool_calls" in said:
        said["tool_calls"] = [_call(call) for call in said["tool_calls"]]
    return said


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Where no arguments are told, there were none: engines read JSON."""
    function = call["function"]
    return {**call, "type": "function", "function": {**function, "arguments": function.get("arguments") or "{}"}}


def _part(part: Mapping[str, Any], place: tuple[int, int]) -> dict[str, Any]:
    for kind in ("text", "image_url", "refusal"):
        if part.get(kind) is not None and part.get("type") in (None, kind):
            # What an assistant refused with is text to every engine.
            return {"type": "text", "text": part[kind]} if kind == "refusal" else {"type": kind, kind: part[kind]}
    where = ("messages", place[0], "content", place[1])
    raise invalid(where, "A content part is {type: text, text} or {type: image_url, image_url}", "value_error")
