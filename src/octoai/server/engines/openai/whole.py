"""An answer that was not streamed becomes the events that it would have been. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octoai.server.engines.base import Delta, Event, Finished, Generation, Started, Usage
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.choices import Calls, decoded, reason_of, reasoning_of, text_of, thought_of, tokens_of
from octoai.server.engines.openai.logprobs import entries
from octoai.server.engines.openai.refusals import broken
from octoai.server.errors import BadRequest, EngineFailed


def whole(body: bytes, generation: Generation) -> Sequence[Event]:
    """All of an answer of one choice; nothing where it does not say how many tokens it has: streamed, they are counted.
    Raises EngineFailed, and what an error means that the engine says after its 200."""
    if is_streamed(body):
        return _streamed(body, generation)
    answer = decoded(body, "an answer")
    if answer.get("error") or answer.get("object") == "error":
        raise broken(answer, generation)
    try:
        return _events(answer, generation)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise EngineFailed("The engine's answer has a shape that is not the protocol's.") from None


def is_streamed(body: bytes) -> bool:
    """Some servers do so whatever they are asked for. Empty lines and a byte order mark may come before its fields."""
    return body.lstrip(b"\xef\xbb\xbf\r\n").startswith((b"data:", b"event:", b"id:", b"retry:", b":"))


def is_of_streams(refused: BadRequest) -> bool:
    """Some servers refuse whole answers, of some models or while these think: whatever a server refuses in words about
    streams may be asked for as one."""
    return "stream" in refused.message.lower()


def _streamed(body: bytes, generation: Generation) -> Sequence[Event]:
    answer = Answer(generation)
    events = answer.events(body)
    last = events[-1] if answer.is_whole else None
    if not isinstance(last, Finished):
        raise EngineFailed("The engine broke off in the middle of its answer.")
    return events if last.usage.prompt_tokens else ()


def _events(answer: Mapping[str, Any], generation: Generation) -> Sequence[Event]:
    (choice,), usage = answer["choices"], answer.get("usage") or {}
    prompt_tokens, num_tokens = tokens_of(usage.get("prompt_tokens")), tokens_of(usage.get("completion_tokens"))
    if prompt_tokens is None or num_tokens is None:
        return ()
    delta, reason = _delta(choice, num_tokens, generation), reason_of(choice)
    if not reason:
        raise EngineFailed("The engine ended its answer without saying why.")
    cached_tokens = 0
    if details := usage.get("prompt_tokens_details"):
        cached_tokens = min(tokens_of(details.get("cached_tokens")) or 0, prompt_tokens)
    started, num_thought = Started(prompt_tokens, cached_tokens), min(thought_of(usage), num_tokens)
    if delta is None:
        return started, Finished({0: reason}, Usage(prompt_tokens, cached_tokens, num_tokens, num_thought))
    if delta.reasoning and not num_thought:
        if delta.text or delta.tool_calls:
            return ()  # which of its tokens it thought is said by a stream alone
        num_thought = num_tokens
    if num_tokens == 0:
        return ()
    return started, delta, Finished({0: reason}, Usage(prompt_tokens, cached_tokens, num_tokens, num_thought))


def _delta(choice: dict[str, Any], num_tokens: int, generation: Generation) -> Delta | None:
    """All that is said, if anything is."""
    calls = None
    if "message" in choice:
        choice["delta"] = message = choice["message"]  # the only piece of it
        calls = [_call(number, call) for number, call in enumerate(message.get("tool_calls") or ())] or None
    text, reasoning, logprobs = text_of(choice), reasoning_of(choice), choice.get("logprobs")
    if not (text or reasoning or calls or logprobs):
        return None
    told = entries(logprobs, has_others=generation.logprobs != 0) if logprobs else None
    return Delta(0, text, num_tokens, told, calls, reasoning)


def _call(number: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """By its place, whatever its server calls it: SGLang says -1 of each."""
    (said,) = Calls().numbered(0, [{**call, "index": 0}])
    return {**said, "index": number}
