"""Messages, their parts, and tools: what a chat is made of, in requests and in answers."""

from __future__ import annotations

from typing import Any, Literal, Optional, Union

from pydantic import Field, field_validator

from octoai.wire.record import Record


class ImageUrl(Record):
    detail: Optional[str] = None
    url: str


class ChatMessageContentItem_ImageUrl(Record):
    image_url: ImageUrl
    type: Literal["image_url"] = "image_url"


class ChatMessageContentItem_Text(Record):
    text: str
    type: Literal["text"] = "text"


class MultiModalImageMessage(Record):
    image_url: ImageUrl


class MultiModalTextMessage(Record):
    text: str


ChatMessageContentItem = Union[ChatMessageContentItem_ImageUrl, ChatMessageContentItem_Text]
Content = Union[str, list[ChatMessageContentItem]]


class FunctionCall(Record):
    """A call the model wants made; `arguments` is JSON text, as the model wrote it."""

    arguments: str
    name: str


class ToolCall(Record):
    """`type` is "function"; some services leave it empty, or have kinds of their own."""

    function: FunctionCall
    id: Optional[str] = None
    type: Optional[str] = None


class FunctionDefinition(Record):
    description: Optional[str] = None
    name: str
    parameters: Optional[dict[str, Any]] = None


class ToolDefinition(Record):
    function: FunctionDefinition
    type: Optional[Literal["function"]] = None


class FunctionHandle(Record):
    name: str


class FunctionChoice(Record):
    function: FunctionHandle
    type: Optional[Literal["function"]] = None


CreateChatCompletionRequestToolChoice = Union[Literal["auto"], Literal["required"], Literal["none"], FunctionChoice]
CreateChatCompletionStreamRequestToolChoice = CreateChatCompletionRequestToolChoice


class ChatMessage(Record):
    """`reasoning_content` is what a model thought before it answered, where the service tells that from its answer."""

    content: Optional[Content] = None
    reasoning_content: Optional[str] = None
    role: str
    tool_calls: Optional[list[ToolCall]] = None

    @field_validator("content", mode="before")
    @classmethod
    def _accept_untyped_parts(cls, content: Any) -> Any:
        """`MultiModal…Message` objects are content parts that do not say their type."""
        if isinstance(content, (list, tuple)):
            untyped = (MultiModalImageMessage, MultiModalTextMessage)
            return [part.dict() if isinstance(part, untyped) else part for part in content]
        return content


class ChatCompletionResponseFormat(Record):
    """`type` is "text", "json_object" (with an optional `schema`) or "json_schema"."""

    schema_: Optional[dict[str, Any]] = Field(default=None, alias="schema")
    type: str


class StreamOptions(Record):
    include_usage: Optional[bool] = None
