"""Log probabilities, as OpenAI-shaped servers report them, in OctoAI's form. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def entries(reported: Mapping[str, Any], *, has_others: bool = True) -> list[dict[str, Any]]:
    """One entry a token, in OctoAI's form, each with other likely tokens only where these were asked for: some servers
    tell one all the same."""
    told = _told(reported)
    return told if has_others else [{**entry, "top_logprobs": []} for entry in told]


def _told(reported: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From the chat form or the completions' older four parallel lists."""
    if reported.get("content") is not None:
        return [
            {**_entry(token), "top_logprobs": [_entry(other) for other in token.get("top_logprobs") or ()]}
            for token in reported["content"]
        ]
    tokens, values = reported.get("tokens") or [], reported.get("token_logprobs") or []
    tops = reported.get("top_logprobs") or [{}] * len(tokens)
    return [
        {
            **_entry({"token": token, "logprob": value}),
            "top_logprobs": [_entry({"token": name, "logprob": other}) for name, other in (top or {}).items()],
        }
        for token, value, top in zip(tokens, values, tops, strict=False)
    ]


def _entry(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["token"]
    raw = token.get("bytes")
    logprob = token["logprob"]
    return {
        "token": text,
        # -inf is no JSON number: the servers' own floor for "never" is this one.
        "logprob": -9999.0 if logprob is None or logprob < -9999.0 else logprob,
        "bytes": list(text.encode("utf-8", "replace")) if raw is None else raw,
    }
