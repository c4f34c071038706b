"""Patterns that an engine would follow in too many ways are refused, and those that people write are not."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.json_schema.patterns import Readings, Unreadable


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        r"^[A-Z]{2}[0-9]{2}[A-Z0-9]{1,30}$",
        r"^(\d{3}-){2}\d{4}$",
        r"^\+?[0-9][0-9 -]{5,20}$",
        r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$",
        r"^(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(?:\.(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3}$",
        r"^[A-Z][a-z]+( [A-Z][a-z]+)*$",
        r"^([a-z]+ ?)+$",
        r"^.*[0-9].*[a-z].*[A-Z].*$",
        r"^[^\x00-\x1f\]\\-]+$",
        r"^.{0,1900}$",
        r"^(?=.*[0-9])[\p{L}\w]{8,}$",
        *(f"^{unknown}(a?){{100}}$" for unknown in (r"(x)\1", r"\p{L}", "(?i)", "[]", "a{1}{2}", "a^")),
        *(f"^{unknown}(a?){{100}}$" for unknown in (r"\x4", r"[\u123]", r"\ud800", "a{,2}", "*", ")", "[a", "(?")),
        "^" + "|".join(f"word{number}" for number in range(200)) + "$",
    ],
)
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    Readings().add(pattern)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"^a{5,1}$", r"\{5,1\} has its larger bound first"),
        (r"^[z-a]$", r"no character can stand for \[z-a\]"),
        (r"^[^\x00-\U0010FFFF]$", "no character can stand for"),
        (r"^(a?){100}$", "ways"),
        (r"^(a?){1900}$", "ways"),
        *((f"^{known}(a?){{100}}$", "ways") for known in ("(?:a)", r"\.\^\$\|\*\+\?\(\)\{\}", r"\[\]\-\"\\\t\n\r")),
        *((f"^{known}(a?){{100}}$", "ways") for known in (r"[\[\]\-\"\\\t\n\r]", r"\x41\u0041\U00000041", r"\w")),
        *(
            (f"^{known}(a?){{100}}$", "ways")
            for known in (r"\s", r"\D", r"\b", r"\/", "(?=a$)", "(?!^a)", "(?<!a)", "(?<n>a)")
        ),
        (r"^([+]?[0-9]?[ -]?){20}$", "ways"),
        (r"^(.?.?.?.?){400}$", "ways|too much"),
        ("^(" + "|".join([".*"] * 400) + ")*$", "ways|too much"),
        (r"^([^e]+)*$", "ways"),
        (r"^(\x61|a|\u0061|[a])*$", "ways"),
        (r"^(((a?){50}){50}){50}$", "too much is repeated"),
        (r"^((([a-z]{9},){9};){9}:){900}$", "too much is repeated"),
        ("^(a$", "a group in it has no end"),
        ("(" * 50 + ")" + "{9})" * 49, "too much is repeated"),
    ],
)
def test_patterns_that_hold_an_engine_up_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        Readings().add(pattern)


def test_readings_are_counted() -> None:
    Readings().add("^(.?){12}$")  # "aaaaaa" in 924 ways, and all its beginnings: 4096
    with pytest.raises(Unreadable, match="more than 4096 ways"):
        Readings().add("^(.?){13}$")


def test_each_pattern_has_readings_of_its_own_and_all_of_them_the_room() -> None:
    readings = Readings()
    for number in range(100):
        assert readings.add(f"^[a-z]{{{number},200}}$") < 10
        assert readings.add("^(.?){12}$") == 4096  # the same takes no more room
        assert readings.add(r"^\p{L}(.?){13}$") == 1
    assert readings.add("^([a-z]+ ?)+$") > 1000
    assert readings.add("^[0-9]{5}$") == 1
    with pytest.raises(Unreadable, match="too much is repeated"):
        for number in range(100):
            readings.add(f"^([a-z],?){{{number + 1},30}}$")


@given(st.text(alphabet=r"ab[]^-()?:*+{}0123,|.\xu$", max_size=40))
def test_any_text_is_taken_or_refused_soon(pattern: str) -> None:
    started = time.process_time()
    try:
        Readings().add(pattern)
    except Unreadable as refused:
        assert str(refused)
    assert time.process_time() - started < 1
