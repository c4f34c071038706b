"""Schemas in other words that mean the same, where an engine reads the usual ones as something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

MAX_COUNT = 2**31 - 1
MAX_INTEGER = 2**63 - 1
DEFINITIONS = frozenset({"$defs", "definitions"})
NAMED = DEFINITIONS | {"properties", "patternProperties", "dependentSchemas"}
VALUES = frozenset({"const", "enum", "default", "examples"})  # not schemas
# More than that limits nothing, and is what tools write for no limit: llama.cpp cannot read it.
_MOST = dict.fromkeys(("maxLength", "maxItems", "maxProperties"), MAX_COUNT)
_MOST |= {"maximum": MAX_INTEGER, "exclusiveMaximum": MAX_INTEGER}
_NOTES = DEFINITIONS | {
    *("$comment", "$id", "$schema", "default", "deprecated", "description", "examples"),
    *("readOnly", "title", "writeOnly"),
}
Schema = Mapping[str, Any]


def limits_nothing(name: str, limit: Any) -> bool:
    return name in _MOST and isinstance(limit, (int, float)) and limit > _MOST[name]


def without_idle_limits(schema: Schema) -> dict[str, Any]:
    """Without the upper limits that limit nothing."""
    return _rewritten(
        schema, lambda part: {key: value for key, value in part.items() if not limits_nothing(key, value)}
    )


def without_lone_all_ofs(schema: Schema) -> Schema:
    """An `allOf` of one schema is that schema: tools write it to say something about what they refer to. llama.cpp
    makes an object of every `allOf`, also of one of a text."""
    said = json.dumps(schema)
    return schema if '"allOf"' not in said or "/allOf/" in said else _rewritten(schema, _of_its_only_one)


def _of_its_only_one(schema: Schema) -> Schema:
    members = schema.get("allOf")
    if not isinstance(members, list) or len(members) != 1 or not isinstance(members[0], dict):
        return schema
    only, notes = members[0], {key: value for key, value in schema.items() if key != "allOf"}
    if not _NOTES.issuperset(notes) or DEFINITIONS & notes.keys() & only.keys():
        return schema
    return _of_its_only_one({**only, **notes})


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
