"""What a `$ref` of a schema refers to, as llama.cpp finds it."""

from __future__ import annotations

import re
from typing import Any

from octoai.server.rewriting import Schema

_DIGITS = re.compile(r"\s*\+?([0-9]{1,4000})")


def target(schema: Schema, reference: str) -> Schema:
    """Within the whole schema; nothing where it refers to nothing, which engines refuse."""
    found: Any = schema
    for name in reference.removeprefix("#/").split("/"):
        if isinstance(found, dict):
            found = found.get(name, found.get(name.replace("~1", "/").replace("~0", "~")))
        elif isinstance(found, list):
            number = _number(name)
            found = found[number] if number is not None and number < len(found) else None
    return found if isinstance(found, dict) else {}


def _number(text: str) -> int | None:
    """As C reads it: up to what is no digit."""
    digits = _DIGITS.match(text)
    return int(digits[1]) if digits else None
