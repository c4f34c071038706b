"""What `gateway.py` asks and what the mock engine answers: the bytes, known to both ends. Pure.

The answers are vLLM's: a stream begins with an event that has only a role, then comes one event a token, then one that
says why it ended, then one without choices if usage was asked for. Every token's text says which it is, so that an
answer of which a token is lost, doubled or out of order is told from a right one.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MODEL = "mock"
PROMPT_TOKENS = 30
_ID = "chatcmpl-0123456789abcdef0123456789abcdef"
_ORDER = re.compile(rb"tokens=(\d+) pace=(\d+)")
_HEAD = b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\ncontent-type: %b\r\n"
_STREAM_HEAD = _HEAD % b"text/event-stream; charset=utf-8" + b"transfer-encoding: chunked\r\n\r\n"
_END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Ask:
    """`num_tokens` tokens as a whole answer or a stream; `pace` of them a second, 0: all in one write."""

    num_tokens: int
    is_stream: bool = False
    pace: int = 0

    def request(self, host: str, headers: str) -> bytes:
        """`headers` are whole lines. The prompt carries the order: it is what every gateway hands on as it came."""
        order = f"tokens={self.num_tokens} pace={self.pace} {'word ' * PROMPT_TOKENS}"
        body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": order}]}
        body |= {"max_tokens": self.num_tokens + 1, "temperature": 0.7}
        if self.is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        raw = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        return f"{head}{headers}content-length: {len(raw)}\r\n\r\n".encode() + raw

    @property
    def text(self) -> str:
        return "".join(map(token, range(self.num_tokens)))

    @property
    def usage(self) -> dict[str, int]:
        """The token that ends a text is counted, and has none."""
        return _usage(self.num_tokens + 1)


def token(number: int) -> str:
    return f" w{number:03d}"


def _usage(completion_tokens: int) -> dict[str, int]:
    total = PROMPT_TOKENS + completion_tokens
    return {"prompt_tokens": PROMPT_TOKENS, "total_tokens": total, "completion_tokens": completion_tokens}


@dataclass(frozen=True)
class Reply:
    """`writes` follow each other `seconds` apart."""

    writes: tuple[bytes, ...]
    seconds: float = 0.0


@functools.lru_cache(maxsize=1024)
def reply(body: bytes) -> Reply:
    """The answer to a request's body, from whichever gateway: kept, because the same is asked all the time."""
    order = _ORDER.search(body)
    if order is None:
        return Reply((whole(b'{"object":"error","message":"no order in the prompt","code":400}', b"400 Bad Request"),))
    num_tokens, pace = int(order[1]), int(order[2])
    asked = json.loads(body)
    if not asked.get("stream"):
        return Reply((whole(_compact(_answer(num_tokens))),))
    options = asked.get("stream_options") or {}
    is_continuous = bool(options.get("continuous_usage_stats"))
    role, *rest = [
        b"%x\r\ndata: %b\n\n\r\n" % (len(event) + 8, event)
        for event in _events(num_tokens, bool(options.get("include_usage")), is_continuous)
    ]
    tokens, tail = rest[:num_tokens], rest[num_tokens:]
    tokens[0] = _STREAM_HEAD + role + tokens[0]
    tokens[-1] = b"".join([tokens[-1], *tail, _END])
    return Reply(tuple(tokens), 1 / pace) if pace else Reply((b"".join(tokens),))


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    head = _HEAD.replace(b"200 OK", status) % b"application/json"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def _events(num_tokens: int, has_usage: bool, is_continuous: bool) -> Iterator[bytes]:
    """Their data, in order, `[DONE]` last."""

    def event(choices: list[dict[str, Any]], said: int, usage: bool = False) -> bytes:
        counted = {"usage": _usage(said)} if usage or is_continuous else {}
        return _compact({**_frame("chat.completion.chunk"), "choices": choices, **counted})

    yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, **_UNENDED}], 0)
    for number in range(num_tokens):
        yield event([{"index": 0, "delta": {"content": token(number)}, **_UNENDED}], number + 1)
    ended = {"delta": {"content": ""}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    yield event([{"index": 0, **ended, "token_ids": None}], num_tokens + 1)
    if has_usage:
        yield event([], num_tokens + 1, usage=True)
    yield b"[DONE]"


_UNENDED = {"logprobs": None, "finish_reason": None, "token_ids": None}


def _answer(num_tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": Ask(num_tokens).text, "refusal": None, "annotations": None}
    message |= {"audio": None, "function_call": None, "tool_calls": [], "reasoning": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {**_usage(num_tokens + 1), "prompt_tokens_details": None}
    rest = {"service_tier": None, "system_fingerprint": None, "usage": usage, "prompt_logprobs": None}
    rest |= {"prompt_token_ids": None, "kv_transfer_params": None}
    return {**_frame("chat.completion"), "choices": [{**choice, "token_ids": None}], **rest}


def _frame(kind: str) -> dict[str, Any]:
    return {"id": _ID, "object": kind, "created": 1790000000, "model": MODEL}


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
