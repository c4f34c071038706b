"""The keywords of a schema, by what they are about: which of them llama.cpp looks at, and which hold schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
MAX_INTEGER = 2**63 - 1
REPEATED_AT_MOST = 2000  # of more llama.cpp makes no grammar, or no bound
DEFINITIONS = frozenset({"$defs", "definitions"})
NAMED = DEFINITIONS | {"properties", "patternProperties", "dependentSchemas"}
VALUES = frozenset({"const", "enum", "default", "examples"})  # not schemas
CHOICES = ("oneOf", "anyOf")
COMBINING = frozenset({"$ref", "allOf", *CHOICES})
# What llama.cpp looks at. All else says something to people, or nothing.
READ = COMBINING | {
    *("properties", "additionalProperties", "const", "enum", "format", "items", "pattern", "prefixItems", "required"),
    *("type", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum"),
}
LEAST = frozenset({"minItems", "minLength", "minProperties", "minimum", "exclusiveMinimum"})
MOST = frozenset({"maxItems", "maxLength", "maxProperties", "maximum", "exclusiveMaximum"})
# More than that limits nothing, as far as llama.cpp can tell, or is what tools write for no limit.
_NO_LIMIT = {"maxLength": REPEATED_AT_MOST, "maxItems": REPEATED_AT_MOST - 1, "maxProperties": 2**31 - 1}
_NO_LIMIT |= {"maximum": MAX_INTEGER, "exclusiveMaximum": MAX_INTEGER}


class Unbounded(ValueError):
    """The schema cannot be offered to an engine. The text says why."""


def limits_nothing(name: str, limit: Any) -> bool:
    return name in _NO_LIMIT and isinstance(limit, (int, float)) and limit > _NO_LIMIT[name]


def number(schema: Schema, name: str) -> int | float | None:
    value = schema.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def named(schema: Schema, name: str) -> Mapping[str, Any]:
    """Schemas by their names, where they are."""
    value = schema.get(name)
    return value if isinstance(value, dict) else {}


def listed(schema: Schema, name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def types_of(schema: Schema) -> list[str]:
    """Those that are named; none where it may be any."""
    types = schema.get("type")
    return [each for each in (types if isinstance(types, list) else [types]) if isinstance(each, str)]


def place_of(part: Schema, whole: Any) -> str:
    """Where it stands, in words for people: `properties.a.items`."""
    waiting: list[tuple[str, Any]] = [("", whole)]
    while waiting:
        place, found = waiting.pop()
        if found is part:
            return place[1:]
        waiting.extend((f"{place}.{name}", each) for name, each in _inner(found))
    return ""


def _inner(found: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(found, dict):
        yield from found.items()
    elif isinstance(found, list):
        yield from enumerate(found)
