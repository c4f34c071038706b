"""Dictionaries without what is None."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["remove_none_from_dict"]


def remove_none_from_dict(original: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in original.items() if value is not None}
