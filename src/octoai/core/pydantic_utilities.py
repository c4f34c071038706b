"""Two views of one object in one."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["deep_union_pydantic_dicts"]


def deep_union_pydantic_dicts(source: dict[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    """`destination`, with everything of `source` put into it, dictionary by dictionary."""
    for key, value in source.items():
        node = destination.get(key)
        if isinstance(value, dict) and isinstance(node, dict):
            deep_union_pydantic_dicts(value, node)
        else:
            destination[key] = value
    return destination
