"""What a request may say. One `TypedDict` per endpoint types the client's keyword arguments and, through
pydantic's `TypeAdapter`, checks the body on the server.

Ranges and defaults are the OctoAI API's (its OpenAPI document of 2024-08-30). Every optional parameter may be
null, which means the same as leaving it out. Unknown keys are kept; the service ignores them, as the original did, but
for those known of other services that would change the answer, which it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, Optional, Required, Union

from pydantic import BeforeValidator, ConfigDict, Field, GetPydanticSchema
from typing_extensions import TypedDict

from octoai.wire.messages import (
    ChatCompletionResponseFormat,
    ChatMessage,
    FunctionChoice,
    StreamOptions,
    ToolDefinition,
)

MAX_TOOLS = 128
MAX_STOPS = 16
MAX_CHOICES = 16

Prompt = Union[str, list[str], list[int], list[list[int]]]
Stop = Union[str, list[str]]

_JSON = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def _checked_as(schema: Any) -> Any:
    """The client's callers may pass objects or mappings; on the wire it is `schema`."""
    return GetPydanticSchema(lambda _source, handler: handler(schema))


class _ImageUrl(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]  # pydantic's own way to configure a TypedDict
    url: Required[str]
    detail: NotRequired[Optional[str]]


class _ContentPart(TypedDict):
    """`type` may be missing: the original SDK dropped it on the way out. Then the other key tells."""

    __pydantic_config__ = _JSON  # type: ignore[misc]
    type: NotRequired[Optional[str]]
    text: NotRequired[Optional[str]]
    image_url: NotRequired[Optional[_ImageUrl]]
    refusal: NotRequired[Optional[str]]


class _Function(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    name: Required[str]
    arguments: NotRequired[Optional[str]]


# Of tools, and of what names or calls one, there is one kind. It comes before what only that kind has: of what is wrong
# the first is told.
_Kind = Literal["function"]
# Of a call that is told again: who put it together from a stream may have no more than this.
_KindOrNone = Annotated[Optional[_Kind], BeforeValidator(lambda kind: kind or None)]


class _ToolCall(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    type: NotRequired[_KindOrNone]
    function: Required[_Function]
    id: NotRequired[Optional[str]]


class MessageParam(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    role: Required[Annotated[str, Field(min_length=1, max_length=64)]]
    content: NotRequired[Union[str, Annotated[list[_ContentPart], Field(fail_fast=True)], None]]
    reasoning_content: NotRequired[Optional[str]]
    refusal: NotRequired[Optional[str]]
    tool_calls: NotRequired[Optional[Annotated[list[_ToolCall], Field(fail_fast=True)]]]
    tool_call_id: NotRequired[Optional[str]]
    name: NotRequired[Optional[str]]


# Of a list the first wrong value is told: an error for each of a million would hold everybody else up for a second.
Messages = Annotated[list[MessageParam], Field(fail_fast=True)]


class _FunctionDefinition(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    name: Required[str]
    description: NotRequired[Optional[str]]
    parameters: NotRequired[Optional[dict[str, Any]]]


class _Tool(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    type: NotRequired[Optional[_Kind]]
    function: Required[_FunctionDefinition]


class _FunctionHandle(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    name: Required[str]


class _FunctionChoice(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    type: NotRequired[Optional[_Kind]]
    function: Required[_FunctionHandle]


class _JsonSchema(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    name: NotRequired[Optional[str]]
    schema: NotRequired[Optional[dict[str, Any]]]
    strict: NotRequired[Optional[bool]]


class _ResponseFormat(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    type: Required[Literal["text", "json_object", "json_schema"]]
    schema: NotRequired[Optional[dict[str, Any]]]
    value: NotRequired[Optional[dict[str, Any]]]
    json_schema: NotRequired[Optional[_JsonSchema]]


class _StreamOptions(TypedDict):
    __pydantic_config__ = _JSON  # type: ignore[misc]
    include_usage: NotRequired[Optional[bool]]


_StopWord = Annotated[str, Field(min_length=1, max_length=1024)]
_ToolChoice = Union[Literal["auto", "required", "none"], _FunctionChoice]


class SamplingParams(TypedDict, total=False):
    """What both endpoints share."""

    model: Required[Annotated[str, Field(min_length=1, max_length=256)]]
    frequency_penalty: Annotated[Optional[float], Field(ge=-2, le=2)]
    ignore_eos: Optional[bool]
    log_prompt: Optional[bool]
    logit_bias: Annotated[Optional[dict[str, Annotated[float, Field(ge=-100, le=100)]]], Field(max_length=1024)]
    loglikelihood: Optional[bool]
    max_tokens: Annotated[Optional[int], Field(ge=1, le=2**31 - 1)]
    min_p: Annotated[Optional[float], Field(ge=0, le=1)]
    n: Annotated[Optional[int], Field(ge=1, le=MAX_CHOICES)]
    peft: Optional[str]
    presence_penalty: Annotated[Optional[float], Field(ge=-2, le=2)]
    repetition_penalty: Annotated[Optional[float], Field(ge=0.001, le=1000)]  # llama.cpp has 32 bits: 1e-300 is 0
    seed: Annotated[Optional[int], Field(ge=-(2**63), lt=2**63)]
    stop: Annotated[
        Union[Stop, None],
        _checked_as(Union[_StopWord, Annotated[list[_StopWord], Field(max_length=MAX_STOPS)], None]),
    ]
    stream_options: Annotated[Union[StreamOptions, Mapping[str, Any], None], _checked_as(Optional[_StreamOptions])]
    temperature: Annotated[Optional[float], Field(ge=0, le=2)]
    top_k: Annotated[Optional[int], Field(ge=-1, le=2**31 - 1)]
    top_p: Annotated[Optional[float], Field(gt=0, le=1)]
    user: Optional[str]


class ChatParams(SamplingParams, total=False):
    """The body of `POST /v1/chat/completions`, less `stream`, which the method's name says."""

    __pydantic_config__ = _JSON  # type: ignore[misc]
    messages: Required[
        Annotated[
            Sequence[Union[ChatMessage, Mapping[str, Any]]],
            _checked_as(Annotated[Messages, Field(min_length=1)]),
        ]
    ]
    logprobs: Optional[bool]
    response_format: Annotated[
        Union[ChatCompletionResponseFormat, Mapping[str, Any], None], _checked_as(Optional[_ResponseFormat])
    ]
    tool_choice: Annotated[
        Union[Literal["auto", "required", "none"], FunctionChoice, Mapping[str, Any], None],
        _checked_as(Optional[_ToolChoice]),
    ]
    tools: Annotated[
        Optional[Sequence[Union[ToolDefinition, Mapping[str, Any]]]],
        _checked_as(Optional[Annotated[list[_Tool], Field(max_length=MAX_TOOLS)]]),
    ]
    top_logprobs: Annotated[Optional[int], Field(ge=0, le=20)]


class CompletionParams(SamplingParams, total=False):
    """The body of `POST /v1/completions`, less `stream`. `logprobs` is how many alternatives to show."""

    __pydantic_config__ = _JSON  # type: ignore[misc]
    best_of: Annotated[Optional[int], Field(ge=1, le=MAX_CHOICES)]
    echo: Optional[bool]
    logprobs: Annotated[Optional[int], Field(ge=0, le=5)]
    prompt: Optional[Prompt]
    suffix: Optional[str]
