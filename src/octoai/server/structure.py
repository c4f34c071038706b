"""What structure an answer is to have: `response_format`, `tools` and `tool_choice`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octoai.server.bodies import invalid
from octoai.server.json_schema import bounded, refuse_unbounded_tools


def checked_tools(tools: Sequence[Mapping[str, Any]] | None, choice: Any) -> tuple[dict[str, Any], ...]:
    if not tools:
        return ()
    if choice not in (None, "auto", "none"):
        refuse_unbounded_tools([tool["function"].get("parameters") or {} for tool in tools])
    return tuple([{**tool, "type": "function"} for tool in tools])


def schema_of(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON Schema that the text must follow: {} for any object, None for free text."""
    if response_format is None or response_format["type"] == "text":
        return None
    if response_format["type"] == "json_object":
        return bounded(response_format.get("schema") or {})
    named = response_format.get("json_schema")
    if named is None:
        raise invalid(("response_format", "json_schema"), "Field required", "missing")
    return bounded(named.get("schema") or {})
