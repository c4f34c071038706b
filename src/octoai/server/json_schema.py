"""Which JSON Schemas are accepted for an answer: bounded ones.

An engine turns a schema into a grammar and tries it on every token, for everybody in the same batch: llama.cpp took
0.4 s an answer for an `enum` of 100 values, 7 s for one of 2,000 and did not come back within 30 s from one of 5,000.
The bounds are those that OpenAI documents for structured outputs, where it has one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octoai.server.errors import BadRequest

MAX_BYTES = 128 * 1024
MAX_ALTERNATIVES = 1000
MAX_PATTERN_LENGTH = 2000
_BRANCHES = (
    "anyOf",
    "oneOf",
    "allOf",
    "enum",
    "prefixItems",
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
)


def bounded(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, where it is small enough. Raises BadRequest."""
    size = len(json.dumps(schema))
    if size > MAX_BYTES:
        raise _refusal(f"the schema has {size} bytes; at most {MAX_BYTES} are accepted")
    alternatives = 0
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            alternatives += sum(len(node[key]) for key in _BRANCHES if isinstance(node.get(key), (dict, list)))
            if isinstance(node.get("pattern"), str) and len(node["pattern"]) > MAX_PATTERN_LENGTH:
                raise _refusal(f"a pattern has more than {MAX_PATTERN_LENGTH} characters")
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    if alternatives > MAX_ALTERNATIVES:
        counted = f"{alternatives} properties, branches and enum values"
        raise _refusal(f"the schema has {counted}; at most {MAX_ALTERNATIVES} are accepted")
    return schema


def _refusal(problem: str) -> BadRequest:
    return BadRequest(f"response_format: {problem}", param="response_format")
