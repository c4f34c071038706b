"""The base of every object a user meets: pydantic v2 underneath, the original SDK's manners on top.

OctoAI 1.x objects were frozen pydantic-v1 models, and code relies on it: `.dict()`, `.json()`,
`dict(response)`, unknown keys kept as attributes. Pydantic v2 still has those names but warns about
each; they are given here without a warning, next to pydantic's own (`model_dump`, `model_validate`, …).

Knows nothing of HTTP: an answer's status and headers are attached by the client (`Answer`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Optional, TypeVar, cast

from pydantic import BaseModel, ConfigDict

Self = TypeVar("Self", bound="Record")
if TYPE_CHECKING:  # pydantic's metaclass has no public name
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


_DUMPS = ("allow_nan", "cls", "default", "ensure_ascii", "indent", "separators", "skipkeys", "sort_keys")
_AS_RECEIVED: dict[str, Any] = {"by_alias": True, "warnings": False}  # also what is not of its type (`lenient`)
JsonObject = dict[str, Any]  # inside the class, `dict` is a method


class _RecordType(ModelMetaclass):
    """Keeps `Model.__fields__`, which pydantic v2 answers with a deprecation warning."""

    @property
    def __fields__(cls) -> dict[str, Any]:
        return cast("dict[str, Any]", getattr(cls, "__pydantic_fields__", {}))


class Record(BaseModel, metaclass=_RecordType):  # noqa: PLW1641  # pydantic gives frozen models their hash
    """A frozen value that crosses the network; keeps the keys it does not know."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        populate_by_name=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        defer_build=True,
    )

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise TypeError(f'"{type(self).__name__}" is immutable and does not support item assignment')

    def __delattr__(self, name: str) -> NoReturn:
        raise TypeError(f'"{type(self).__name__}" is immutable and does not support item deletion')

    # What pydantic v1 called these. Names, arguments and results are v1's, as the original SDK set them.

    def __eq__(self, other: object) -> bool:
        """Also to what `dict()` gives."""
        return self.dict() == other if isinstance(other, Mapping) else super().__eq__(other)

    def dict(self, **kwargs: Any) -> JsonObject:
        """Keys as on the wire: what was received or set (null included), and every value that is not null."""
        if kwargs.pop("skip_defaults", None):
            kwargs["exclude_unset"] = True
        return cast("JsonObject", as_received(self, **kwargs))

    def json(self, **kwargs: Any) -> str:
        """Takes pydantic's arguments and, as v1 did, those of `json.dumps`, which also writes what is not Unicode."""
        import json

        options = {**_AS_RECEIVED, "exclude_unset": True, **kwargs}
        dumps = {name: options.pop(name) for name in _DUMPS if name in options}
        options.pop("models_as_dict", None)  # an encoder of models would write the same
        encoder = options.pop("encoder", None)
        return json.dumps(self.model_dump(mode="python" if encoder else "json", **options), default=encoder, **dumps)

    def copy(  # type: ignore[override]
        self: Self,
        *,
        include: Optional[Collection[str]] = None,
        exclude: Collection[str] = (),
        update: Optional[Mapping[str, Any]] = None,
        deep: bool = False,
    ) -> Self:
        """`include` and `exclude` are names of fields."""
        copy = self.model_copy(update=update, deep=deep)
        for name, _ in self:
            if (name in exclude or (include is not None and name not in include)) and name not in (update or ()):
                for kept in (copy.__dict__, copy.__pydantic_extra__ or {}):
                    kept.pop(name, None)
                copy.__pydantic_fields_set__.discard(name)
        return copy

    @property
    def __fields__(self) -> JsonObject:
        return cast("JsonObject", type(self).__pydantic_fields__)

    @property
    def __fields_set__(self) -> set[str]:
        return self.model_fields_set

    @classmethod
    def parse_obj(cls: type[Self], obj: Any) -> Self:
        return cls.model_validate(obj)

    @classmethod
    def parse_raw(cls: type[Self], b: str | bytes, **_: Any) -> Self:
        return cls.model_validate_json(b)

    @classmethod
    def schema(cls, by_alias: bool = True, **_: Any) -> JsonObject:  # type: ignore[override]
        return cls.model_json_schema(by_alias=by_alias)

    @classmethod
    def schema_json(cls, *, by_alias: bool = True, **kwargs: Any) -> str:
        import json

        return json.dumps(cls.model_json_schema(by_alias=by_alias), **kwargs)

    @classmethod
    def construct(cls: type[Self], _fields_set: Optional[set[str]] = None, **values: Any) -> Self:
        return cls.model_construct(_fields_set, **values)


@dataclass(frozen=True)
class RawResponse:
    """What came over HTTP: `headers` has lower-case names; `body` is the bytes as received."""

    status_code: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class Answer(Record):
    """A record that is a whole HTTP answer, and remembers which one."""

    @property
    def raw_response(self) -> Optional[RawResponse]:
        """The HTTP answer it was read from; None for one built by hand or gathered from a stream."""
        return cast("Optional[RawResponse]", self.__dict__.get("_raw_response"))

    @property
    def request_id(self) -> Optional[str]:
        """The service's `x-request-id`: what to quote when something is wrong."""
        return cast("Optional[str]", self.__dict__.get("_request_id"))

    def attach(self: Self, raw: Optional[RawResponse], request_id: Optional[str]) -> Self:
        """Remember the HTTP answer. Outside the fields: equality, `dict()` and hashing do not see it."""
        self.__dict__["_raw_response"] = raw
        self.__dict__["_request_id"] = request_id
        return self


def as_received(model: BaseModel, **kwargs: Any) -> Any:
    """What was received or set (null included), and every value that is not null; also of a user's own model."""
    received = model.model_dump(**{**_AS_RECEIVED, "exclude_unset": True, **kwargs})
    present = model.model_dump(**{**_AS_RECEIVED, "exclude_none": True, **kwargs})
    return _union(received, present)


def _union(received: Any, present: Any) -> Any:
    """Both views of the same object in one, lists element by element."""
    if isinstance(received, dict) and isinstance(present, dict):
        merged = {key: _union(value, present[key]) if key in present else value for key, value in received.items()}
        return {**merged, **{key: value for key, value in present.items() if key not in received}}
    if isinstance(received, list) and isinstance(present, list) and len(received) == len(present):
        return [_union(old, new) for old, new in zip(received, present, strict=True)]
    return present
