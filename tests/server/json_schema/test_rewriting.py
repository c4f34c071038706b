"""A schema in the words in which llama.cpp reads it takes just what the given one takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from octoai.server.json_schema.keywords import Unbounded
from octoai.server.json_schema.rewriting import Rewriting

OF_A_TYPE = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
OF_NO_TYPE = {  # what a part is of where it does not say so
    "object": {"properties", "additionalProperties"},
    "array": {"items", "prefixItems"},
    "string": {"pattern", "minLength", "maxLength"},
}
PLAIN = (None, True, *range(6), "", "a", "ab", "12", "123")
ITEMS = ([], [1], [3], ["a"], ["a", 1], [1, "a"], ["12", "12"], [1, 2, 3], [{"a": 1}])
OBJECTS = tuple(
    {name: value for name, value in zip("abc", values, strict=True) if value is not ...}
    for values in [(a, b, c) for a in (..., 1, "a", 3) for b in (..., 2, "12") for c in (..., None, {"a": 1}, {})]
)
VALUES: tuple[Any, ...] = (*PLAIN, *ITEMS, *OBJECTS)
MAP = {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}
DEFINITIONS = ("one", "two", "Zwei_")


def as_read(schema: Any) -> Any:
    """What llama.cpp reads of a schema: what comes first, and nothing beside it."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    if "anyOf" in schema:
        assert not any(isinstance(each, bool) for each in schema["anyOf"])  # it refuses them
        return {"anyOf": [as_read(each) for each in schema["anyOf"]]}
    for key in ("const", "enum"):
        if key in schema:
            return {key: schema[key]}
    types = schema.get("type", [name for name, keys in OF_NO_TYPE.items() if keys & schema.keys()][:1])
    if not types:
        return {}
    return {"anyOf": [of_type(schema, each) for each in (types if isinstance(types, list) else [types])]}


def all_as_read(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**as_read(schema), "$defs": {name: as_read(each) for name, each in schema.get("$defs", {}).items()}}


def of_type(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    keys = ("pattern",) if name == "string" and "pattern" in schema else OF_A_TYPE.get(name, ())
    found: dict[str, Any] = {"type": name} | {key: schema[key] for key in keys if key in schema}
    if "properties" in found:
        found["properties"] = {key: as_read(each) for key, each in found["properties"].items()}
        found["required"] = [each for each in found.get("required", []) if each in found["properties"]]
        found.setdefault("additionalProperties", False)
    elif "required" in found:
        del found["required"]
    assert not isinstance(found.get("items"), bool)  # which it refuses
    for key in {"items", "additionalProperties"} & found.keys():
        found[key] = as_read(found[key])
    if "minimum" in found:
        found.pop("exclusiveMinimum", None)
    if "maximum" in found:
        found.pop("exclusiveMaximum", None)
    if isinstance(found.get("items"), list):
        found["prefixItems"] = found.pop("items")
    if "prefixItems" in found:
        items = found.pop("items", None)
        if items is not None:  # it looks at no others then
            del found["prefixItems"]
            return found | {"items": items}
        length = len(found["prefixItems"])
        items = [as_read(each) for each in found["prefixItems"]]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": length, "maxItems": length}
    return found


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Of the kinds that are to be followed in all that they say."""
    numbers = st.integers(0, 5)
    integers = st.fixed_dictionaries(
        {"type": st.just("integer")},
        optional=dict.fromkeys(OF_A_TYPE["integer"], numbers),
    )
    texts = st.fixed_dictionaries(
        {"type": st.sampled_from(["string", ["string", "null"]])},
        optional={"minLength": st.integers(0, 2), "maxLength": st.integers(1, 3)},
    )
    patterns = st.sampled_from([r"^\d{2}$", "^[ab]*$", "2", r"^\w+\b$"]).map(
        lambda it: {"type": "string", "pattern": it}
    )
    listed = st.lists(st.sampled_from(PLAIN), min_size=1, max_size=4).map(lambda values: {"enum": values})
    plain = (
        integers | texts | patterns | listed | st.sampled_from([{}, {"const": "a"}, {"type": "null"}, {"title": "t"}])
    )

    def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        several = st.lists(inner, min_size=1, max_size=3)
        whole = {"type": st.just("object"), "additionalProperties": st.booleans() | inner}
        properties = st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        required = st.lists(st.sampled_from("abc"), max_size=2, unique=True)
        objects = st.fixed_dictionaries(whole, optional={"properties": properties, "required": required})
        arrays = st.fixed_dictionaries({"type": st.just("array"), "items": inner}, optional={"minItems": st.just(1)})
        combining = {
            "$ref": st.sampled_from(DEFINITIONS).map(lambda name: f"#/$defs/{name}"),
            "allOf": several,
            "anyOf": several,
        }
        beside = {"type": st.sampled_from(["object", "string", ["integer", "object"]]), "enum": st.just([1, "a", {}])}
        return objects | arrays | st.fixed_dictionaries({}, optional=combining | beside)

    return st.recursive(plain, larger, max_leaves=6)


@given(schemas(), st.lists(schemas(), min_size=3, max_size=3))
@settings(max_examples=100)
def test_it_takes_what_is_taken_and_nothing_else(schema: dict[str, Any], definitions: list[dict[str, Any]]) -> None:
    whole = {**schema, "$defs": dict(zip(DEFINITIONS, definitions, strict=True))}
    rewriting = Rewriting(whole)
    try:
        read = rewriting.done()
    except Unbounded:
        return
    asked, answered = Draft202012Validator(whole), Draft202012Validator(all_as_read(read))
    text = json.dumps(whole)
    is_lenient = "pattern" in text and any(each in text for each in ("const", "enum", "maxLength", "minLength"))
    for value in VALUES:
        try:
            is_asked = asked.is_valid(value)
            is_answered = answered.is_valid(value)
        except RecursionError:  # a reference that leads to itself is refused later
            return
        if is_lenient and '"' in json.dumps(value):  # a pattern does not count beside these, or they beside it
            is_asked |= is_answered
        if not rewriting.unfollowed:
            assert is_answered == is_asked, (value, read)


@pytest.mark.parametrize(
    ("schema", "taken", "other"),
    [
        ({"prefixItems": [{"type": "integer"}], "items": {"type": "string"}, "minItems": 3}, [1, "a", "b"], [1, 2, 3]),
        ({"prefixItems": [{}, {}], "maxItems": 1}, [1], [1, 2]),
        ({"items": [{"type": "integer"}], "minItems": 2, "additionalItems": {"const": 5}}, [1, 5], [1, 6]),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": 50}, 51, 50),
        ({"type": "integer", "maximum": 50, "exclusiveMaximum": 50}, 49, 50),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, 1, 0),
        ({"type": "integer", "maximum": 50, "exclusiveMaximum": False}, 50, 51),
        ({"type": "integer", "enum": [0, 1], "minimum": 0, "exclusiveMinimum": True}, 1, 0),
        ({"allOf": [{"type": "integer", "minimum": 0, "exclusiveMinimum": True}, {"minimum": 5}]}, 5, 4),
        ({"allOf": [{"type": "integer", "maximum": 5, "exclusiveMaximum": True}, {"maximum": 5}]}, 4, 5),
        ({"allOf": [{"enum": [1, 2]}, {"enum": [1.0, 3]}]}, 1, 3),
        ({"type": "string", "minLength": 2.0, "maxLength": 3.0}, "ab", "abcd"),
        ({"type": "array", "items": True, "minItems": 1.0}, [1], []),
        ({"properties": {"a": True, "b": False}, "required": ["a"]}, {"a": 1}, {}),
        ({"anyOf": [{"$ref": "#/$defs/A"}], "required": ["z"], "$defs": {"A": True}}, {"z": 1}, {}),
        ({"required": ["z"]}, {"z": 1}, {}),
        ({"properties": {"a": {}}, "required": ["z"], "additionalProperties": {"type": "null"}}, {"z": None}, {"z": 1}),
        ({"properties": {'a"': {}}, "additionalProperties": True}, {'a"': 1}, {"b": 1}),
        ({"pattern": r"^\p{L}$", "maxLength": 3}, "abc", "abcd"),
        ({"enum": [1, 1.0, True, "a", [1, 2]], "type": ["number", "array"], "minItems": 3}, 1, True),
        ({"enum": [{"a": 1}, {}, "ab", 7], "required": ["a"], "maxLength": 1, "exclusiveMaximum": 7}, {"a": 1}, {}),
        ({"enum": [{"a": 1}, {"b": 2}], "properties": {"b": {}}, "additionalProperties": False}, {"b": 2}, {"a": 1}),
        ({"type": "string", "nullable": True, "enum": ["x", None, 1]}, None, 1),
        ({"type": "array", "items": False}, [], [1]),
        ({"anyOf": [False, {"type": "null"}]}, None, 1),
        ({"type": ["integer", "null"], "anyOf": [{"minimum": 3}, False]}, 3, 2),
        ({**MAP, "required": ["xa"]}, {"xa": 1, "xb": 2}, {}),
        (MAP, {"xa": 1}, {"xa": "a"}),
        ({"allOf": [MAP, {"properties": {"xb": {"maximum": 3}}}]}, {"xb": 2}, {"xb": 4}),
        ({**MAP, "properties": {"a": {}}, "required": ["a"]}, {"a": "a", "xa": 1}, {"a": "a", "xa": "a"}),
        ({**MAP, "patternProperties": {"^x": {"type": "integer"}, "^y": {}}}, {"y": "a"}, []),
        ({"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}, {"const": "b"}]}, "b", "a"),
        ({"allOf": [{"type": "number"}, {"type": ["integer", "null"]}]}, 5, None),
        ({"allOf": [{"const": "a"}, {"const": "a"}, {"pattern": "^a$"}, {"pattern": "^a$"}]}, "a", "b"),
    ],
)
def test_what_it_would_leave_out_is_said_otherwise(schema: dict[str, Any], taken: Any, other: Any) -> None:
    rewriting = Rewriting(schema)
    answered = Draft202012Validator(all_as_read(rewriting.done()))
    assert not rewriting.unfollowed
    assert answered.is_valid(taken)
    assert not answered.is_valid(other)
