"""Objects as what JSON knows."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["jsonable_encoder"]


def jsonable_encoder(obj: Any, custom_encoder: dict[type, Callable[[Any], Any]] | None = None) -> Any:
    """Models, dataclasses, enums, dates and bytes, however nested, as JSON has them."""
    from octoai._json import plain

    for kind, encode in (custom_encoder or {}).items():
        if isinstance(obj, kind):
            return encode(obj)
    return plain(obj, str)
