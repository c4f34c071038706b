"""The types of text generation, at their historical place: here, and each in a module of its own
(`octoai.text_gen.types.chat_message`). Those modules are not files: they are put in place when this one is imported.
"""

from __future__ import annotations

import sys
from types import ModuleType

from octoai.wire.answers import (
    ChatCompletionChoice as ChatCompletionChoice,
)
from octoai.wire.answers import (
    ChatCompletionChunk as ChatCompletionChunk,
)
from octoai.wire.answers import (
    ChatCompletionChunkChoice as ChatCompletionChunkChoice,
)
from octoai.wire.answers import (
    ChatCompletionDelta as ChatCompletionDelta,
)
from octoai.wire.answers import (
    ChatCompletionDeltaToolCall as ChatCompletionDeltaToolCall,
)
from octoai.wire.answers import (
    ChatCompletionDeltaToolCallFunction as ChatCompletionDeltaToolCallFunction,
)
from octoai.wire.answers import (
    ChatCompletionResponse as ChatCompletionResponse,
)
from octoai.wire.answers import (
    CompletionChoice as CompletionChoice,
)
from octoai.wire.answers import (
    CompletionResponse as CompletionResponse,
)
from octoai.wire.answers import (
    ErrorResponse as ErrorResponse,
)
from octoai.wire.answers import (
    ErrorResponseValidationErrorsValue as ErrorResponseValidationErrorsValue,
)
from octoai.wire.answers import (
    FinishReason as FinishReason,
)
from octoai.wire.answers import (
    HttpValidationError as HttpValidationError,
)
from octoai.wire.answers import (
    Logprobs as Logprobs,
)
from octoai.wire.answers import (
    LogprobsContent as LogprobsContent,
)
from octoai.wire.answers import (
    TopLogprobs as TopLogprobs,
)
from octoai.wire.answers import (
    UsageStats as UsageStats,
)
from octoai.wire.answers import (
    ValidationError as ValidationError,
)
from octoai.wire.answers import (
    ValidationErrorLocItem as ValidationErrorLocItem,
)
from octoai.wire.messages import (
    ChatCompletionResponseFormat as ChatCompletionResponseFormat,
)
from octoai.wire.messages import (
    ChatMessage as ChatMessage,
)
from octoai.wire.messages import (
    ChatMessageContentItem as ChatMessageContentItem,
)
from octoai.wire.messages import (
    ChatMessageContentItem_ImageUrl as ChatMessageContentItem_ImageUrl,
)
from octoai.wire.messages import (
    ChatMessageContentItem_Text as ChatMessageContentItem_Text,
)
from octoai.wire.messages import (
    Content as Content,
)
from octoai.wire.messages import (
    CreateChatCompletionRequestToolChoice as CreateChatCompletionRequestToolChoice,
)
from octoai.wire.messages import (
    CreateChatCompletionStreamRequestToolChoice as CreateChatCompletionStreamRequestToolChoice,
)
from octoai.wire.messages import (
    FunctionCall as FunctionCall,
)
from octoai.wire.messages import (
    FunctionChoice as FunctionChoice,
)
from octoai.wire.messages import (
    FunctionDefinition as FunctionDefinition,
)
from octoai.wire.messages import (
    FunctionHandle as FunctionHandle,
)
from octoai.wire.messages import (
    ImageUrl as ImageUrl,
)
from octoai.wire.messages import (
    MultiModalImageMessage as MultiModalImageMessage,
)
from octoai.wire.messages import (
    MultiModalTextMessage as MultiModalTextMessage,
)
from octoai.wire.messages import (
    StreamOptions as StreamOptions,
)
from octoai.wire.messages import (
    ToolCall as ToolCall,
)
from octoai.wire.messages import (
    ToolDefinition as ToolDefinition,
)
from octoai.wire.params import (
    Prompt as Prompt,
)
from octoai.wire.params import (
    Stop as Stop,
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
    "UsageStats",
    "ValidationError",
    "ValidationErrorLocItem",
]


def _snake_case(name: str) -> str:
    """As the original SDK's generator spelt it: `ChatMessageContentItem_Text` is `chat_message_content_item_text`."""
    spaced = "".join(f"_{char.lower()}" if char.isupper() else char for char in name)
    return spaced.replace("__", "_").removeprefix("_")


def _put_in_place(name: str) -> None:
    module = ModuleType(f"{__name__}.{_snake_case(name)}", f"Home of `{name}`.")
    # The original kept the members of a union in the module of the union.
    members = [other for other in __all__ if other == name or other.startswith(f"{name}_")]
    module.__dict__.update({member: globals()[member] for member in members}, __all__=members)
    sys.modules[module.__name__] = module
    globals()[_snake_case(name)] = module


for _name in __all__:
    _put_in_place(_name)
