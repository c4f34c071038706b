"""What structure an answer is to have: `response_format`, `tools` and `tool_choice`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octoai.server.errors import BadRequest
from octoai.server.json_schema.schema import bounded, refuse_unbounded_tools
from octoai.server.params.bodies import MAX_SHOWN_KEY, invalid

MAX_NAMED = 20  # of the tools that there are, where another one is to be called


def checked_tools(tools: Sequence[Mapping[str, Any]] | None, choice: Any) -> tuple[dict[str, Any], ...]:
    must_call = choice not in (None, "auto", "none")
    if not tools:
        if must_call:
            raise BadRequest("tool_choice: there are no tools to call; give some or leave it out", param="tool_choice")
        return ()
    if must_call:
        _refuse_unknown(choice, [tool["function"]["name"] for tool in tools])
        refuse_unbounded_tools([tool["function"].get("parameters") or {} for tool in tools])
    return tuple([{**tool, "type": "function"} for tool in tools])


def _refuse_unknown(choice: Any, names: Sequence[str]) -> None:
    """400 for a function that is to be called and is not among the tools."""
    if choice == "required" or choice["function"]["name"] in names:
        return
    known = ", ".join(name[:MAX_SHOWN_KEY] for name in names[:MAX_NAMED])
    raise BadRequest(
        f"tool_choice: no tool is called `{choice['function']['name'][:MAX_SHOWN_KEY]}`; there is {known}",
        param="tool_choice",
    )


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
