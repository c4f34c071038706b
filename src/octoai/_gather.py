"""A whole answer from the events of its stream. Pure.

Works on the events as received, so that whatever a service adds (other keys, other deltas) is gathered, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


class _Text:
    """Text that comes in pieces and is joined once: to add each to all before it takes quadratic time."""

    __slots__ = ("pieces",)

    def __init__(self, piece: str) -> None:
        self.pieces = [piece]


def text_of(events: Iterable[bytes]) -> str:
    """The text of the first choice."""
    parts: list[str] = []
    for data in events:
        chunk = json.loads(data)
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if isinstance(choices, list):
            parts.extend(_text(choice) for choice in choices if isinstance(choice, dict) and not index_of(choice))
    return "".join(parts)


def index_of(choice: Mapping[str, Any]) -> int:
    """As the types read it: 1.0 and "1" are 1, and what is no whole number is 0."""
    index = choice.get("index")
    if isinstance(index, int):
        return index
    try:
        number = float(index)  # type: ignore[arg-type]  # which raises
    except (TypeError, ValueError):
        return 0
    return int(number) if number.is_integer() else 0


def _text(choice: Mapping[str, Any]) -> str:
    """Of any endpoint's event: nothing about it is certain."""
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def chat_completion(events: Iterable[bytes]) -> dict[str, Any]:
    """The body that the same request without streaming would have got."""
    answer, choices = _gathered(events)
    answer["object"] = "chat.completion"
    answer["choices"] = [_with_message(choice) for choice in choices]
    return answer


def completion(events: Iterable[bytes]) -> dict[str, Any]:
    answer, choices = _gathered(events)
    answer["choices"] = [{**choice, "text": choice.get("text") or ""} for choice in choices]
    return answer


def _gathered(events: Iterable[bytes]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for data in events:
        chunk = json.loads(data)
        for part in chunk.pop("choices", None) or ():
            index = index_of(part)
            _merge_choice(choices.setdefault(index, {"index": index}), part)
        answer.update({key: value for key, value in chunk.items() if value not in (None, {}) or key not in answer})
    return answer, [_joined(choices[index]) for index in sorted(choices)]


def _joined(choice: dict[str, Any]) -> dict[str, Any]:
    """With its texts, and those of its message and of what that calls."""
    message = choice.get("delta", {})
    calls, function = message.get("tool_calls"), message.get("function_call")
    functions = [call["function"] for call in calls] if isinstance(calls, list) else []
    if isinstance(function, dict):
        functions.append(function)
    for part in (choice, message, *functions):
        part.update({key: "".join(value.pieces) for key, value in part.items() if isinstance(value, _Text)})
    return choice


def _with_message(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.pop("delta", {})
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        del call["index"]
    return {**choice, "message": {"role": "assistant", "content": None, **message}}


def _merge_choice(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if key == "delta":
            _merge_delta(choice.setdefault("delta", {}), value or {})
        elif key == "text":
            _add(choice, "text", value if isinstance(value, str) else "")
        elif key == "logprobs" and isinstance(value, dict):
            _merge_logprobs(choice, value)
        elif key != "index" and (value is not None or key not in choice):
            choice[key] = value


def _add(part: dict[str, Any], key: str, piece: str) -> None:
    """To the text there; what is none is replaced."""
    text = part.get(key)
    if isinstance(text, _Text):
        text.pieces.append(piece)
    else:
        part[key] = _Text(piece)


def _merge_logprobs(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        logprobs = choice["logprobs"] = {}
    for key, value in part.items():
        if isinstance(value, list):
            if isinstance(logprobs.get(key), list):
                logprobs[key].extend(value)
            else:
                logprobs[key] = value
        elif value is not None or key not in logprobs:
            logprobs[key] = value


def _merge_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls" and isinstance(value, list):
            _merge_tool_calls(message, value)
        elif key == "function_call" and isinstance(value, dict):  # what tool calls were called before
            _merge_function(_function_of(message), value)
        elif isinstance(value, str) and key != "role":
            _add(message, key, value)
        elif isinstance(value, list) and isinstance(message.get(key), list):
            message[key].extend(value)
        elif value is not None or key not in message:
            message[key] = value


def _function_of(message: dict[str, Any]) -> dict[str, Any]:
    function = message.get("function_call")
    if not isinstance(function, dict):
        function = message["function_call"] = {"name": "", "arguments": ""}
    return function


def _merge_tool_calls(message: dict[str, Any], deltas: Iterable[Any]) -> None:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        calls = message["tool_calls"] = []
    for delta in deltas:
        if isinstance(delta, dict):
            call = _call_of(calls, delta)
            call.update({k: v for k, v in delta.items() if k not in ("function", "index") and v is not None})
            if isinstance(delta.get("function"), dict):
                _merge_function(call["function"], delta["function"])


def _call_of(calls: list[dict[str, Any]], delta: Mapping[str, Any]) -> dict[str, Any]:
    """The call that a delta goes on with, or a new one. Without an index its id tells, and without that it is the
    latest."""
    index, name = delta.get("index"), delta.get("id")
    if index is not None:
        same = [call for call in calls if call["index"] == index]
    else:
        same = [call for call in calls if not name or call.get("id") == name][-1:]
    if not same:
        same = [{"index": index, "function": {"name": "", "arguments": ""}}]
        calls.extend(same)
    return same[0]


def _merge_function(function: dict[str, Any], delta: Mapping[str, Any]) -> None:
    name, arguments = (_written(delta.get(key)) for key in ("name", "arguments"))
    # Some services repeat the whole name in every delta, others send it in pieces.
    function["name"] += "" if name == function["name"] else name
    _add(function, "arguments", arguments)


def _written(value: Any) -> str:
    """Arguments are JSON in a text; some services send the object."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
