"""Parameters that not every server knows, and how each shows that it was given: at its default it asks for nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from octoai.server.engines.base import Generation

NOT_OF_OPENAI = frozenset({"continue_final_message", "ignore_eos", "min_p", "repetition_penalty", "top_k"})


@cache
def refusable(names: frozenset[str]) -> Sequence[tuple[str, Callable[[Generation], bool]]]:
    """Those of these names that can be given, each with whether it was."""
    return [(name, _GIVEN[name]) for name in sorted(names) if name in _GIVEN]


_GIVEN: dict[str, Any] = {
    "continue_final_message": lambda g: g.continues is not None,
    "frequency_penalty": lambda g: g.frequency_penalty != 0,
    "ignore_eos": lambda g: g.ignore_eos,
    "logit_bias": lambda g: bool(g.logit_bias),
    "logprobs": lambda g: g.logprobs is not None,
    "min_p": lambda g: g.min_p != 0,
    "presence_penalty": lambda g: g.presence_penalty != 0,
    "prompt": lambda g: g.tokens is not None,
    "repetition_penalty": lambda g: g.repetition_penalty != 1,
    "tool_choice": lambda g: bool(g.tools) and g.tool_choice not in (None, "auto", "none"),
    "tools": lambda g: bool(g.tools) and g.tool_choice != "none",
    "top_k": lambda g: g.top_k != 0,
}
