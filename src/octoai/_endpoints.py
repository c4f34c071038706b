"""The endpoints there are, as values: which parameters they take, and how a stream of theirs becomes a whole."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Optional, TypeVar

from octoai import _answers, _credentials, _events, _gather
from octoai._calls import OMIT, Call, Defaults, Endpoint
from octoai.errors import ResponseError
from octoai.wire import lenient
from octoai.wire.answers import ChatCompletionResponse, CompletionResponse
from octoai.wire.params import ChatParams, CompletionParams
from octoai.wire.record import Answer, RawResponse

A = TypeVar("A", bound=Answer)
Method = TypeVar("Method", bound=Callable[..., Any])
Gather = Callable[[_events.EventReader[Any], Optional[RawResponse]], A]


def _pair(name: str, path: str, params: Any, *required: str) -> tuple[Endpoint, Endpoint]:
    """An endpoint's plain and its streaming form. `required` is said once more here, because a `TypedDict` whose
    annotations are strings does not know it."""
    known = frozenset(params.__annotations__)
    return (
        Endpoint(name, path, False, known, frozenset(required)),
        Endpoint(f"{name}_stream", path, True, known, frozenset(required)),
    )


CHAT, CHAT_STREAM = _pair("create_chat_completion", "/v1/chat/completions", ChatParams, "messages", "model")
COMPLETION, COMPLETION_STREAM = _pair("create_completion", "/v1/completions", CompletionParams, "model")


def signed(endpoint: Endpoint) -> Callable[[Method], Method]:
    """Name an endpoint's parameters in a method's signature: some programs look there for what they may pass on."""

    def sign(method: Method) -> Method:
        signature = inspect.signature(method)
        *own, _ = signature.parameters.values()
        defaults = {
            name: inspect.Parameter.empty if name in endpoint.required else OMIT for name in endpoint.parameters
        }
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name]) for name in sorted(defaults)
        ]
        method.__signature__ = signature.replace(parameters=[*own, *named])  # type: ignore[attr-defined]
        return method

    return sign


def infer(defaults: Defaults, endpoint_url: str, inputs: Any, *, streams: bool = False, later: bool = False) -> Call:
    """Any endpoint; `later`: the service answers at once, with where to ask for the result."""
    options = {"additional_headers": {"x-octoai-async": "1"}} if later else None
    return defaults.call("POST", _credentials.checked_url(endpoint_url), body=inputs, options=options, streams=streams)


def poll(defaults: Defaults, url: str) -> Call:
    """What became of an inference, or its result."""
    return dataclasses.replace(defaults.call("GET", _credentials.checked_url(url)), may_lead_away=True)


def health(defaults: Defaults, endpoint_url: str) -> Call:
    """One question, which the caller repeats."""
    return defaults.call("GET", _credentials.checked_url(endpoint_url), options={"max_retries": 0})


def whole_chat(reader: _events.EventReader[Any], raw: RawResponse | None) -> ChatCompletionResponse:
    return _whole(ChatCompletionResponse, _gather.chat_completion, reader, raw)


def whole_completion(reader: _events.EventReader[Any], raw: RawResponse | None) -> CompletionResponse:
    return _whole(CompletionResponse, _gather.completion, reader, raw)


def _whole(
    model: type[A], gather: Callable[[list[bytes]], dict[str, Any]], reader: _events.EventReader[Any], raw: Any
) -> A:
    if not reader.is_complete:
        raise reader.interrupted("before its end: it was closed, or has failed")
    body = gather(reader.events)
    try:
        answer = lenient.read(model, body)
    except ValueError as error:
        raise ResponseError(body=body, message=f"the stream does not make a {model.__name__}: {error}") from error
    if raw is None:
        return answer
    return answer.attach(dataclasses.replace(raw), _answers.request_id(raw.headers))
