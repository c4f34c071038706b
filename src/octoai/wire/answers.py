"""What the service answers: completions, streamed chunks, usage, log probabilities, errors.

These types are what the API promises. Of an answer that breaks the promise in a detail, what is missing is None, and
what has another form stays as it came (`lenient`).
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BeforeValidator, Field, WithJsonSchema

from octoai.wire.messages import ChatMessage
from octoai.wire.record import Answer, Record

FinishReason = Union[Literal["stop", "length", "tool_calls", "content_filter", "function_call", "cancelled"], Any]


def _with_digits(cost: Any) -> Any:
    """A number as text, with all of its digits and no exponent."""
    is_number = isinstance(cost, int | float) and not isinstance(cost, bool)
    return format(Decimal(repr(cost)), "f") if is_number else cost


Cost = Annotated[
    Union[str, Any],
    Field(union_mode="left_to_right"),
    BeforeValidator(_with_digits),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]}),
]


class UsageStats(Record):
    """Tokens, as the engine counted them. `cost` is in US dollars: on the wire a number, here text with all its digits
    (other services say other things there); `prompt_tokens_details` says how many tokens of the prompt were found in a
    cache (`cached_tokens`), `completion_tokens_details` how many of the answer's are what the model thought before it
    (`reasoning_tokens`), where it did."""

    completion_tokens: int
    completion_tokens_details: Optional[dict[str, Any]] = None
    cost: Optional[Cost] = None
    prompt_tokens: int
    prompt_tokens_details: Optional[dict[str, Any]] = None
    total_tokens: int


class TopLogprobs(Record):
    bytes: Optional[list[Any]] = None
    logprob: float
    token: str


class LogprobsContent(Record):
    """One generated token; `logprob` in nats, `bytes` its UTF-8 where the token is not a whole character."""

    bytes: Optional[list[Any]] = None
    logprob: float
    token: str
    top_logprobs: Optional[list[TopLogprobs]] = None


class Logprobs(Record):
    content: Optional[list[Optional[LogprobsContent]]] = None


class ChatCompletionChoice(Record):
    finish_reason: Optional[FinishReason] = None
    index: int = 0
    logprobs: Optional[Logprobs] = None
    message: ChatMessage


class ChatCompletionResponse(Answer):
    choices: list[ChatCompletionChoice]
    created: int
    id: str
    model: str
    object: Optional[str] = None
    usage: Optional[UsageStats] = None


class ChatCompletionDeltaToolCallFunction(Record):
    arguments: Optional[str] = None
    name: Optional[str] = None


class ChatCompletionDeltaToolCall(Record):
    function: Optional[ChatCompletionDeltaToolCallFunction] = None
    id: Optional[str] = None
    index: int = 0
    type: Optional[str] = None


class ChatCompletionDelta(Record):
    """`reasoning_content` is what the model thinks before it answers, where the service tells that from its answer."""

    content: Optional[str] = None
    reasoning_content: Optional[str] = None
    role: Optional[str] = None
    tool_calls: Optional[list[ChatCompletionDeltaToolCall]] = None


class ChatCompletionChunkChoice(Record):
    delta: ChatCompletionDelta
    finish_reason: Optional[FinishReason] = None
    index: int = 0
    logprobs: Optional[Logprobs] = None


class ChatCompletionChunk(Record):
    choices: list[ChatCompletionChunkChoice]
    created: int
    id: str
    model: str
    object: Optional[str] = None
    usage: Optional[UsageStats] = None


class CompletionChoice(Record):
    finish_reason: Optional[FinishReason] = None
    index: int = 0
    logprobs: Optional[Logprobs] = None
    text: str


class CompletionResponse(Answer):
    """A whole completion, and each event of a streamed one."""

    choices: list[CompletionChoice]
    created: int
    id: str
    model: str
    object: Optional[str] = None
    system_fingerprint: Optional[str] = None
    usage: Optional[UsageStats] = None


ErrorResponseValidationErrorsValue = Union[str, list[str]]


class ErrorResponse(Record):
    code: Optional[str] = None
    message: str
    object: Optional[str] = None
    param: Optional[str] = None
    type: str
    validation_errors: Optional[dict[str, Optional[ErrorResponseValidationErrorsValue]]] = None


ValidationErrorLocItem = Union[str, int]


class ValidationError(Record):
    """One wrong field: `loc` is the path to it, from "body" down."""

    loc: list[ValidationErrorLocItem]
    msg: str
    type: str


class HttpValidationError(Record):
    detail: Optional[list[ValidationError]] = None
