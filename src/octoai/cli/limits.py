"""The options by which accounts and tokens get their limits and budgets."""

from __future__ import annotations

import argparse

_COUNTS = {
    "requests_per_minute": "requests a minute",
    "prompt_tokens_per_minute": "tokens of prompts a minute",
    "completion_tokens_per_minute": "generated tokens a minute",
    "concurrent_requests": "requests at once",
}
_BUDGETS = {
    "soft_budget": "a month's spending from which on answers carry a warning",
    "hard_budget": "a month's spending beyond which there are no answers",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits", 'each a number, or "none"')
    for name, meaning in _BUDGETS.items():
        group.add_argument(_option(name), metavar="USD", help=meaning)
    for name, meaning in _COUNTS.items():
        group.add_argument(_option(name), metavar="N", help=meaning)


def given(args: argparse.Namespace) -> dict[str, int | None]:
    """The limits that were given, by the names they are kept under; "none" is None. Raises BadAccount."""
    limits: dict[str, int | None] = {}
    for name in _BUDGETS:
        text = getattr(args, name)
        if text is not None:
            limits[f"{name}_nanos"] = None if text == "none" else _budget(text, _option(name))
    for name in _COUNTS:
        text = getattr(args, name)
        if text is not None:
            limits[name] = None if text == "none" else _count(text, _option(name))
    return limits


def amount(text: str, name: str) -> int:
    """Nano-dollars. Raises BadAccount, with the name of the argument."""
    from octoai.server.accounts import BadAccount
    from octoai.server.billing.money import nanos

    try:
        return nanos(text)
    except ValueError as error:
        raise BadAccount(f"{name}: {error}") from None


def _budget(text: str, name: str) -> int:
    from octoai.server.accounts import BadAccount

    value = amount(text, name)
    if value < 0:
        raise BadAccount(f'{name}: a budget is 0 or more, or "none", not {text!r:.40}')
    return value


def _count(text: str, name: str) -> int:
    from octoai.server.accounts import BadAccount

    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise BadAccount(f'{name}: a whole number, 0 or more, or "none", not {text!r:.40}')
    return int(text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
