"""A part of a schema by itself, and several that are said of one value: in words that llama.cpp follows.

It looks at the values of an `enum` and at nothing beside them, at one of two minima, at an expression as if it were of
the JSON that is written, at required names among the properties only; and takes a tuple for all of an array.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from octoai.server.json_schema.expressions import Unknown, Unreadable
from octoai.server.json_schema.keywords import (
    LEAST,
    MOST,
    READ,
    REPEATED_AT_MOST,
    Schema,
    Unbounded,
    limits_nothing,
    listed,
    named,
    number,
    types_of,
)
from octoai.server.json_schema.written import written

MAX_PATTERN_LENGTH = 2000
_ESCAPED = re.compile(r'["\\\x00-\x1f]')  # in JSON
_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength"})
_PUT_RIGHT = READ - {"type", "properties", "format", "pattern", "minimum", "maximum", "anyOf", "oneOf"}
_HEEDED = READ | LEAST | MOST | {"additionalItems", "nullable"}
_KINDS = {str: "string", bool: "boolean", dict: "object", list: "array", int: "integer", type(None): "null"}
_EXCLUSIVE = {"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}
_BOUNDS_OF = {"string": "Length", "array": "Items", "object": "Properties"}


class Impossible(Exception):
    """No value is all that is said."""


class Unfollowed(Exception):
    """llama.cpp would leave out what is said here. The text says what to write instead."""


def heeded(part: Schema) -> dict[str, Any]:
    """What is looked at of it, by llama.cpp or here: of names with patterns only what is said of their values."""
    found = {key: value for key, value in part.items() if key in _HEEDED and not limits_nothing(key, value)}
    if part.get("additionalProperties") is False and (patterns := named(part, "patternProperties")):
        found["additionalProperties"] = next(iter(patterns.values())) if len(patterns) == 1 else True
    for name, exclusive in _EXCLUSIVE.items():
        if isinstance(found.get(exclusive), bool):  # as JSON Schema had it until its fourth draft, and OpenAPI 3.0 has
            is_exclusive = found.pop(exclusive)
            if is_exclusive and name in found:
                found[exclusive] = found.pop(name)
    return found


def possible(alternatives: Sequence[Any]) -> list[Any]:
    """Without those that no value is. Raises Impossible."""
    found = [each for each in alternatives if each is not False]
    if alternatives and not found:
        raise Impossible
    return found


def put_right(part: dict[str, Any]) -> dict[str, Any]:
    """Raises Impossible and Unfollowed."""
    if _PUT_RIGHT.isdisjoint(part):
        return part
    if "const" in part or "enum" in part:
        return _with_values(part)
    _put_counts_right(part)
    _put_bounds_right(part)
    _put_required_right(part)
    if part.get("additionalProperties") not in (None, False) and named(part, "properties"):
        _put_others_right(part)
    if isinstance(part.get("prefixItems"), list) or isinstance(part.get("items"), list):
        _put_tuple_right(part)
    elif part.get("items") is False:
        if (number(part, "minItems") or 0) > 0:
            raise Impossible
        part |= {"items": {}, "maxItems": 0}
    return part


def _with_values(part: dict[str, Any]) -> dict[str, Any]:
    values = listed(part, "enum")
    if len(READ.intersection(part)) == 1 or ("enum" in part and not values):
        return part
    if "const" in part:
        values = [part["const"]] if not values or _text(part["const"]) in map(_text, values) else []
    fitting = [value for value in values if _fits(value, part)]
    if not fitting:
        raise Impossible
    return {"enum": fitting}


def _text(value: Any) -> str:
    """The same of what is equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _fits(value: Any, part: Schema) -> bool:
    """But for its pattern: an expression that is not ours may take for ever to be looked for."""
    kind, types = _KINDS.get(type(value), "number"), types_of(part)
    if value is None and part.get("nullable") is True:  # as OpenAPI 3.0 has it
        return True
    is_integer = kind == "integer" or (isinstance(value, float) and value.is_integer())
    if types and kind not in types and not (is_integer and not {"integer", "number"}.isdisjoint(types)):
        return False
    if kind == "object":
        is_closed = part.get("additionalProperties") is False
        required = {each for each in listed(part, "required") if isinstance(each, str)}
        if not required <= value.keys() or (is_closed and not value.keys() <= named(part, "properties").keys()):
            return False
    if kind in ("integer", "number"):
        least, most = number(part, "exclusiveMinimum"), number(part, "exclusiveMaximum")
        if (least is not None and value <= least) or (most is not None and value >= most):
            return False
        size, names = value, ("minimum", "maximum")
    elif kind in _BOUNDS_OF:
        size, names = len(value), (f"min{_BOUNDS_OF[kind]}", f"max{_BOUNDS_OF[kind]}")
    else:
        return True
    least, most = number(part, names[0]), number(part, names[1])
    return (least is None or size >= least) and (most is None or size <= most)


def told_pattern(pattern: str) -> str | None:
    """As llama.cpp follows it; None where it does not. Raises Unbounded."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise Unbounded(f"a pattern has more than {MAX_PATTERN_LENGTH} characters")
    try:
        return written(pattern)
    except Unreadable as error:
        raise Unbounded(f"pattern {pattern[:100]}: {error}") from None
    except Unknown:
        return None


def _put_counts_right(part: dict[str, Any]) -> None:
    for name in _COUNTS.intersection(part):
        if isinstance(part[name], float) and part[name].is_integer():  # to JSON Schema 2.0 is a whole number
            part[name] = int(part[name])
        most = REPEATED_AT_MOST - (name == "minItems")
        if name.startswith("min") and (number(part, name) or 0) > most:
            raise Unfollowed(f"{name}: at most {most} can be followed")


def _put_bounds_right(part: dict[str, Any]) -> None:
    for (name, exclusive), weaker in zip(_EXCLUSIVE.items(), (min, max), strict=True):
        bound, other = number(part, name), number(part, exclusive)
        if bound is not None and other is not None:  # where they are equal the exclusive one says more
            del part[name if bound == weaker(bound, other) else exclusive]


def _put_required_right(part: dict[str, Any]) -> None:
    properties, others = named(part, "properties"), part.get("additionalProperties", True)
    missing = [each for each in listed(part, "required") if isinstance(each, str) and each not in properties]
    if not missing:
        return
    if others is False:
        raise Unfollowed(f"required: `{missing[0][:100]}` is not among the properties, and no others are allowed")
    if "properties" not in part:
        part["additionalProperties"] = others
    part["properties"] = {**properties, **dict.fromkeys(missing, others if isinstance(others, dict) else {})}


def _put_others_right(part: dict[str, Any]) -> None:
    """llama.cpp takes names that are none of the properties' by the letters in which they may differ from those."""
    names = sorted(part["properties"])
    if any(map(_ESCAPED.search, names)):
        part["additionalProperties"] = False  # it would begin other names with what is no JSON
        return
    num_rules = 2
    for name, following in pairwise([*names, ""]):
        num_shared = len(commonprefix([name, following]))  # noqa: RUF071 letters are what is meant
        num_rules += 2 * (len(name) - num_shared) - (not following.startswith(name))
    if num_rules > REPEATED_AT_MOST:
        raise Unfollowed(
            "additionalProperties: the names of the properties have too many letters for others beside them "
            f"({num_rules} rules; {REPEATED_AT_MOST} can be followed); set it to false, or give shorter names or fewer"
        )


def _put_tuple_right(part: dict[str, Any]) -> None:
    """An array of just as many items as it must have, where all that may come after those can be left out."""
    name = "prefixItems" if isinstance(part.get("prefixItems"), list) else "items"
    items = list(part[name])
    rest = part.pop("items", True) if name == "prefixItems" else part.get("additionalItems", True)
    num_more = int(number(part, "minItems") or 0) - len(items)
    if num_more > 0 and rest is False:
        raise Impossible
    if num_more > 0:
        items += [rest if isinstance(rest, dict) else {}] * num_more
    most = number(part, "maxItems")
    part[name] = items if most is None else items[: max(0, int(most))]


def both(key: str, said: Sequence[Any]) -> Any:
    """What several say under a keyword of one value, but for their schemas. Raises Impossible and Unfollowed."""
    if key == "type":
        return _types(said)
    if key == "enum":
        wrong = [each for each in said if not isinstance(each, list)]
        return wrong[0] if wrong else _in_all(said)
    if key == "required":
        return [each for names in said if isinstance(names, list) for each in names]
    if key in LEAST | MOST:
        numbers = [each for each in said if isinstance(each, (int, float)) and not isinstance(each, bool)]
        return (max if key in LEAST else min)(numbers) if numbers else said[0]
    if key in ("const", "pattern") and any(_text(each) != _text(said[0]) for each in said):
        if key == "const":
            raise Impossible
        raise Unfollowed(f"{key}: two of them are of one value; write one that says both")
    return said[0]


def _in_all(said: Sequence[list[Any]]) -> list[Any]:
    texts = [set(map(_text, values)) for values in said]
    common = [value for value in said[0] if all(_text(value) in each for each in texts)]
    if not common:
        raise Impossible
    return common


def _types(said: Sequence[Any]) -> list[str] | str:
    together = types_of({"type": said[0]})
    for each in said[1:]:
        others = types_of({"type": each})
        together = [
            *(one for one in together if one in others or (one == "integer" and "number" in others)),
            *(one for one in others if one == "integer" and "number" in together and one not in together),
        ]
    if not together:
        raise Impossible
    return together if len(together) > 1 else together[0]
