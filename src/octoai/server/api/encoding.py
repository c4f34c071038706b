"""Events become the API's JSON: chunks of a stream, or one whole answer. Pure, and on the path of every token.

Stream events are put together from fixed bytes around the text, and everything outside ASCII is escaped: OctoAI's
TypeScript client decodes each network packet by itself. Shapes are OctoAI's: `content` is never null, `choices` is
never empty, and usage comes on the last event that has a choice.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from octoai.server.engines.base import Delta, Deltas, Event, Finished, Started, Usage
from octoai.server.ids import new_answer_id
from octoai.server.params.generations import TextRequest

DONE = b"data: [DONE]\n\n"


def usage_json(usage: Usage, cost: str | None = None) -> str:
    """`cost` is in US dollars, as an exact decimal: its digits are a JSON number, which is what clients read there."""
    said = "" if cost is None else f',"cost":{cost}'
    if usage.reasoning_tokens:
        said += f',"completion_tokens_details":{{"reasoning_tokens":{usage.reasoning_tokens}}}'
    return (
        f'{{"completion_tokens":{usage.completion_tokens},"prompt_tokens":{usage.prompt_tokens},'
        f'"total_tokens":{usage.prompt_tokens + usage.completion_tokens},'
        f'"prompt_tokens_details":{{"cached_tokens":{usage.cached_tokens}}}{said}}}'
    )


def error_event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + _without_end(_json(body)).encode("ascii") + b"\n\n"


def _without_end(data: str) -> str:
    """JSON in which no text looks like the end of the stream: OctoAI's TypeScript client stops at `[DONE]` anywhere."""
    return data.replace("[DONE]", "\\u005bDONE]") if "[DONE]" in data else data


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class _Encoder:
    """What both endpoints share: the frame around each choice."""

    chunk_object = ""
    whole_object = ""
    _around_text = _around_reasoning = ("", "")  # of a delta, where it has nothing else

    def __init__(self, request: TextRequest, *, fingerprint: str, created: int | None = None) -> None:
        self.request = request
        self.id = new_answer_id()
        self.created = int(time.time()) if created is None else created
        self.fingerprint = fingerprint
        self.cost: str | None = None  # in US dollars; known when everything else is
        self._is_open = False
        self._usage = ',"usage":null' if request.include_usage else ""
        # Text that stands before what is generated, by choice (`echo`).
        self._echoed = _echoed(request) if request.echo else {}

    @cached_property
    def _head(self) -> str:
        """What every chunk begins with."""
        return f"data: {self._frame(self.chunk_object)}"

    def stream(self, batch: Sequence[Event]) -> bytes:
        """The server-sent events of a batch, as one block."""
        chunks: list[str] = []
        for event in batch:
            if isinstance(event, Deltas):  # nearly every one
                chunks.append(self._chunks(event))
            elif isinstance(event, Delta):
                chunks.append(self._chunk(event.index, self._delta(event), "null"))
            elif isinstance(event, Started):
                chunks += self._beginning()
            else:
                chunks += self._ending(event)
        return _without_end("".join(chunks)).encode("ascii")

    def _beginning(self) -> Iterable[str]:
        if self._is_open:
            return  # several requests to the engine make one answer, and each of them starts
        self._is_open = True
        for index in range(self.request.num_choices):
            opening = self._opening(index)
            if opening is not None:
                yield self._chunk(index, opening, "null")

    def _ending(self, event: Finished) -> Iterable[str]:
        *others, last = sorted(event.reasons)
        for index in others:
            yield self._chunk(index, self._closing(), quoted(event.reasons[index]))
        tail = f',"usage":{usage_json(event.usage, self.cost)}' if self.request.include_usage else ""
        yield self._chunk(last, self._closing(), quoted(event.reasons[last]), tail)

    def _chunk(self, index: int, said: str, reason: str, usage: str | None = None) -> str:
        tail = self._usage if usage is None else usage
        return f'{self._head}{{"index":{index},{said},"finish_reason":{reason}}}]{tail}}}\n\n'

    def _chunks(self, event: Deltas) -> str:
        begins, between, ends = self._thoughts if event.is_reasoning else self._texts
        return f"{begins}{between.join(map(quoted, event.texts))}{ends}"

    @cached_property
    def _texts(self) -> tuple[str, str, str]:
        return self._between(*self._around_text)

    @cached_property
    def _thoughts(self) -> tuple[str, str, str]:
        return self._between(*self._around_reasoning)

    def _between(self, before: str, after: str) -> tuple[str, str, str]:
        """What stands before, between and behind the texts of `Deltas`."""
        begins = f'{self._head}{{"index":0,{before}'
        ends = f'{after},"finish_reason":null}}]{self._usage}}}\n\n'
        return begins, ends + begins, ends

    def whole(self, events: Iterable[Event]) -> bytes:
        """One answer from every event of a generation. Texts are joined once: to add each token to all before it takes
        quadratic time."""
        texts = {index: [text] for index, text in self._echoed.items()} if self._echoed else {}
        logprobs: dict[int, list[Mapping[str, Any]]] = {}
        calls: dict[int, list[Mapping[str, Any]]] = {}
        reasoning: dict[int, list[str]] = {}
        finished: Finished | None = None
        for event in events:
            if isinstance(event, Deltas):
                said = reasoning if event.is_reasoning else texts
                said.setdefault(0, []).extend(event.texts)
            elif isinstance(event, Delta):
                texts.setdefault(event.index, []).append(event.text)
                if event.reasoning:
                    reasoning.setdefault(event.index, []).append(event.reasoning)
                if event.logprobs:
                    logprobs.setdefault(event.index, []).extend(event.logprobs)
                if event.tool_calls:
                    calls.setdefault(event.index, []).extend(event.tool_calls)
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None
        choices = ",".join(
            [
                self._choice(
                    index, reason, texts.get(index), reasoning.get(index), logprobs.get(index), calls.get(index)
                )
                for index, reason in sorted(finished.reasons.items())
            ]
        )
        usage = usage_json(finished.usage, self.cost)
        return f'{self._frame(self.whole_object)}{choices}],"usage":{usage}}}'.encode("ascii")

    def _choice(
        self,
        index: int,
        reason: str,
        texts: Sequence[str] | None,
        reasoning: Sequence[str] | None,
        logprobs: Sequence[Mapping[str, Any]] | None,
        calls: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        """Of a whole answer."""
        text, thought = "".join(texts or ()), "".join(reasoning) if reasoning else ""
        said = self._said(text, thought, _gathered_calls(calls) if calls else ())
        wants_logprobs = self.request.generations[0].logprobs is not None
        found = _json(self._logprobs(logprobs or (), 0)) if wants_logprobs else "null"
        return f'{{"index":{index},{said},"logprobs":{found},"finish_reason":{quoted(reason)}}}'

    def _frame(self, name: str) -> str:
        """What comes before the choices, whole or in a chunk."""
        return (
            f'{{"id":"{self.id}","object":"{name}","created":{self.created},'
            f'"model":{quoted(self.request.model)}{self._extra()},"choices":['
        )

    def _extra(self) -> str:
        return ""

    def _logprobs_json(self, event: Delta, text_offset: int) -> str:
        if not event.logprobs:
            return ',"logprobs":null'
        return ',"logprobs":' + _json(self._logprobs(event.logprobs, text_offset))

    def _logprobs(self, entries: Sequence[Mapping[str, Any]], text_offset: int) -> dict[str, Any]:
        return {"content": list(entries)}

    def _opening(self, index: int) -> str | None:
        raise NotImplementedError

    def _delta(self, event: Delta) -> str:
        raise NotImplementedError

    def _closing(self) -> str:
        raise NotImplementedError

    def _said(self, text: str, reasoning: str, calls: Sequence[Mapping[str, Any]]) -> str:
        raise NotImplementedError


class ChatEncoder(_Encoder):
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    _around_text = ('"delta":{"content":', '},"logprobs":null')
    _around_reasoning = ('"delta":{"content":"","reasoning_content":', '},"logprobs":null')

    def _opening(self, index: int) -> str:
        return '"delta":{"role":"assistant","content":""},"logprobs":null'

    def _delta(self, event: Delta) -> str:
        thought = _reasoning(event.reasoning)
        calls = f',"tool_calls":{_json(event.tool_calls)}' if event.tool_calls else ""
        return f'"delta":{{"content":{quoted(event.text)}{thought}{calls}}}{self._logprobs_json(event, 0)}'

    def _closing(self) -> str:
        return '"delta":{"content":""},"logprobs":null'

    def _said(self, text: str, reasoning: str, calls: Sequence[Mapping[str, Any]]) -> str:
        called = f',"tool_calls":{_json(calls)}' if calls else ""
        return f'"message":{{"role":"assistant","content":{quoted(text)}{_reasoning(reasoning)}{called}}}'


class CompletionEncoder(_Encoder):
    chunk_object = "text_completion"
    whole_object = "text_completion"
    _around_text = ('"text":', ',"logprobs":null')
    _around_reasoning = ('"text":"","reasoning_content":', ',"logprobs":null')

    def __init__(self, request: TextRequest, *, fingerprint: str, created: int | None = None) -> None:
        super().__init__(request, fingerprint=fingerprint, created=created)
        self._offsets = defaultdict(int, {index: len(text) for index, text in self._echoed.items()})

    def _extra(self) -> str:
        return f',"system_fingerprint":{quoted(self.fingerprint)}'  # the original SDK rejects an answer without one

    def _opening(self, index: int) -> str | None:
        text = self._echoed.get(index)
        return f'"text":{quoted(text)},"logprobs":null' if text else None

    def _delta(self, event: Delta) -> str:
        thought = _reasoning(event.reasoning)
        said = f'"text":{quoted(event.text)}{thought}{self._logprobs_json(event, self._offsets[event.index])}'
        self._offsets[event.index] += len(event.text)
        return said

    def _closing(self) -> str:
        return '"text":"","logprobs":null'

    def _said(self, text: str, reasoning: str, calls: Sequence[Mapping[str, Any]]) -> str:
        return f'"text":{quoted(text)}{_reasoning(reasoning)}'

    def _logprobs(self, entries: Sequence[Mapping[str, Any]], text_offset: int) -> dict[str, Any]:
        """OctoAI's form and, beside it, the four parallel lists that OpenAI's completions have."""
        offsets = []
        for entry in entries:
            offsets.append(text_offset)
            text_offset += len(entry["token"])
        return {
            "content": list(entries),
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }


def _echoed(request: TextRequest) -> dict[int, str]:
    return dict(enumerate(generation.text or "" for generation in request.generations for _ in range(generation.n)))


def _reasoning(text: str) -> str:
    """Under the name that DeepSeek, llama.cpp and most clients have for it."""
    return f',"reasoning_content":{quoted(text)}' if text else ""


def _gathered_calls(deltas: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whole tool calls from the pieces in which an engine streams them."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        call = calls.setdefault(
            delta.get("index", 0), {"id": None, "type": "function", "function": {"name": [], "arguments": []}}
        )
        call["id"] = call["id"] or delta.get("id")
        said = delta.get("function") or {}
        for key, pieces in call["function"].items():
            pieces.append(said.get(key) or "")
    for call in calls.values():
        call["function"] = {key: "".join(pieces) for key, pieces in call["function"].items()}
    return [calls[index] for index in sorted(calls)]
