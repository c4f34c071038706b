"""The bytes that `sdk_server` sends and the texts that each client must make of them.

Three shapes: OpenAI's chat completions (server-sent events), Anthropic's messages (named events), Ollama's chat
(a JSON object per line). The model's name in a request says how long its stream is: `chunks-1000`.
"""

import json
from typing import Any

ANSWER = "The rain in Seattle is mostly a rumour. " * 15  # 600 bytes
_MADE = 1764000000
_DATE = "2025-11-24T16:00:00Z"


def piece(number: int) -> str:
    return f" w{number:04d}"


def streamed_text(num_chunks: int) -> str:
    return "".join(map(piece, range(num_chunks)))


def _bytes(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 9, "completion_tokens": num_tokens, "total_tokens": 9 + num_tokens}


# ---- OpenAI's shape ----


def _openai(kind: str, choice: dict[str, Any], **more: Any) -> bytes:
    head = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": kind, "created": _MADE, "model": "bench"}
    return _bytes({**head, "choices": [{"index": 0, **choice}], **more})


def openai_answer() -> bytes:
    choice = {"message": {"role": "assistant", "content": ANSWER}, "logprobs": None, "finish_reason": "stop"}
    return _openai("chat.completion", choice, usage=_usage(120))


def openai_events(num_chunks: int) -> list[bytes]:
    """A chunk of text is some 200 bytes; the last event carries the finish reason, and `[DONE]` is in its write."""
    kind = "chat.completion.chunk"
    events = []
    for number in range(num_chunks):
        delta = {"role": "assistant", "content": piece(number)} if number == 0 else {"content": piece(number)}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        events.append(b"data: " + _openai(kind, choice) + b"\n\n")
    last = _openai(kind, {"delta": {}, "logprobs": None, "finish_reason": "stop"}, usage=_usage(num_chunks))
    return [*events, b"data: " + last + b"\n\ndata: [DONE]\n\n"]


# ---- Anthropic's ----


def _anthropic_message(content: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
    return {
        "id": "msg_0123456789abcdef",
        "type": "message",
        "role": "assistant",
        "model": "bench",
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 9, "output_tokens": 120},
    }


def anthropic_answer() -> bytes:
    return _bytes(_anthropic_message([{"type": "text", "text": ANSWER}], "end_turn"))


def _named(event: dict[str, Any]) -> bytes:
    return b"event: " + event["type"].encode() + b"\ndata: " + _bytes(event) + b"\n\n"


def anthropic_events(num_chunks: int) -> list[bytes]:
    start = {"type": "message_start", "message": _anthropic_message([], None)}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    end = {"type": "message_delta", "delta": stop, "usage": {"output_tokens": num_chunks}}
    deltas = [
        _named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece(number)}})
        for number in range(num_chunks)
    ]
    deltas[0] = _named(start) + _named(block) + deltas[0]
    last = _named({"type": "content_block_stop", "index": 0}) + _named(end) + _named({"type": "message_stop"})
    return [*deltas, last]


# ---- Ollama's ----


def _ollama(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "bench", "created_at": _DATE, "message": {"role": "assistant", "content": text}, **more}


def _ollama_end(num_tokens: int) -> dict[str, Any]:
    return {"done": True, "done_reason": "stop", "prompt_eval_count": 9, "eval_count": num_tokens}


def ollama_answer() -> bytes:
    return _bytes(_ollama(ANSWER, **_ollama_end(120)))


def ollama_events(num_chunks: int) -> list[bytes]:
    lines = [_bytes(_ollama(piece(number), done=False)) + b"\n" for number in range(num_chunks)]
    return [*lines, _bytes(_ollama("", **_ollama_end(num_chunks))) + b"\n"]
