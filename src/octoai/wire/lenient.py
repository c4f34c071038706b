"""An answer that is not quite what the API says it is, as the objects that it comes nearest to.

An answer that was paid for is not lost because of a detail: what is missing is None, and what has another form than
it should stays as it came. Knows no HTTP, and is only asked where validation has failed.
"""

from __future__ import annotations

import types
from contextlib import suppress
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from octoai.wire.record import Record

R = TypeVar("R", bound=Record)


def read(model: type[R], value: Any) -> R:
    """The parsed JSON as the model. ValueError where it is plainly no such thing."""
    if not isinstance(value, dict) or ("choices" in model.model_fields and not _has_choices(value)):
        raise ValueError(f"it is not a {model.__name__}")
    with suppress(ValidationError):
        return model.model_validate(value)
    given = {key: item for key, item in value.items() if key != "_fields_set"}  # no key: `model_construct` has it
    for name, field in model.model_fields.items():
        if name in given or field.is_required():
            given[name] = _field(field, given.get(name))
    return model.model_construct(set(value), **given)


def _has_choices(value: dict[str, Any]) -> bool:
    choices = value.get("choices")
    return isinstance(choices, list) and all(isinstance(each, dict) and _has_objects(each) for each in choices)


def _has_objects(choice: dict[str, Any]) -> bool:
    return all(choice.get(name) is None or isinstance(choice[name], dict) for name in ("delta", "message"))


def _field(field: FieldInfo, value: Any) -> Any:
    if field.annotation is int and not field.is_required() and not isinstance(value, int):
        return field.default  # an index, by which parts are told apart
    return _part(field.annotation, value)


def _part(kind: Any, value: Any) -> Any:
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    records = [each for each in kinds if isinstance(each, type) and issubclass(each, Record)]
    if value is None and kinds == tuple(records):
        return read(records[0], {})
    if isinstance(value, dict) and records:
        return _record(records, value, may_be_none=type(None) in kinds)
    items = next((get_args(each)[0] for each in kinds if get_origin(each) is list), None)
    if isinstance(value, list) and items is not None:
        return [_part(items, item) for item in value]
    return value


def _record(records: list[type[Record]], value: dict[str, Any], *, may_be_none: bool) -> Any:
    for record in records:
        with suppress(ValidationError):
            return record.model_validate(value)
    if not value and may_be_none:  # it says nothing, and must not stand in the way of what was said before
        return None
    # Of several, which is meant cannot be known.
    return read(records[0], value) if len(records) == 1 else value
