"""A pattern as llama.cpp is told it is followed in the JSON that is written, and says what the given one says."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.json_schema.expressions import Unknown, Unreadable
from octoai.server.json_schema.written import written

PLAIN = r"[\x20-\x21\x23-\x5B\x5D-\U0010FFFF]"
FOLLOWED = [
    *(r"^.+$", r"^(.*)$", r"^.{1,40}$", r"^[^@]+@[^@]+$", r"^[^,]+, [^,]+$", r"^[A-Z].*\.$", r"^https?://.+$"),
    *(r"^\d{3}-\d{4}$", r"^\S+$", r"^\w+(?:\s\w+)*$", r"^[\w.-]+$", r"^[^\W_]{2,3}?$", r"^\D\s\W$", r"^[\s\S]*$"),
    *(r'^"[a-z]+"$', r'^a/b"c$', r'^[\\"]{3}$', r"^[0-9]\t[0-9]$", r"^[a-z]+\n$", r"^a\\b$", r"^[\x00-\x1f]+$"),
    *(r"^a$|^b$", r"^foo|bar$", r"abc", r"^[A-Z]", r"\.$", r"[0-9]{2}", r"^[0-9]+\$", "^$", "^()$", "^(a|)b?$"),
    *(r"^a\.+é*\/$", r"^(?<year>[0-9]{4})-(?:0[1-9]|1[0-2])$", r"^[\u00e9\-\]^]+$", r"^(a{2}|b){0,2}c{0}$"),
]
PIECES = [
    *("a", "b", "A", "bar", "foo", "abc", "1", "42", "-", ".", "@", ", ", " ", "/", "$", "é", "https://", "x" * 40),
    *('"', r"\"", "\\", r"\\", "\n", r"\n", "\t", r"\t", r"\u0000", r"\u001f", "^", "]", "555-1234", "2020-12"),
]


def is_match(pattern: str, text: str) -> bool:
    """As ECMA-262 has it, of these pieces: to Python the end of a text may be before a newline, and é is a letter."""
    ended = re.sub(r"(?<!\\)\$", r"\\Z", pattern.replace("(?<year>", "(?P<year>"))
    return re.search(ended, text, re.ASCII) is not None


@given(st.lists(st.sampled_from(PIECES), max_size=4).map("".join))
def test_what_it_takes_is_json_and_the_given_pattern_takes_it(inner: str) -> None:
    for pattern in FOLLOWED:
        if re.fullmatch(written(pattern), inner):
            assert is_match(pattern, json.loads(f'"{inner}"')), pattern


@pytest.mark.parametrize(
    ("pattern", "taken", "other"),
    [
        (r"^\d{3}-\d{4}$", "555-1234", "555-123x"),
        (r"^[^@]+@[^@]+$", "joe@example.com", 'joe@example.com"'),
        (r"^\S+$", "Zürich", "New York"),
        (r'^"[a-z]+"$', r"\"quoted\"", '"quoted"'),
        (r"^a\\b$", r"a\\b", r"a\b"),
        (r"^[0-9]\t[0-9]$", r"1\t2", "1\t2"),
        (r"^[\x00\n]$", r"\u0000", "\n"),
        (r"^a\.+$", "a...", "a.a."),
        (r"^é+$", "éé", "a"),
        (r"^a$|^b$", "b", "ab"),
        (r"^[\w-\.]+@([\w-]+\.)+[\w-]{2,4}$", "a-b.c@d-e.org", "a+b@c.org"),
        (r"^[a-\d]$", "-", "b"),
        (r"^(?P<year>\d{4})$", "2020", "year"),
        (r"^foo|bar$", "foobarx", "xfoo"),
        (r"[0-9]{2}", "in 42 days", "in 4 days"),
        (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", "-12.50", "something"),
        (r"^(?=.*[A-Z])(?=.*\d).{8,}$", "Password1", "Pass1"),
    ],
)
def test_patterns_are_followed_in_the_json_that_is_written(pattern: str, taken: str, other: str) -> None:
    told = re.compile(written(pattern))
    assert told.fullmatch(taken)
    assert not told.fullmatch(other)


def test_what_is_told_is_as_short_as_what_is_given() -> None:
    assert written(r"^[A-Z]{2}[0-9]+(x|y)?$") == r"^[A-Z]{2,2}[0-9]+(x|y)?$"
    assert written(r"^.*$") == r"^[\x20-\x21\x23-\x5B\x5D-\u2027\u202A-\U0010FFFF]*$"
    assert written("a") == f"^{PLAIN}*(a){PLAIN}*$"


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"^\p{L}$", r"^(a)\1$", "^(a^b)$", "^a{1}{2}$", "^a)$", "^[a", "^*a$", "^a{,3}$", "^[]$", r"^\u12$"),
        *(
            "(a|b)",
            "[a-z]+@[a-z]+[.][a-z]+[.][a-z]+",
            r"\ud800",
            "^(?i)a$",
            "^" + "(" * 91 + ")" * 91 + "$",
        ),
        *("^" + "(" * 91 + ")" * 91 + "$", "a|" * 101 + "b", "^a\\", "^" + "(?:" * 2000),
    ],
)
def test_what_cannot_be_told_is_known(pattern: str) -> None:
    with pytest.raises(Unknown):
        written(pattern)


@given(st.text(alphabet=r"ab[]^-()?:*+{}0123,|.\xudw$", max_size=40))
def test_any_text_is_told_or_not(pattern: str) -> None:
    try:
        told = written(pattern)
    except (Unknown, Unreadable):
        return
    assert re.compile(told)
    assert written(told)
