"""Alternatives that an engine would follow together without bound are refused, and those told apart in time are not."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from octoai.server.json_schema.unions import MAX_READINGS, Ambiguous, Unions

A: dict[str, Any] = {"$ref": "#/$defs/a"}
B: dict[str, Any] = {"$ref": "#/$defs/b"}
C: dict[str, Any] = {"$ref": "#/$defs/c"}
TEXT = {"type": "string"}
NUMBER = {"type": "number"}
ARRAY = {"type": "array", "items": A, "minItems": 2}


def record(*optional: str, **properties: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def check(schema: dict[str, Any], **definitions: dict[str, Any]) -> None:
    Unions({f"#/$defs/{name}": each for name, each in definitions.items()}, {}).check(schema)


def nested(depth: int, alternatives: int, inmost: dict[str, Any]) -> dict[str, Any]:
    levels = range(depth)
    return reduce(lambda held, _: {"anyOf": [{"type": "array", "items": held}] * alternatives}, levels, inmost)


@pytest.mark.parametrize(
    "alternatives",
    [
        [ARRAY, TEXT, {"type": "null"}, NUMBER, record(next=A)],
        [record(kind={"const": kind}, left=A, right=A) for kind in ("add", "multiply")],
        [record(kind={"enum": [kind, f"{kind}_all"]}, of=A) for kind in ("not", "any")],
        [record("kind", id=TEXT, op={"const": op}, kind=TEXT, of=A) for op in ("not", "any")],
        [record(id={"anyOf": [TEXT, {"type": "null"}]}, kind={"const": kind}, of=A) for kind in ("not", "any")],
        [record(id={"type": ["string", "null"]}, kind={"const": kind}, of=A) for kind in ("not", "any")],
        [record(group={"const": "a"}, kind={"const": kind}, of=A) for kind in ("not", "any")],
        [record(id={"const": 1}, of=A), record(id=NUMBER, kind={"const": "not"}, of=A)],
        [record(add=ARRAY), record(multiply=ARRAY)],
        [record(name=TEXT, children=ARRAY), record(name=TEXT)],
        [record("children", name=TEXT, children=ARRAY), record(name=TEXT, size=NUMBER)],
        [record(name=TEXT, **{f"p{number}": TEXT}) for number in range(100)],
        [{"const": number} for number in range(900)],
        [{"enum": [f"value {number}" for number in range(900)]}, TEXT],
    ],
)
def test_alternatives_that_are_soon_told_apart_are_taken(alternatives: list[dict[str, Any]]) -> None:
    check(ARRAY, a={"anyOf": alternatives})
    check(ARRAY, a={"oneOf": [B, *alternatives[1:]]}, b=alternatives[0])


def test_trees_and_tags_that_are_referred_to_are_taken() -> None:
    check(A, a=record(name=TEXT, children={"type": "array", "items": A}))
    check(A, a={"anyOf": [record(kind=B, of=A), record(kind=C, of=A)]}, b={"const": "not"}, c={"enum": ["any"]})
    check(A, a={"anyOf": [B, C]}, b={"anyOf": [record(b=A), NUMBER]}, c={"anyOf": [record(c=A), {"type": "null"}]})


@pytest.mark.parametrize(
    "alternatives",
    [
        [ARRAY, {**ARRAY, "title": "x"}],
        [TEXT, ARRAY, {"type": ["array", "null"], "items": A}],
        [record(of=A), record(of=A)],
        [record(left=A, kind={"const": kind}) for kind in ("add", "multiply")],
        [record("kind", kind={"const": kind}, of=A) for kind in ("not", "any")],
        [record(kind={"const": "not"}, of=A), record(kind=TEXT, of=A)],
        [record(kind={"enum": ["not", "any"]}, of=A), record(kind={"enum": ["any", "all"]}, of=A)],
        [record(id={"const": 1}, of=A), record(id=NUMBER, of=A, kind={"const": "not"})],
        [{"const": 1, **B}, {"const": 2, "anyOf": [record(of=A)]}],
        [{"properties": {"of": A}}, {"additionalProperties": A}],
    ],
)
def test_alternatives_that_begin_alike_and_lead_back_are_refused(alternatives: list[dict[str, Any]]) -> None:
    for keyword in ("anyOf", "oneOf"):
        with pytest.raises(Ambiguous, match="lead back to it: give each"):
            check({"type": "array", "items": A}, a={keyword: alternatives}, b=record(of=A))


def test_they_are_found_where_others_lead_to_them_and_between_several() -> None:
    loop = {"a": record(next=B), "b": {"anyOf": [C, record(of=A)]}, "c": record(of=B)}
    with pytest.raises(Ambiguous, match="lead back"):
        check({"type": "array", "items": [TEXT, A]}, **loop)
    check({"type": "array", "items": [TEXT]}, **loop)  # a definition that nothing refers to is in no grammar


def test_what_is_nested_multiplies() -> None:
    check(nested(7, 2, TEXT))
    check(nested(1, MAX_READINGS, TEXT))
    with pytest.raises(Ambiguous, match=f"more than {MAX_READINGS} ways"):
        check(nested(8, 2, TEXT))
    with pytest.raises(Ambiguous, match=f"more than {MAX_READINGS} ways"):
        check(nested(1, MAX_READINGS + 1, TEXT))
    with pytest.raises(Ambiguous, match=f"more than {MAX_READINGS} ways"):
        check(nested(1, 30, {"enum": list(range(300))}))
    check(nested(1, 2, {"enum": list(range(300))}))
    with pytest.raises(Ambiguous, match=f"more than {MAX_READINGS} ways"):
        check(nested(1, 2, {"type": ["integer", "string"], "enum": list(range(300))}))


def test_what_is_beside_each_other_does_not_multiply() -> None:
    check(record(**{f"p{number}": nested(6, 2, TEXT) for number in range(20)}))


def test_no_depth_is_too_much_to_answer() -> None:
    names = [f"n{number}" for number in range(5000)]
    following = {name: {"$ref": f"#/$defs/n{number + 1}"} for number, name in enumerate(names)}
    check(following["n0"], **{name: record(x=each) for name, each in following.items()}, n5000=TEXT)
    check(following["n0"], **following, n5000=TEXT)
    with pytest.raises(Ambiguous, match="nested too deeply"):
        check(following["n0"], **following, n5000=record(x=following["n0"]))
