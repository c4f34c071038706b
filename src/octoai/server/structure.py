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
    """The JSON Schema that the text must follow: {} for any object, None for free text. It stands where OpenAI has it,
    or beside the type, as OctoAI and llama.cpp have it, Hugging Face as `value`."""
    if response_format is None or response_format["type"] == "text":
        return None
    named = response_format.get("json_schema")
    said = ((named or {}).get("schema"), response_format.get("schema"), response_format.get("value"))
    schema = next((each for each in said if each is not None), None)
    if schema is None and (named is not None or response_format["type"] == "json_schema"):
        inner = () if named is None else ("schema",)
        raise invalid(("response_format", "json_schema", *inner), "Field required", "missing")
    return bounded(schema or {})
