"""What an event says, checked: of a choice its number, its text, what the model thinks, and the tools that it calls; of
its usage how many tokens there are.

Pure. What is not the protocol's raises ValueError, TypeError or AttributeError; what is no event at all, EngineFailed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from octoai.server.engines.openai.plain import MAX_TOKENS
from octoai.server.errors import EngineFailed

Choice = Mapping[str, Any]
Call = Mapping[str, Any]


def decoded(payload: bytes, what: str = "an event") -> Mapping[str, Any]:
    try:
        said = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise EngineFailed(f"The engine sent {what} that is not JSON.") from None
    if not isinstance(said, dict):
        raise EngineFailed(f"The engine sent {what} that is not an object.")
    return said


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
    one, and some say the same of every call. What a call is called is said once, with the first of its pieces that
    has it: who puts them together may add up whatever comes."""

    def __init__(self) -> None:
        self._of_choices: dict[int, _Numbers] = {}

    def numbered(self, choice: int, calls: Any) -> Sequence[Call]:
        if not isinstance(calls, list):
            raise TypeError(calls)
        numbers = self._of_choices.setdefault(choice, _Numbers())
        return [_numbered(call, numbers) for call in calls]


def _numbered(call: Call, numbers: _Numbers) -> Call:
    """The first piece also has what clients take for granted in it: of what type it is, and a function."""
    id_, function = _string(call.get("id")), _function(call.get("function") or {})
    name, arguments = function.get("name") or "", function.get("arguments") or ""
    number = numbers.of(call.get("index"), id_, name, arguments)
    known = numbers.known[number]
    numbered = {**call, "index": number}
    if known.is_begun:
        numbered.pop("type", None)
    else:
        numbered["type"] = "function"
        function = {**function, "arguments": arguments}
    if known.id and id_:
        del numbered["id"]
    if function:
        is_said = bool(name) and name == known.name
        numbered["function"] = {key: function[key] for key in function if not (is_said and key == "name")}
    known.add(id_, name, arguments)
    return numbered


class _Known:
    """A call, as far as it has come."""

    is_begun = False

    def __init__(self) -> None:
        self.id = self.name = ""
        self._arguments: list[str] = []

    def add(self, id_: str, name: str, arguments: str) -> None:
        self.is_begun = True
        self.id, self.name = self.id or id_, self.name or name
        if arguments:
            self._arguments.append(arguments)

    def is_before(self, id_: str, name: str, arguments: str) -> bool:
        """Whether what comes under the same number is another call: it has a name and another id, and nothing is
        missing here. Ollama, which says 0 of every call, says each in one piece. vLLM made up an id for each piece, and
        until about 0.8 said the name with it where the tool was chosen, also with a last piece of nothing."""
        has_other = bool(self.id and id_ and name) and id_ != self.id
        has_none = not self._arguments and not arguments  # of a tool that takes nothing
        return has_other and (name != self.name or has_none or (bool(arguments.strip()) and self._is_whole()))

    def _is_whole(self) -> bool:
        if not self._arguments or not self._arguments[-1].rstrip().endswith(("}", "null")):
            return False
        try:
            orjson.loads("".join(self._arguments))
        except orjson.JSONDecodeError:
            return False
        return True


class _Numbers:
    """Of the calls of one choice: how many began before. Clients keep them in a list, and not every server counts from
    0."""

    def __init__(self) -> None:
        self.known: list[_Known] = []
        self._last = 0
        self._meant: dict[int, int] = {}  # by the number that the server says

    def of(self, said: Any, id_: str, name: str, arguments: str) -> int:
        """Of the call that a piece belongs to."""
        if said is None:
            number = self._unsaid(id_, name)
            self._meant.setdefault(number, number)
        elif type(said) is not int or said < 0:
            raise ValueError(said)
        else:
            number = self._meant[said] = self._number(said, id_, name, arguments)
        if number == len(self.known):
            self.known.append(_Known())
        self._last = number
        return number

    def _unsaid(self, id_: str, name: str) -> int:
        """What has the id of a call goes on with it; otherwise another id begins another call, and another name."""
        for number, call in enumerate(self.known if id_ else ()):
            if call.id == id_:
                return number
        last = self.known[self._last] if self.known else _Known()
        begins = (id_ and last.id) or (name and last.name)
        return len(self.known) if begins else self._last

    def _number(self, said: int, id_: str, name: str, arguments: str) -> int:
        number = self._meant.get(said)
        if number is None or self.known[number].is_before(id_, name, arguments):
            return len(self.known)
        return number


def _function(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its arguments are JSON in a string, which some servers leave out."""
    arguments = function.get("arguments")
    _string(function.get("name"))
    if arguments is None or isinstance(arguments, str):
        return function
    return {**function, "arguments": orjson.dumps(arguments).decode()}
