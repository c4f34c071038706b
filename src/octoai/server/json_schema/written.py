"""A regular expression of a text in the words in which llama.cpp follows it, which are of the JSON that is written.

To it what can be a quote lets the text run on, a tab is no JSON, and two backslashes are one. It drops one with
`\\d` whole, and repeats all of `a\\.` for `a\\.+`. So it is told classes, without what has to be escaped in JSON unless
nothing else is in them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

from octoai.server.json_schema.expressions import (
    TIMES,
    Characters,
    Choice,
    Expression,
    Part,
    Ranges,
    Sequence,
    Unknown,
    others,
)

# In an expression of a part of the text: more could be read in too many ways, beside what may come before and after it.
_MAX_REPEATED_PARTLY, _MAX_BRANCHES_PARTLY = 3, 100
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '\\"', 92: "\\\\"}  # behind a backslash
_ESCAPED: Ranges = ((0, 31), (34, 34), (92, 92))  # in JSON


def written(pattern: str) -> str:
    """Of the whole text, as it follows it. Raises Unreadable and Unknown."""
    try:
        branches = Expression(pattern).branches()
        texts = []
        for (begins, ends), alike in groupby(branches, lambda branch: branch[:2]):
            told = [_told(branch) for _, _, branch in alike]
            is_one = len(told) == 1 and begins and ends
            text = told[0] if is_one else f"({'|'.join(told)})"
            texts.append(_affix(pattern, begins) + text + _affix(pattern, ends))
    except RecursionError:
        raise Unknown from None
    return f"^{texts[0]}$" if len(texts) == 1 else f"^({'|'.join(texts)})$"


def _affix(pattern: str, is_anchored: bool) -> str:
    """What may come before or after it."""
    if is_anchored:
        return ""
    num_repeated = sum(map(pattern.count, "*+?{"))
    if num_repeated > _MAX_REPEATED_PARTLY or pattern.count("|") > _MAX_BRANCHES_PARTLY or "(" in pattern:
        raise Unknown
    return f"{_class(others(_ESCAPED))}*"


def _told(part: Part) -> str:
    if isinstance(part, Characters):
        return _one_of(part.ranges)
    if isinstance(part, Sequence):
        return "".join(map(_told, part.parts))
    if isinstance(part, Choice):
        return f"({'|'.join(map(_told, part.branches))})"
    inner = _one_of(part.part.ranges, is_repeated=True) if isinstance(part.part, Characters) else _told(part.part)
    if not inner or part.most == 0:
        return ""
    symbol = next((symbol for symbol, times in TIMES.items() if times == (part.least, part.most)), None)
    most = "" if part.most is None else part.most
    return inner + (symbol or f"{{{part.least},{most}}}")


@lru_cache(maxsize=1000)
def _one_of(ranges: Ranges, *, is_repeated: bool = False) -> str:
    plain = others((*others(ranges), *_ESCAPED))
    if plain:
        is_one = plain[0][0] == plain[-1][1]
        return _literal(plain[0][0]) if is_one and not is_repeated else _class(plain)
    escaped = [_escaped(code) for first, last in ranges for code in range(first, last + 1)]
    return escaped[0] if len(escaped) == 1 and not is_repeated else f"({'|'.join(escaped)})"


def _literal(code: int) -> str:
    return f"\\{chr(code)}" if chr(code) in "^$.[]()|{}*+?" else chr(code)


def _escaped(code: int) -> str:
    return "\\\\" + (_SHORT.get(code) or f"u{code:04x}")


def _class(ranges: Ranges) -> str:
    ends = [_end(first) if first == last else f"{_end(first)}-{_end(last)}" for first, last in ranges]
    return f"[{''.join(ends)}]"


def _end(code: int) -> str:
    """Of a range."""
    if code < 128:
        return chr(code) if chr(code).isalnum() else f"\\x{code:02X}"
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"
