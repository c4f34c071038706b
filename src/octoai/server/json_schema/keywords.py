"""The keywords of a schema, by what they are about: which llama.cpp looks at, which hold schemas, and where one is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]
ANYTHING: Schema = {}  # what `true` says as well
MAX_INTEGER = 2**63 - 1
REPEATED_AT_MOST = 2000  # of more llama.cpp makes no grammar, or no bound
CHOICES = ("oneOf", "anyOf")
COMBINING = frozenset({"$ref", "allOf", *CHOICES})
OF_SCHEMAS = ("additionalProperties", "items", "prefixItems", *CHOICES)
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
_DIGITS = re.compile(r"\s*\+?([0-9]{1,4000})")


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


def alternatives(schema: Schema) -> list[Schema]:
    return [each for key in CHOICES if key in schema for each in listed(schema, key) if isinstance(each, dict)]


def within(schema: Schema) -> list[Schema]:
    """The schemas in it that llama.cpp looks at, but for what a $ref refers to."""
    found = list(named(schema, "properties").values())
    for key in OF_SCHEMAS:
        if key in schema:
            found += schema[key] if isinstance(schema[key], list) else [schema[key]]
    return [each for each in found if isinstance(each, dict)]


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
            names: list[str] = []
            while outer is not None:
                outer, name = outer
                names.insert(0, str(name)[:100])
            return ".".join(names)
        inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        waiting.extend((each, (outer, name)) for name, each in inner)
    return ""


def target(schema: Schema, reference: str) -> Schema | None:
    """What a reference within the whole schema refers to, as llama.cpp finds it; None where it finds nothing, and
    refuses it."""
    found: Any = schema
    for name in () if reference == "#" else reference.removeprefix("#/").split("/"):
        if found is None:
            break
        if isinstance(found, dict):
            plain = name.replace("~1", "/").replace("~0", "~")
            found = next((found[each] for each in (name, plain, unquote(plain)) if each in found), None)
        elif isinstance(found, list):  # a number as C reads it: up to what is no digit
            digits = _DIGITS.match(name)
            found = found[int(digits[1])] if digits and int(digits[1]) < len(found) else None
    return ANYTHING if found is True else found if isinstance(found, dict) else None


def check_types(schema: Schema) -> None:
    """A schema of several types is read as one of each, whatever is in it. Raises Unbounded."""
    types = schema.get("type")
    if types is None or isinstance(types, str):
        return
    if not isinstance(types, list) or not all(isinstance(each, str) for each in types):
        raise Unbounded("type is neither a name, as 'object', nor a list of names")
    if any(types.count(each) > 1 for each in types[:10]) or len(types) > 10:
        raise Unbounded("a list of types has each of them once")
