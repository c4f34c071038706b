"""Nested query parameters."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["encode_query"]


def encode_query(query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Flat: `{"a": {"b": 1}}` becomes `{"a[b]": 1}`."""
    return None if query is None else dict(pair for key, value in query.items() for pair in _pairs(key, value))


def _pairs(key: str, value: Any) -> list[tuple[str, Any]]:
    if hasattr(value, "dict") and not isinstance(value, dict):
        value = value.dict()
    if isinstance(value, dict):
        return [pair for inner, one in value.items() for pair in _pairs(f"{key}[{inner}]", one)]
    return [(key, value)]
