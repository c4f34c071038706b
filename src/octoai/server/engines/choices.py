"""What an event says, checked: of a choice its number, its text, what the model thinks, and the tools that it calls; of
its usage how many tokens there are.

Pure. What is not the protocol's raises ValueError, TypeError or AttributeError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from octoai.server.engines.plain import MAX_TOKENS

Choice = Mapping[str, Any]
Call = Mapping[str, Any]


def number_of(choice: Choice, num_choices: int) -> int:
    """Which one it is, of so many."""
    number = choice.get("index")
    if number is None:
        return 0
    if type(number) is not int or not 0 <= number < num_choices:
        raise ValueError(f"choice {number} was not asked for")
    return number


def text_of(choice: Choice) -> str:
    """Where the model declines to answer, and its server says that apart from the text, it is the text."""
    delta = choice.get("delta")
    return _string(choice.get("text") if delta is None else delta.get("content") or delta.get("refusal"))


def reasoning_of(choice: Choice) -> str:
    """Some servers say it under both names."""
    said = choice if choice.get("delta") is None else choice["delta"]
    return _string(said.get("reasoning_content") or said.get("reasoning"))


def reason_of(choice: Choice) -> str:
    """Why it ended; empty where it goes on."""
    return _string(choice.get("finish_reason"))


def tokens_of(count: Any) -> int | None:
    """A number of tokens. What is none is an error: it will be billed."""
    if type(count) is int and 0 <= count < MAX_TOKENS:
        return count
    if count is None:
        return None
    raise ValueError(count)


def thought_of(usage: Mapping[str, Any]) -> int:
    """Nobody is billed by it: what is no number of tokens is no reason to fail an answer."""
    details = usage.get("completion_tokens_details")
    told = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    return told if type(told) is int and told > 0 else 0


def _string(value: Any) -> str:
    if value and not isinstance(value, str):
        raise TypeError(value)
    return value or ""


class Calls:
    """The calls of tools in one answer. They come in pieces, which are put together by a number; not every server says
    one."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, str, bool]] = {}  # number, id, and whether it has its name, by choice

    def numbered(self, choice: int, calls: Any) -> Sequence[Call]:
        if not isinstance(calls, list):
            raise TypeError(calls)
        return [self._numbered(choice, call) for call in calls]

    def _numbered(self, choice: int, call: Call) -> Call:
        id_, number, function = _string(call.get("id")), call.get("index"), call.get("function")
        has_name = bool(function and function.get("name"))
        last, last_id, had_name = self._last.get(choice, (-1, "", False))
        if number is None:  # another id begins another call, and without ids another name
            begins = id_ != last_id if id_ else has_name and had_name
            number = last + 1 if begins else max(0, last)
        if type(number) is not int or number < 0:
            raise ValueError(number)
        is_same = number == last
        self._last[choice] = number, id_ or (last_id if is_same else ""), has_name or (is_same and had_name)
        numbered = {**call, "index": number}
        return {**numbered, "function": _function(function)} if function else numbered


def _function(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its arguments are JSON in a string, which some servers leave out."""
    arguments = function.get("arguments")
    _string(function.get("name"))
    if arguments is None or isinstance(arguments, str):
        return function
    return {**function, "arguments": orjson.dumps(arguments).decode()}
