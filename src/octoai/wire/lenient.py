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
_PARTS = frozenset({"delta", "message", "text"})  # where the three kinds of choices have what was generated


def read(model: type[R], value: Any) -> R:
    """The parsed JSON as the model. ValueError where it is plainly no such thing."""
    if not isinstance(value, dict) or ("choices" in model.model_fields and not _has_choices(model, value)):
        raise ValueError(f"it is not a {model.__name__}")
    with suppress(ValidationError):
        return model.model_validate(value)
    fields = model.model_fields
    given = {
        name: _field(field, value.get(name)) for name, field in fields.items() if name in value or field.is_required()
    }
    made = model.model_construct(set(value), **given)
    # Not as arguments: a key may have the name of one that `model_construct` has itself.
    extra = {key: item for key, item in value.items() if key not in fields}
    object.__setattr__(made, "__pydantic_extra__", extra)  # records are frozen
    return made


def _has_choices(model: type[Record], value: dict[str, Any]) -> bool:
    """Whether there are choices, and neither an error instead of them nor the text of another kind of answer."""
    choices = value.get("choices")
    if value.get("error") or not isinstance(choices, list):
        return False
    (kind,) = get_args(model.model_fields["choices"].annotation)
    return all(isinstance(each, dict) and _is_choice(kind, each) for each in choices)


def _is_choice(kind: type[Record], choice: dict[str, Any]) -> bool:
    if choice.get("error") or not all(isinstance(choice.get(name) or {}, dict) for name in ("delta", "message")):
        return False
    own, others = _PARTS & kind.model_fields.keys(), _PARTS - kind.model_fields.keys()
    is_other = all(choice.get(name) is None for name in own) and any(choice.get(name) for name in others)
    return not is_other


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
