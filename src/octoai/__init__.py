"""OctoAI's text-generation SDK, and the service behind it.

Everything here is loaded when it is first named (PEP 562): `import octoai` costs next to nothing.
"""

from __future__ import annotations

from octoai.version import __version__

TYPE_CHECKING = False  # as `typing.TYPE_CHECKING`, without importing `typing`
if TYPE_CHECKING:
    from typing import Any

    from octoai import client as client
    from octoai import core as core
    from octoai import environment as environment
    from octoai import errors as errors
    from octoai import text_gen as text_gen
    from octoai import util as util
    from octoai._deadlines import Timeout
    from octoai.client import AsyncOctoAI, InferenceFuture, OctoAI
    from octoai.environment import OctoAIEnvironment
    from octoai.errors import (
        ApiConnectionError,
        ApiError,
        ApiTimeoutError,
        AuthenticationError,
        BadRequestError,
        ConfigurationError,
        ConflictError,
        InsufficientQuotaError,
        InternalServerError,
        NotFoundError,
        PermissionDeniedError,
        RateLimitError,
        ResponseError,
        ServerError,
        StreamError,
        StreamInterrupted,
        UnprocessableEntityError,
    )
    from octoai.text_gen import (
        ChatCompletionChunk,
        ChatCompletionResponse,
        ChatCompletionResponseFormat,
        ChatMessage,
        CompletionResponse,
        StreamOptions,
        ToolDefinition,
    )

__all__ = [
    "ApiConnectionError",
    "ApiError",
    "ApiTimeoutError",
    "AsyncOctoAI",
    "AuthenticationError",
    "BadRequestError",
    "ChatCompletionChunk",
    "ChatCompletionResponse",
    "ChatCompletionResponseFormat",
    "ChatMessage",
    "CompletionResponse",
    "ConfigurationError",
    "ConflictError",
    "InferenceFuture",
    "InsufficientQuotaError",
    "InternalServerError",
    "NotFoundError",
    "OctoAI",
    "OctoAIEnvironment",
    "PermissionDeniedError",
    "RateLimitError",
    "ResponseError",
    "ServerError",
    "StreamError",
    "StreamInterrupted",
    "StreamOptions",
    "Timeout",
    "ToolDefinition",
    "UnprocessableEntityError",
    "__version__",
    "text_gen",
]

_MODULES = frozenset({"client", "core", "environment", "errors", "text_gen", "util"})
_HOMES = {
    "AsyncOctoAI": "octoai.client",
    "InferenceFuture": "octoai.client",
    "OctoAI": "octoai.client",
    "OctoAIEnvironment": "octoai.environment",
    "Timeout": "octoai._deadlines",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES and name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"octoai.{name}")
    home = _HOMES.get(name) or ("octoai.errors" if _is_error(name) else "octoai.text_gen")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def _is_error(name: str) -> bool:
    return name.endswith("Error") or name == "StreamInterrupted"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
