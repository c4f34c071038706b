"""Text generation: its types and errors, at their historical place. Each is loaded when it is first named."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from octoai.errors import InternalServerError, UnprocessableEntityError
    from octoai.text_gen.types import (
        ChatCompletionChoice,
        ChatCompletionChunk,
        ChatCompletionChunkChoice,
        ChatCompletionDelta,
        ChatCompletionDeltaToolCall,
        ChatCompletionDeltaToolCallFunction,
        ChatCompletionResponse,
        ChatCompletionResponseFormat,
        ChatMessage,
        ChatMessageContentItem,
        ChatMessageContentItem_ImageUrl,
        ChatMessageContentItem_Text,
        CompletionChoice,
        CompletionResponse,
        Content,
        CreateChatCompletionRequestToolChoice,
        CreateChatCompletionStreamRequestToolChoice,
        ErrorResponse,
        ErrorResponseValidationErrorsValue,
        FinishReason,
        FunctionCall,
        FunctionChoice,
        FunctionDefinition,
        FunctionHandle,
        HttpValidationError,
        ImageUrl,
        Logprobs,
        LogprobsContent,
        MultiModalImageMessage,
        MultiModalTextMessage,
        Prompt,
        Stop,
        StreamOptions,
        ToolCall,
        ToolDefinition,
        TopLogprobs,
        UsageStats,
        ValidationError,
        ValidationErrorLocItem,
    )

__all__ = [
    "ChatCompletionChoice",
    "ChatCompletionChunk",
    "ChatCompletionChunkChoice",
    "ChatCompletionDelta",
    "ChatCompletionDeltaToolCall",
    "ChatCompletionDeltaToolCallFunction",
    "ChatCompletionResponse",
    "ChatCompletionResponseFormat",
    "ChatMessage",
    "ChatMessageContentItem",
    "ChatMessageContentItem_ImageUrl",
    "ChatMessageContentItem_Text",
    "CompletionChoice",
    "CompletionResponse",
    "Content",
    "CreateChatCompletionRequestToolChoice",
    "CreateChatCompletionStreamRequestToolChoice",
    "ErrorResponse",
    "ErrorResponseValidationErrorsValue",
    "FinishReason",
    "FunctionCall",
    "FunctionChoice",
    "FunctionDefinition",
    "FunctionHandle",
    "HttpValidationError",
    "ImageUrl",
    "InternalServerError",
    "Logprobs",
    "LogprobsContent",
    "MultiModalImageMessage",
    "MultiModalTextMessage",
    "Prompt",
    "Stop",
    "StreamOptions",
    "ToolCall",
    "ToolDefinition",
    "TopLogprobs",
    "UnprocessableEntityError",
    "UsageStats",
    "ValidationError",
    "ValidationErrorLocItem",
]

_MODULES = frozenset({"client", "errors", "types"})


def __getattr__(name: str) -> Any:
    if name not in _MODULES and name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"octoai.text_gen.{name}")
    home = "octoai.errors" if name in ("InternalServerError", "UnprocessableEntityError") else "octoai.text_gen.types"
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
