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
    waiting: list[tuple[Any, Any]] = [(whole, None)]  # with the one that each stands in, and its name there
    while waiting:
        found, outer = waiting.pop()
        if found is part:
            return ".".join(reversed([str(name)[:100] for name in _names(outer)]))
        waiting.extend((each, (outer, name)) for name, each in _inner(found))
    return ""


def _names(outer: Any) -> Iterator[Any]:
    while outer is not None:
        outer, name = outer
        yield name


def check_types(schema: Schema) -> None:
    """A schema of several types is read as one of each, whatever is in it. Raises Unbounded."""
    types = schema.get("type")
    if types is None or isinstance(types, str):
        return
    if not isinstance(types, list) or not all(isinstance(each, str) for each in types):
        raise Unbounded("type is neither a name, as 'object', nor a list of names")
    if any(types.count(each) > 1 for each in types[:10]) or len(types) > 10:
        raise Unbounded("a list of types has each of them once")


def _inner(found: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(found, dict):
        yield from found.items()
    elif isinstance(found, list):
        yield from enumerate(found)
