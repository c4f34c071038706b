"""Schemas that would hold everybody's engine up are refused before it sees them."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import suppress
from functools import reduce
from typing import Any

import pytest

from octoai.server.errors import BadRequest
from octoai.server.json_schema.keywords import place_of
from octoai.server.json_schema.rewriting import Rewriting
from octoai.server.json_schema.schema import MAX_ALTERNATIVES, bounded, for_llama_cpp

A, B = "#/$defs/a", "#/$defs/b"
NO_JSON = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"a": {"enum": list(range(900))}}},
        {"type": ["integer", "null"], "enum": [*range(400), None]},
        {"enum": [f"https://example.com/{number}" for number in range(999)]},
        {"enum": [f"{number:03}{'x' * 100}{letter}" for number in range(400) for letter in "ab"]},
        {"items": [{"enum": [f"{'x' * 100}{number}" for number in range(200)]}] * 5},
        {"type": "string", "pattern": "^" + "a" * 1998 + "$"},
        {"type": "string", "pattern": "(.?){99}"},
        {"type": "object", "patternProperties": {"^(.?){99}$": {}}},
        {"$defs": {"a": {"pattern": "^a{5,1}$"}, "b": {"enum": list(range(2000))}}, "type": "string"},
        {"properties": {f"p{number}": {} for number in range(900)}, "required": [f"p{n}" for n in range(500)]},
        {"properties": {"n" * 256: {}}, "additionalProperties": True},
        {"properties": {chr(0x4E00 + number): {} for number in range(215)}},
        {"properties": {"enum": {"type": "string"}, "pattern": {"type": "integer"}}},
        {"properties": {"const": {"type": "string"}, "minimum": {"type": "integer"}, "$ref": {"type": "string"}}},
        {"const": {"minItems": 3, "maxItems": 1}, "default": {"$ref": "#"}},
        {"$defs": {"a": {"properties": {"next": {"anyOf": [{"$ref": A}, {"type": "null"}]}}}}, "$ref": A},
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {"$defs": {"a": {"properties": {"x": {"type": "string"}}}}, "allOf": [{"$ref": A}, {"$ref": A}]},
        {"allOf": [{"properties": {"a": {}}}, {"required": ["a"]}]},
        {"allOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]},
        {"properties": {"a": {"type": "string"}}, "allOf": [{"required": ["a"]}, {"minProperties": 1}]},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#/no/such/place"},
        {"type": ["object", "null"], "properties": {"a": {"type": ["string", "null"], "maxLength": 5}}},
        {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
        {"type": "integer", "minimum": 10**15 - 1},
        {"type": "integer", "minimum": 10**18, "maximum": 2 * 10**18},
        {"type": "integer", "exclusiveMinimum": -(10**18), "maximum": -(10**17)},
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"type": "integer", "minimum": 10**17, "maximum": 2**63 - 1, "exclusiveMaximum": 10**18},
        {"type": ["integer", "string", "null"], "enum": list(range(900))},
        {"type": ["integer", "null"], "maximum": 1e20, "exclusiveMaximum": 10**400},
        {"type": "string", "minLength": 1, "maxLength": 2**53 - 1},
        {"type": "array", "maxItems": 2**32 - 1},
        {"type": "number", "minimum": 1e300, "maximum": 1e301},
        {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "string", "minLength": 1, "maxLength": 2000}},
    ],
)
def test_schemas_of_a_usual_size_pass(schema: dict[str, Any]) -> None:
    assert bounded(schema) is schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": list(range(MAX_ALTERNATIVES + 1))}, "enum values"),
        ({"enum": ["a" * 95 + f"{number:08}" for number in range(999)]}, "begin alike in [0-9]+ letters"),
        ({"anyOf": [{"const": "a" * 95 + f"{number:08}"} for number in range(400)]}, "begin alike"),
        (
            {"properties": {"a" * 95 + f"{number:08}": {} for number in range(400)}},
            "names of .* begin alike",
        ),
        ({"type": "string", "enum": list(range(MAX_ALTERNATIVES + 1))}, "enum values"),
        ({"anyOf": [{"const": number} for number in range(MAX_ALTERNATIVES + 1)]}, "branches"),
        ({"allOf": [{"properties": {f"{n}{m}": {} for m in range(100)}} for n in range(11)]}, "properties"),
        ({"properties": {f"p{number}": {} for number in range(401)}}, "401 properties that may be left out"),
        ({"type": "string", "pattern": "^" + "a|" * 1000 + "$"}, "pattern"),
        ({"description": "x" * 200_000}, "bytes"),
        ({"type": "string", "pattern": r"^(\d?){300}$"}, r"pattern \^\(\\d\?\)\{300\}\$: .* ways"),
        ({"type": "string", "pattern": "^[A-Z]{3,2}$"}, "larger bound first"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems is more than maxItems"),
        ({"minLength": 6, "maxLength": 5}, "minLength is more than maxLength"),
        ({"minLength": 2**31, "maxLength": 2**32}, "minLength: at most"),
        ({"type": "integer", "minimum": 2**63 - 1, "maximum": 2**63 - 1}, "integers: a minimum of more"),
        ({"type": ["integer", "null"], "minimum": 1e17}, "integers: a minimum of more"),
        ({"type": "integer", "minimum": 10**17, "maximum": 2**64, "title": "x"}, "integers: a minimum of more"),
        ({"type": "integer", "exclusiveMaximum": -(10**17)}, "integers: .* a maximum of less"),
        ({"type": "integer", "minimum": 1 - 2**63, "maximum": -(10**17)}, "integers: .* a maximum of less"),
        ({"type": "integer", "minimum": 2**63, "maximum": 2**64 - 1}, "minimum: for integers"),
        ({"type": "integer", "maximum": -1e20}, "maximum: for integers"),
        ({"type": "integer", "minimum": 5, "exclusiveMaximum": 5}, "no integer"),
        (
            {"properties": {"a" * 257: {}, "b": {}}, "additionalProperties": True},
            "a name of 257 characters; at most 256",
        ),
        ({"$ref": "#" + "/a" * 500}, r"a \$ref has 1001 characters; at most 1000"),
        ({"type": ["object", "object"]}, "each of them once"),
        *(({"type": wrong, "allOf": [{}, {}]}, "neither a name") for wrong in ({}, [{}], [["object"]], 5)),
        ({"items": [{"type": "string", "maxLength": 2000}] * 201}, "come to 402201 in all"),
        ({"items": [{"type": "string", "pattern": "^[a-z]{0,1999}$"}] * 201}, "come to 402000 in all"),
        ({"allOf": [{"anyOf": [{"required": [f"{m}{n}"]} for n in range(40)]} for m in "abc"]}, "20000 parts"),
        ({"pattern": "x" * 2001}, "more than 2000 characters"),
        ({"anyOf": [{"type": "array", "items": {"type": "integer"}}] * 129}, "more than 128 ways"),
        ({"properties": {chr(0x4E00 + number): {} for number in range(300)}}, "neither a Latin letter"),
        *(
            ({"prefixItems": [{}], name: each}, "none in JSON: NaN")
            for name in ("minItems", "maxItems")
            for each in NO_JSON
        ),
        ({"const": float("nan")}, "none in JSON: NaN"),
    ],
)
def test_schemas_beyond_the_bounds_are_refused_by_name(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        bounded({"type": "object", "properties": {"deep": {"items": schema}}})
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": {"$ref": A}}, "allOf": [{"$ref": A}]},
        {"$defs": {"a": {"$ref": A}}, "allOf": [{"anyOf": [{"$ref": A}]}]},
        {"$defs": {"a": {"$ref": B}, "b": {"$ref": A}}, "properties": {"x": {"$ref": B}}},
        {"$defs": {"a": {"oneOf": [{"type": "string"}, {"$ref": A}]}}, "$ref": A},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b/00"}]}, "b": [{"$ref": A}]}, "$ref": A},
        {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        {"type": "object", "anyOf": [{"$ref": "#"}]},
        {"anyOf": [{"$ref": "#", "minimum": 3}, {"type": "null"}]},
        {"$defs": {"a": {"type": "null", "oneOf": [{"$ref": B}]}, "b": {"allOf": [{"$ref": A}, {}]}}, "$ref": B},
    ],
)
def test_references_that_lead_to_themselves_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="leads to itself") as refused:
        bounded(schema)
    assert refused.value.param == "response_format"


def test_what_is_referred_to_counts_once_however_it_is_spelled() -> None:
    names = [f"p{number}" for number in range(400)]
    large = {"properties": {name: {"items": {"type": "integer"}} for name in names}, "required": names}
    spelled = [{"$ref": f"#/$defs/b/{'0' * number}"} for number in range(1, 100)]
    schema = {"$defs": {"a": large, "b": [large]}, "anyOf": [*spelled, {"$ref": A}]}
    assert bounded(schema)
    read = for_llama_cpp(schema)
    assert list(read["$defs"].values()) == [large]
    assert read["anyOf"] == [{"$ref": f"#/$defs/{name}"} for name in read["$defs"]] * 100


def test_what_is_referred_to_has_a_name_that_nothing_else_has() -> None:
    """llama.cpp took definitions of Chinese names for one, `Item_` for `Item__`, and a property for what it is called
    like."""
    names = ("\u5730\u5740", "\u5e74", "Item", "Item_", "Item__", "a/b", "a~b")
    definitions = {name: {"const": number} for number, name in enumerate(names)}
    spelled = {name: name.replace("~", "~0").replace("/", "~1") for name in names}
    properties = {name: {"$ref": f"#/$defs/{spelled[name]}"} for name in names}
    read = for_llama_cpp({"properties": {**properties, "self": {"$ref": "#"}}, "$defs": {**definitions, "unused": {}}})
    for number, name in enumerate(names):
        reference = read["properties"][name]["$ref"].removeprefix("#/$defs/")
        assert reference.isascii() and reference.isalnum() and not reference[-1].isdigit()
        assert read["$defs"][reference] == {"const": number}
    whole = read["$defs"][read["properties"]["self"]["$ref"].removeprefix("#/$defs/")]
    assert whole == {"properties": read["properties"]}
    assert len(read["$defs"]) == len(names) + 1


@pytest.mark.parametrize("name", ["R<a~1b~0>", "R%3Ca~1b~0%3E"])
def test_what_is_referred_to_is_found_however_its_name_is_escaped(name: str) -> None:
    """As in a URI by some tools, and by others not."""
    told = for_llama_cpp(bounded({"$ref": f"#/$defs/{name}", "$defs": {"R<a/b~>": {"type": "integer"}}}))
    assert list(told["$defs"].values()) == [{"type": "integer"}]


def test_patterns_are_summed_where_an_answer_can_begin_with_several_of_them() -> None:
    texts = [{"type": "string", "pattern": rf"^x{{{number}}}([a-z]+ ?)+$"} for number in range(9)]
    objects = [{"type": "object", "properties": {"a": text}, "required": ["a"]} for text in texts]
    tagged = [
        {"type": "object", "properties": {"kind": {"const": number}, "a": text}, "required": ["kind", "a"]}
        for number, text in enumerate(texts)
    ]
    form = {f"p{number}": {"anyOf": [text, {"type": "string"}, {"type": "null"}]} for number, text in enumerate(texts)}
    assert bounded({"type": "object", "properties": form})
    assert bounded({"anyOf": tagged})
    for alternatives in (texts, objects, texts[:1] * 9, [{"items": text} for text in texts]):
        with pytest.raises(BadRequest, match="patterns that are read in fewer"):
            bounded({"items": {"anyOf": alternatives}})


def test_limits_that_limit_nothing_can_be_left_out() -> None:
    idle = {"maxLength": 2001, "maxItems": 2**53 - 1, "maximum": 2**63, "exclusiveMaximum": 1e20}
    rest = {"minimum": -5, "maxLength": 2000, "maxItems": "9" * 20, "maximum": 2**63 - 1}

    def schema(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "items": part, "properties": {"maxLength": part, "const": part, "other": {}}}

    given = schema(idle | rest)
    before = repr(given)
    assert Rewriting(given).done() == schema(rest)
    assert repr(given) == before
    for reference in ("#/default", "#/examples/0", "#/$defs"):  # wherever it leads
        schema_of_it = {"$ref": reference, "default": idle | rest, "examples": [idle | rest], "$defs": idle | rest}
        assert list(Rewriting(schema_of_it).done()["$defs"].values()) == [rest]


def test_what_an_all_of_refers_to_counts_once() -> None:
    """However often it is said of one value, and wherever it leads back."""
    large = {"properties": {f"p{number}": {"type": "string"} for number in range(300)}}
    read = for_llama_cpp(bounded({"$defs": {"a": {"$ref": B}, "b": large}, "allOf": [{"$ref": A}, {"$ref": B}] * 300}))
    assert list(read["$defs"].values()) == [large]
    kinds = {"$defs": {"a": {"enum": list(range(50))}}}
    assert bounded({**kinds, "properties": {f"p{number}": {"allOf": [{"$ref": A}, {}]} for number in range(100)}})
    for step in ({"allOf": [{"$ref": A}, {}]}, {"$ref": A, "required": ["x"]}, {"allOf": [{"$ref": A}, large]}):
        for definition in ({"properties": {"x": step}}, {"properties": {"x": {"type": "array", "items": step}}}):
            assert bounded({"$defs": {"a": definition}, "$ref": A})
    doubled = {f"n{n}": {"properties": {"x": {"allOf": [{"$ref": f"#/$defs/n{n + 1}"}] * 2}}} for n in range(30)}
    assert bounded({"$defs": doubled | {"n30": {}}, "$ref": "#/$defs/n0"})


def test_schemas_are_looked_through_in_a_moment() -> None:
    """Nobody else is served meanwhile."""
    patterns = [{"pattern": f"^a{{{number}}}[^a].{{0,1900}}$"} for number in range(900)]
    links = {"$defs": {f"n{number}": {"$ref": f"#/$defs/n{number + 1}"} for number in range(900)}}
    tagged = [{"properties": {"kind": {"const": number}}, "required": ["kind"]} for number in range(490)]
    least = [{"minimum": number} for number in range(3000)]
    nowhere = {"allOf": [{"anyOf": [{"$ref": "#" + "/a" * 52_000}]}, {"properties": {}}]}
    names, unread = [f"type {number}" for number in range(4000)], {f"x-{number}": number for number in range(5000)}
    often = {"x": {"allOf": [{"$ref": "#/$defs/y"}] * 300}, "y": nowhere}
    for schema in (
        {"$defs": often, "allOf": [{"$ref": "#/$defs/x"}] * 100},
        *({"enum": list(range(9000)), "anyOf": least}, {"pattern": r"^(\w\W){500}$" * 100, "anyOf": least}),
        *({"pattern": f"^{'.' * 1900}{end}$", "anyOf": [{"minLength": 0}] * 1500} for end in ("", r"\p{L}")),
        *({"anyOf": patterns}, links, {"items": [{}] * 30_000}, {"enum": [[0] * 40_000]}),
        {"type": names, "$defs": {"a": {"type": names[::-1]}}, "anyOf": [{"$ref": A}] * 500},
        {"enum": [{f"k{number}": [number, "x"]} for number in range(4000)], "anyOf": least},
        *({"const": "x" * 60_000, "anyOf": least}, {"x": 1, "anyOf": least, **unread}, {"allOf": [unread] * 500}),
        {"$defs": {"a": unread}, "allOf": [{"anyOf": [{"$ref": A}] * 500}, {"properties": {}}]},
        *({"anyOf": tagged}, {"anyOf": [{"const": number} for number in range(990)]}, {"anyOf": [{}] * 990}),
    ):
        started = time.process_time()
        with suppress(BadRequest):
            bounded(schema)
        assert time.process_time() - started < 2


def test_where_a_part_stands_is_found_in_little_memory() -> None:
    deep: Any = {"pattern": "^a$"}
    for _ in range(100):
        deep = {"properties": {"x" * 200: deep}}
    whole = {"wide": [{}] * 1000, **deep, "allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}
    tracemalloc.start()
    try:
        assert place_of(whole["allOf"][1], whole) == "allOf.1"
        assert place_of({}, whole) == ""
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_notes_are_not_told() -> None:
    """As pydantic 1 writes what has a description, and tools for .NET what may be null."""
    given = {
        "properties": {
            "color": {"description": "c", "nullable": True, "x-order": 1, "allOf": [{"type": "string"}]},
            "twice": {"title": "outer", "allOf": [{"allOf": [{"type": "integer", "title": "inner"}]}]},
            "allOf": {"const": {"allOf": [{"type": "string"}]}},
            "part": {"$ref": "#/properties/color/allOf/0", "title": "t"},
        },
    }
    before = repr(given)
    assert bounded(given) is given
    read = for_llama_cpp(given)
    twice, color = read["$defs"]
    assert read["$defs"] == {color: {"type": "string"}, twice: {"type": "integer"}}
    assert read["properties"] == {
        "color": {"$ref": f"#/$defs/{color}"},
        "twice": {"$ref": f"#/$defs/{twice}"},
        "allOf": {"const": {"allOf": [{"type": "string"}]}},
        "part": {"$ref": f"#/$defs/{color}"},
    }
    assert repr(given) == before


@pytest.mark.parametrize(
    "unread",
    [
        {
            "if": {"allOf": [{"pattern": "^a"}, {"pattern": "b$"}]},
            "then": {"minLength": 3},
            "else": {"minLength": 5000},
        },
        {"not": {"required": ["a", "b"], "additionalProperties": False}},
        {"not": {"enum": list(range(1200))}},
        {"contains": {"minLength": 5000}, "propertyNames": {"pattern": "^(a+ ?)+$"}, "default": {"$ref": "#"}},
        {"dependentSchemas": {"a": {"pattern": "^a{5,1}$"}}, "examples": [{"type": 5}]},
    ],
)
def test_what_llama_cpp_does_not_read_is_neither_told_nor_counted(unread: dict[str, Any]) -> None:
    text = {"type": "string", "maxLength": 5}
    schema = {"type": "object", "properties": {"a": {**text, **unread}}, **unread}
    assert for_llama_cpp(bounded(schema)) == {"type": "object", "properties": {"a": text}}


def test_a_long_pattern_is_told_a_few_times() -> None:
    """To llama.cpp `\\S` is 134 letters."""
    names = [f"p{number}" for number in range(850)]
    for pattern, num_names in ((r"\S" * 990, 5), (r"\S" * 100, 50), ("a" * 1998, 200)):
        others = {"additionalProperties": {"pattern": f"^{pattern}$"}}

        def merged(names: list[str], others: dict[str, Any] = others) -> dict[str, Any]:
            return {"allOf": [{"properties": {name: {"minLength": 0} for name in names}, "required": names}, others]}

        assert len(str(for_llama_cpp(bounded(merged(names[:num_names]))))) < 3_000_000
        with pytest.raises(BadRequest, match="shorter patterns"):
            bounded(merged(names))


def test_objects_deep_within_names_are_told_as_definitions() -> None:
    """llama.cpp makes hundreds of rules for an object of which much can be left out, each with all names in its own."""
    leaf = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(200)}}

    def within(name: str, depth: int) -> dict[str, Any]:
        levels = range(depth)
        return reduce(lambda held, _: {"type": "object", "properties": {name: held}, "required": [name]}, levels, leaf)

    for name, depth, num_definitions in (("n" * 256, 90, 90), ("\u5e74", 3, 3), ("n", 99, 0), ("n" * 10, 19, 1)):
        told = for_llama_cpp(bounded(within(name, depth)))
        definitions = told.get("$defs", {}).values()
        assert len(definitions) == num_definitions
        assert (leaf in definitions) == (num_definitions == depth)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}, "pattern: two of them"),
        ({"type": "string", "allOf": [{"type": "integer"}]}, "no value is all that it says"),
        ({"type": "integer", "enum": ["a", 1.5, None, True, []]}, "no value is all that it says"),
        ({"const": 1, "enum": [2]}, "no value is all that it says"),
        ({"type": "object", "anyOf": [{"type": "string"}, {"const": 5}]}, "no value is all that it says"),
        ({"prefixItems": [{}], "items": False, "minItems": 2}, "no value is all that it says"),
        ({"required": ["z"], "additionalProperties": False}, "required: `z` is not among the properties"),
        ({"allOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"required": ["b"]}]}, "required: `b`"),
        ({"$ref": "#/nowhere", "maxLength": 3}, r"\$ref: it leads nowhere in the schema"),
        ({"enum": True, "allOf": [{"enum": ["a"]}, {"enum": 5}, {"pattern": 5}, {}, 7]}, "allOf: a list"),
        ({"allOf": []}, "allOf: a list of objects that are schemas"),
        ({"anyOf": [7], "type": "string"}, "anyOf: a list of objects that are schemas"),
        ({"allOf": [{"items": [{}]}, {"items": {"type": "null"}}]}, "items: of a list of them and of another schema"),
        (
            {"properties": {letter * 126: {} for letter in "abcdefgh"}, "additionalProperties": True},
            r"additionalProperties: the names .* \(2010 rules; 2000 can be followed\); set it to false",
        ),
        ({"minItems": 2000}, "minItems: at most 1999 can be followed"),
        ({"minLength": 2001}, "minLength: at most 2000 can be followed"),
    ],
)
def test_what_llama_cpp_would_leave_out_is_refused_for_it(schema: dict[str, Any], words: str) -> None:
    whole = {"type": "object", "properties": {"deep": {"items": schema}}}
    assert bounded(whole) is whole  # others read it rightly
    with pytest.raises(BadRequest, match=words) as refused:
        for_llama_cpp(whole)
    assert refused.value.param == "response_format"
    assert str(refused.value).startswith("response_format: properties.deep.items")


def test_letters_that_names_share_count_once_where_others_are_allowed_beside_them() -> None:
    numbered: dict[str, Any] = {f"property_number_{number}": {} for number in range(399)}
    assert for_llama_cpp({"properties": numbered, "additionalProperties": True})
    lengths = [125] * 7 + [128]  # the most that llama.cpp took: two rules for a letter, one for the last
    longest = {letter * length: {} for letter, length in zip("abcdefgh", lengths, strict=True)}
    beginnings: dict[str, Any] = {"a" * length: {} for length in range(1, 125)}
    assert for_llama_cpp({"properties": longest | beginnings, "additionalProperties": {"type": "null"}})


def test_what_is_rewritten_does_not_grow_without_bound() -> None:
    """Each of these refers to all that is within it, and is written anew for it."""
    nested: dict[str, Any] = {"properties": {f"p{number}": {} for number in range(600)}}
    path = "#"
    references = []
    for _ in range(70):
        nested, path = {"properties": {"a": nested}}, f"{path}/properties/a"
        references.append({"$ref": path})
    with pytest.raises(BadRequest, match="parts"):
        bounded({**nested, "anyOf": references})
