"""Parameters that not every server knows, and how each shows that it was given: at its default it asks for nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from octoai.server.engines.base import Generation

NOT_OF_OPENAI = frozenset(
    {
        *("chat_template_kwargs", "continue_final_message", "ignore_eos", "min_p", "min_tokens"),
        *("repetition_penalty", "top_k"),
    }
)


@cache
def refusable(names: frozenset[str]) -> Sequence[tuple[str, Callable[[Generation], bool]]]:
    """Those of these names that can be given, each with whether it was."""
    return [(name, _GIVEN[name]) for name in sorted(names) if name in _GIVEN]


def _may_call(generation: Generation) -> bool:
    return bool(generation.tools) and generation.tool_choice != "none"


_GIVEN: dict[str, Any] = {
    "chat_template_kwargs": lambda g: bool(g.template_kwargs),
    "continue_final_message": lambda g: g.continues is not None,
    "frequency_penalty": lambda g: g.frequency_penalty != 0,
    "ignore_eos": lambda g: g.ignore_eos,
    "logit_bias": lambda g: bool(g.logit_bias),
    "logprobs": lambda g: g.logprobs is not None,
    "min_p": lambda g: g.min_p != 0,
    "min_tokens": lambda g: g.min_tokens > 0,
    "parallel_tool_calls": lambda g: _may_call(g) and not g.parallel_tool_calls,
    "presence_penalty": lambda g: g.presence_penalty != 0,
    "prompt": lambda g: g.tokens is not None,
    "repetition_penalty": lambda g: g.repetition_penalty != 1,
    "tool_choice": lambda g: bool(g.tools) and g.tool_choice not in (None, "auto", "none"),
    "tools": _may_call,
    "top_k": lambda g: g.top_k != 0,
}
