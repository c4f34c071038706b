"""Schemas in other words that mean the same, where llama.cpp reads the usual ones as something else.

It makes one grammar of a schema, whose rules have the names of what they were made for, but for what is neither a Latin
letter nor a digit: `$defs` whose names are Chinese are all one rule to it, as are `Item_` and `Item__`, and a property
that is called like one of them. So what is referred to gets names of ours, which nobody else knows.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

MAX_PARTS = 20_000  # with what $refs stand for, in an allOf each time: 240,000 took llama.cpp 8 s
MAX_COUNT = 2**31 - 1
MAX_INTEGER = 2**63 - 1
DEFINITIONS = frozenset({"$defs", "definitions"})
NAMED = DEFINITIONS | {"properties", "patternProperties", "dependentSchemas"}
VALUES = frozenset({"const", "enum", "default", "examples"})  # not schemas
# More than that limits nothing, and is what tools write for no limit: llama.cpp cannot read it.
_MOST = dict.fromkeys(("maxLength", "maxItems", "maxProperties"), MAX_COUNT)
_MOST |= {"maximum": MAX_INTEGER, "exclusiveMaximum": MAX_INTEGER}
# What llama.cpp looks at. All else says something to people, or nothing.
_READ = NAMED | {
    *("$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "format", "items", "oneOf", "pattern"),
    *("prefixItems", "required", "type", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum"),
}
_DIGITS = re.compile(r"\s*\+?([0-9]{1,4000})")
_UNKNOWN_NAME = secrets.token_hex(4)
Schema = Mapping[str, Any]


class TooLarge(ValueError):
    """There are more than MAX_PARTS."""


def limits_nothing(name: str, limit: Any) -> bool:
    return name in _MOST and isinstance(limit, (int, float)) and limit > _MOST[name]


def rewritten(schema: Schema) -> Schema:
    """As llama.cpp reads it rightly. Raises TooLarge."""
    return _Rewriting(schema).done()


class _Rewriting:
    """Each part that is referred to stands once among the definitions, and no other does."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._num_parts = 0
        self._names: dict[int, str] = {}  # by the id of what is referred to
        self._waiting: list[tuple[str, Schema]] = []

    def done(self) -> Schema:
        whole = _rewritten(self._schema, self._part)
        definitions = {}
        while self._waiting:
            name, part = self._waiting.pop()
            definitions[name] = _rewritten(part, self._part)
        return {**whole, "$defs": definitions} if definitions else whole

    def _part(self, part: Schema) -> Schema:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise TooLarge
        part = _of_its_only_one(part)
        part = {key: value for key, value in part.items() if key not in DEFINITIONS and not limits_nothing(key, value)}
        found = target(self._schema, part["$ref"]) if isinstance(part.get("$ref"), str) else None
        return part if found is None else part | {"$ref": f"#/$defs/{self._name(found)}"}

    def _name(self, found: Schema) -> str:
        if id(found) not in self._names:
            # It ends in a letter: llama.cpp counts up rules of one name by digits behind it.
            self._names[id(found)] = f"r{_UNKNOWN_NAME}n{len(self._names)}x"
            self._waiting.append((self._names[id(found)], found))
        return self._names[id(found)]


def target(schema: Schema, reference: str) -> Schema | None:
    """What a reference within the whole schema refers to, as llama.cpp finds it; None where it finds nothing, and
    refuses it."""
    found: Any = schema
    for name in () if reference == "#" else reference.removeprefix("#/").split("/"):
        if found is None:
            break
        if isinstance(found, dict):
            found = found.get(name, found.get(name.replace("~1", "/").replace("~0", "~")))
        elif isinstance(found, list):
            number = _number(name)
            found = found[number] if number is not None and number < len(found) else None
    return found if isinstance(found, dict) else None


def _number(text: str) -> int | None:
    """As C reads it: up to what is no digit."""
    digits = _DIGITS.match(text)
    return int(digits[1]) if digits else None


def _of_its_only_one(schema: Schema) -> Schema:
    """An `allOf` of one schema is that schema: tools write it to say something about what they refer to. llama.cpp
    makes an object of every `allOf`, also of one of a text."""
    members = schema.get("allOf")
    if not isinstance(members, list) or len(members) != 1 or not isinstance(members[0], dict):
        return schema
    notes = {key: value for key, value in schema.items() if key != "allOf"}
    return schema if _READ & notes.keys() - DEFINITIONS else _of_its_only_one({**members[0], **notes})


def _rewritten(schema: Schema, change: Callable[[Schema], Schema]) -> dict[str, Any]:
    """With the change made to it, and to each schema within."""
    kept = dict(change(schema))
    for key, value in kept.items():
        if isinstance(value, list) and key not in VALUES:
            kept[key] = [_rewritten(each, change) if isinstance(each, dict) else each for each in value]
        elif isinstance(value, dict) and key in NAMED:
            kept[key] = {
                name: _rewritten(each, change) if isinstance(each, dict) else each for name, each in value.items()
            }
        elif isinstance(value, dict) and key not in VALUES:
            kept[key] = _rewritten(value, change)
    return kept
