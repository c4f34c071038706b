"""What users pass, whatever it is, as JSON. Pure."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from decimal import Decimal
from types import GeneratorType
from typing import Any

from octoai.wire.record import as_received

_LISTS = (list, tuple, set, frozenset, deque, GeneratorType)


def encoded(body: Any) -> bytes:
    """As JSON. ASCII only: what is not Unicode (a lone surrogate) still reaches the service as it is."""
    return json.dumps(plain(body), separators=(",", ":"), allow_nan=False).encode()


def plain(value: Any, fallback: Callable[[Any], Any] | None = None) -> Any:
    """What JSON knows, from whatever users pass: models of either pydantic, dataclasses, enums, dates, bytes."""
    if value is None or isinstance(value, bool | int | float | str):
        return getattr(value, "value", value)  # members of str and int enums
    if isinstance(value, Mapping):
        return {text(getattr(key, "value", key)): plain(item, fallback) for key, item in value.items()}
    if isinstance(value, _LISTS):
        return [plain(item, fallback) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({item.name: getattr(value, item.name) for item in dataclasses.fields(value)}, fallback)
    return _plain_object(value, fallback)


def _plain_object(value: Any, fallback: Callable[[Any], Any] | None) -> Any:
    if isinstance(value, type):
        raise TypeError(f"a class ({value.__name__}) cannot be sent as JSON")
    if hasattr(value, "model_dump"):
        return plain(as_received(value), fallback)
    if callable(getattr(value, "dict", None)):
        is_model = hasattr(value, "__fields_set__")  # of pydantic v1
        return plain(value.dict(by_alias=True) if is_model else value.dict(), fallback)
    if callable(getattr(value, "isoformat", None)):
        return value.isoformat()
    if callable(getattr(value, "total_seconds", None)):
        return value.total_seconds()
    if hasattr(value, "value") and hasattr(value, "name"):
        return plain(value.value, fallback)
    if isinstance(value, uuid.UUID | os.PathLike):
        return str(value)
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    return _plain_attributes(value, fallback)


def _plain_attributes(value: Any, fallback: Callable[[Any], Any] | None) -> Any:
    """The last attempt, as the original's: of an object that nothing is known of, what it holds."""
    if callable(getattr(value, "keys", None)):
        return plain(dict(value), fallback)
    if hasattr(value, "__dict__") and not callable(value):
        return plain(vars(value), fallback)
    if fallback is not None:
        return fallback(value)
    raise TypeError(f"an object of type {type(value).__name__} cannot be sent as JSON")


def text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else str(value)
