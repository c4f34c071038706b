"""A whole answer from the events of its stream. Pure.

Works on the events as received, so that whatever a service adds (other keys, other deltas) is gathered, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def text_of(events: Iterable[bytes]) -> str:
    """The text of the first choice."""
    parts: list[str] = []
    for data in events:
        chunk = json.loads(data)
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if isinstance(choices, list):
            parts.extend(_text(choice) for choice in choices if isinstance(choice, dict) and not choice.get("index"))
    return "".join(parts)


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
            choice = choices.setdefault(part.get("index") or 0, {"index": part.get("index") or 0})
            _merge_choice(choice, part)
        answer.update({key: value for key, value in chunk.items() if value is not None or key not in answer})
    return answer, [choices[index] for index in sorted(choices)]


def _with_message(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.pop("delta", {})
    for call in message.get("tool_calls") or ():
        del call["index"]
    return {**choice, "message": {"role": "assistant", "content": None, **message}}


def _merge_choice(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if key == "delta":
            _merge_delta(choice.setdefault("delta", {}), value or {})
        elif key == "text":
            choice["text"] = (choice.get("text") or "") + (value or "")
        elif key == "logprobs" and isinstance(value, dict):
            _merge_logprobs(choice, value)
        elif key != "index" and (value is not None or key not in choice):
            choice[key] = value


def _merge_logprobs(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        logprobs = choice["logprobs"] = {}
    for key, value in part.items():
        if isinstance(value, list):
            logprobs[key] = [] if logprobs.get(key) is None else logprobs[key]
            logprobs[key].extend(value)
        elif value is not None or key not in logprobs:
            logprobs[key] = value


def _merge_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls" and value:
            _merge_tool_calls(message, value)
        elif isinstance(value, str) and key != "role" and isinstance(message.get(key), str):
            message[key] += value
        elif value is not None or key not in message:
            message[key] = value


def _merge_tool_calls(message: dict[str, Any], deltas: Iterable[Mapping[str, Any]]) -> None:
    calls = message.setdefault("tool_calls", [])
    if calls is None:
        calls = message["tool_calls"] = []
    for delta in deltas:
        index = delta.get("index", 0)
        call = next((call for call in calls if call["index"] == index), None)
        if call is None:
            call = {"index": index, "function": {"name": "", "arguments": ""}}
            calls.append(call)
        call.update({k: v for k, v in delta.items() if k not in ("function", "index") and v is not None})
        function = delta.get("function") or {}
        name = function.get("name") or ""
        # Some services repeat the whole name in every delta, others send it in pieces.
        call["function"]["name"] += "" if name == call["function"]["name"] else name
        call["function"]["arguments"] += function.get("arguments") or ""
