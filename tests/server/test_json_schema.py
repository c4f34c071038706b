"""Schemas that would hold everybody's engine up are refused before it sees them."""

from __future__ import annotations

from typing import Any

import pytest

from octoai.server.errors import BadRequest
from octoai.server.json_schema import MAX_ALTERNATIVES, bounded


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"a": {"enum": list(range(900))}}},
        {"type": "string", "pattern": "a" * 2000},
        {"properties": {"enum": {"type": "string"}, "pattern": {"type": "integer"}}},
    ],
)
def test_schemas_of_a_usual_size_pass(schema: dict[str, Any]) -> None:
    assert bounded(schema) is schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": list(range(MAX_ALTERNATIVES + 1))}, "enum values"),
        ({"anyOf": [{"const": number} for number in range(MAX_ALTERNATIVES + 1)]}, "branches"),
        ({"allOf": [{"properties": {f"{n}{m}": {} for m in range(100)}} for n in range(11)]}, "properties"),
        ({"type": "string", "pattern": "a|" * 1001}, "pattern"),
        ({"description": "x" * 200_000}, "bytes"),
    ],
)
def test_schemas_beyond_the_bounds_are_refused_by_name(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        bounded({"type": "object", "properties": {"deep": {"items": schema}}})
    assert refused.value.param == "response_format"
