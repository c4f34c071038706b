"""What the administration API takes: every field typed and bounded, unknown ones refused, and said which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, Required

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from octoai.server.accounts import MAX_NAME
from octoai.server.billing.money import nanos
from octoai.server.errors import TooLarge
from octoai.server.params import bodies
from octoai.server.times import MAX_TIME
from octoai.server.tokens import MAX_MODELS

MAX_BODY_BYTES = 256 * 1024
_CHECKED = ConfigDict(extra="forbid", strict=True)

_Id = Annotated[str, Field(min_length=1, max_length=64)]
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_Note = Annotated[str, Field(max_length=MAX_NAME)]
_Plan = Literal["free", "pro", "unlimited"]
_Scope = Literal["inference", "usage", "admin"]
_Model = Annotated[str, Field(min_length=1, max_length=128)]
_Models = Annotated[list[_Model], Field(min_length=1, max_length=MAX_MODELS)]
_Scopes = Annotated[list[_Scope], Field(min_length=1, max_length=10)]
_Time = Annotated[int, Field(ge=0, lt=MAX_TIME, description="whole seconds since 1970, UTC")]
_Count = Annotated[int, Field(ge=0, le=10**12)]
_USD = r"[0-9]{1,9}(\.[0-9]{1,9})?"
_Budget = Annotated[str, Field(pattern=f"^{_USD}$", description="USD a calendar month, as a decimal")]
_Amount = Annotated[str, Field(pattern=f"^-?{_USD}$", description="USD, as a decimal")]
_Price = Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,3})?$", description="USD per million tokens")]


class _Limits(TypedDict, total=False):
    """Null is no limit."""

    soft_budget: Optional[_Budget]
    hard_budget: Optional[_Budget]
    requests_per_minute: Optional[_Count]
    prompt_tokens_per_minute: Optional[_Count]
    completion_tokens_per_minute: Optional[_Count]
    concurrent_requests: Optional[_Count]


class AccountChanges(_Limits, total=False):
    """A new plan brings its own limits a minute; those that are given are over them."""

    __pydantic_config__ = _CHECKED  # type: ignore[misc]
    name: _Name
    plan: _Plan
    prepaid: bool
    closed: bool


class NewAccount(_Limits, total=False):
    __pydantic_config__ = _CHECKED  # type: ignore[misc]
    id: Required[_Id]
    name: _Name
    plan: _Plan
    prepaid: bool


class NewCredit(TypedDict, total=False):
    """A grant adds to the balance, an adjustment puts it right, and may be negative."""

    __pydantic_config__ = _CHECKED  # type: ignore[misc]
    amount: Required[_Amount]
    kind: Literal["grant", "adjustment"]
    note: _Note


class TokenChanges(_Limits, total=False):
    """`models` null allows every model, `expires_at` null makes it last."""

    __pydantic_config__ = _CHECKED  # type: ignore[misc]
    name: _Name
    scopes: _Scopes
    models: Optional[_Models]
    expires_at: Optional[_Time]


class NewToken(_Limits, total=False):
    __pydantic_config__ = _CHECKED  # type: ignore[misc]
    name: Required[_Name]
    account: _Id
    scopes: _Scopes
    models: Optional[_Models]
    expires_at: Optional[_Time]


class NewPrice(TypedDict, total=False):
    """Without `valid_from` from now on; without `cached_input` cached tokens cost what others do."""

    __pydantic_config__ = _CHECKED  # type: ignore[misc]
    model: Required[_Model]
    input: Required[_Price]
    output: Required[_Price]
    cached_input: _Price
    valid_from: _Time


class NewRefund(TypedDict, total=False):
    __pydantic_config__ = _CHECKED  # type: ignore[misc]
    note: Required[_Note]


BODIES: Mapping[str, TypeAdapter[Any]] = {
    "NewAccount": TypeAdapter(NewAccount),
    "AccountChanges": TypeAdapter(AccountChanges),
    "NewCredit": TypeAdapter(NewCredit),
    "NewToken": TypeAdapter(NewToken),
    "TokenChanges": TypeAdapter(TokenChanges),
    "NewPrice": TypeAdapter(NewPrice),
    "NewRefund": TypeAdapter(NewRefund),
}


def checked(name: str, body: bytes) -> dict[str, Any]:
    """The fields that were given, by the type of that name. Raises TooLarge, MalformedBody or InvalidBody."""
    if len(body) > MAX_BODY_BYTES:
        raise TooLarge(MAX_BODY_BYTES)
    return bodies.checked(BODIES[name], body)


def split_limits(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int | None]]:
    """(the other fields, limits by the names of `store.accounts.Limits`)."""
    limits: dict[str, int | None] = {}
    for name in _Limits.__annotations__.keys() & given.keys():
        value = given[name]
        if name.endswith("_budget"):
            limits[f"{name}_nanos"] = None if value is None else nanos(value)
        else:
            limits[name] = value
    return {name: value for name, value in given.items() if name not in _Limits.__annotations__}, limits
