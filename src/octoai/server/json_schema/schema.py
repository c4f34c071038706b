"""Which JSON Schemas are accepted for an answer, or for a tool's arguments: bounded ones.

An engine turns a schema into a grammar and tries it on every token, for everybody in the same batch: llama.cpp took
0.4 s an answer for an `enum` of 100 values, 7 s for one of 2,000 and did not come back within 30 s from one of 5,000.
It does not come back either from bounds whose larger one is first, and from a reference to itself it crashes. The
bounds are those that OpenAI documents for structured outputs, where it has one. Of patterns: `patterns`, of those that
are followed together: `unions`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from octoai.server.errors import BadRequest
from octoai.server.json_schema.extents import REPEATED_AT_MOST, Unbounded, check_bounds, is_of_whole_text, num_repeated
from octoai.server.json_schema.patterns import Readings, Unreadable
from octoai.server.json_schema.rewriting import (
    MAX_PARTS,
    NAMED,
    VALUES,
    Schema,
    TooLarge,
    rewritten,
    target,
)
from octoai.server.json_schema.unions import Ambiguous, Unions

MAX_BYTES = 128 * 1024
MAX_ALTERNATIVES = 1000
MAX_OPTIONAL = 400  # an engine has a rule for each that can come after each: a second, and 4.6 of 900
MAX_PATTERN_LENGTH = 2000
MAX_REFERENCE_LENGTH = 1000  # it is followed anew for each part that it stands for
MAX_NAME_LENGTH = 256  # beside additionalProperties llama.cpp descends a level for each character: 30,000 crashed it
MAX_REPEATED = 400_000  # an engine makes a part of its grammar for each: of 1.8 million it took 4 s and gigabytes
_TOO_MANY_PARTS = (
    f"the schema has more than {MAX_PARTS} parts, with those that its $refs stand for, in an allOf for each of them: "
    "refer to what is large, or leads back there, without allOf"
)
_BRANCHES = (
    "anyOf",
    "oneOf",
    "allOf",
    "enum",
    "prefixItems",
    "properties",
    "patternProperties",
)
_SAME_VALUE = ("anyOf", "oneOf", "allOf")  # whose schemas are of the value that the schema itself is of
_MAX_STEPS = 20  # from one $ref to the next


def bounded(schema: Schema) -> Schema:
    """The schema of an answer, where it is small enough. Raises BadRequest."""
    _refuse_unbounded([schema], "response_format")
    return schema


def refuse_unbounded_tools(schemas: Sequence[Schema]) -> None:
    """Where one of them is to be called engines make one grammar of the arguments of all. Raises BadRequest."""
    _refuse_unbounded(schemas, "tools")


def for_llama_cpp(schema: Schema) -> Schema:
    """As it reads it rightly. Raises BadRequest, where it would read something else whatever is said."""
    read = rewritten(schema)
    waiting = [read, *read.get("$defs", {}).values()]
    while waiting:
        part = waiting.pop()
        if _is_empty_all_of(part, read):
            said = "none of its schemas has properties or an enum; write what they say as one schema"
            raise BadRequest(f"response_format: allOf: {said}", param="response_format")
        waiting.extend(_parts(part))
    return read


def _refuse_unbounded(schemas: Sequence[Schema], param: str) -> None:
    try:
        size = sum([len(json.dumps(schema)) for schema in schemas])
        if size > MAX_BYTES:
            raise Unbounded(f"the schema has {size} bytes; at most {MAX_BYTES} are accepted")
        seen, read = _Seen(), [rewritten(schema) for schema in schemas]
        for schema in read:
            seen.add(schema)
    except TooLarge:
        raise BadRequest(f"{param}: {_TOO_MANY_PARTS}", param=param) from None
    except Unbounded as refused:
        raise BadRequest(f"{param}: {refused}", param=param) from None


class _Seen:
    """What there is in schemas that are offered together."""

    def __init__(self) -> None:
        self._num_parts = self._num_alternatives = self._num_repeated = 0
        self._patterns = Readings()
        self._texts: dict[int, int] = {}

    def add(self, schema: Schema) -> None:
        """Raises Unbounded."""
        targets: dict[str, Schema] = {}
        same_value: dict[int, list[int]] = {}
        merged: dict[int, bool] = {}
        waiting: list[tuple[Schema, bool | None]] = [(schema, None)]
        while waiting and self._num_parts <= MAX_PARTS:
            part, is_optional = waiting.pop()
            self._add_part(part)
            _check_merged(part, schema)
            of_same_value = [each for key in _SAME_VALUE for each in _schemas(part.get(key))]
            reference = part.get("$ref")
            if isinstance(reference, str):
                is_new = reference not in targets
                if is_new:
                    targets[reference] = target(schema, reference) or {}
                if is_optional is not None:
                    self._add_copy(targets[reference], is_optional)
                if is_new or is_optional is not None:
                    waiting.append((targets[reference], is_optional))
                of_same_value.append(targets[reference])
            if of_same_value:
                same_value[id(part)] = [id(each) for each in of_same_value]
            merged |= _merged(part)
            waiting.extend((each, merged.get(id(each))) for each in _parts(part))
        try:
            TopologicalSorter(same_value).prepare()
        except CycleError:
            raise Unbounded("a $ref leads to itself: let properties or items be between") from None
        self._refuse_too_many()
        try:
            Unions(targets, self._texts).check(schema)
        except Ambiguous as error:
            raise Unbounded(str(error)) from None

    def _refuse_too_many(self) -> None:
        if self._num_parts > MAX_PARTS:
            raise Unbounded(_TOO_MANY_PARTS)
        if self._num_repeated > MAX_REPEATED:
            raise Unbounded(
                f"minLength, maxLength, minItems, maxItems and the bounds of patterns come to {self._num_repeated} in "
                f"all (each to {REPEATED_AT_MOST} at most); {MAX_REPEATED} are accepted"
            )
        if self._num_alternatives > MAX_ALTERNATIVES:
            counted = f"{self._num_alternatives} properties, branches and enum values (these for each type of a list)"
            raise Unbounded(f"the schema has {counted}; at most {MAX_ALTERNATIVES} are accepted")

    def _add_part(self, part: Schema) -> None:
        self._num_parts += 1
        if id(part) in self._texts:
            return
        self._num_alternatives += sum(len(part[key]) for key in _BRANCHES if isinstance(part.get(key), (dict, list)))
        self._num_alternatives += _num_read_again(part)
        self._num_repeated += num_repeated(part)
        _check_types(part)
        _check_names(part)
        _check_reference(part)
        _check_optional(part)
        check_bounds(part)
        self._texts[id(part)] = _num_readings(part, self._patterns)

    def _add_copy(self, target: Schema, is_optional: bool) -> None:
        """Of properties that may be left out an engine makes a rule for each that can come after each."""
        properties, values = target.get("properties"), target.get("enum")
        if is_optional and isinstance(properties, dict):
            self._num_alternatives += len(properties)
        if isinstance(values, list):
            self._num_parts += len(values)


def _merged(schema: Schema) -> dict[int, bool]:
    """The branches of an allOf, of which engines make one object: whether its properties may be left out there."""
    branches = list(_schemas(schema.get("allOf")))
    alternatives = [each for branch in branches for each in _alternatives(branch)]
    return dict.fromkeys(map(id, branches), False) | dict.fromkeys(map(id, alternatives), True)


def _is_empty_all_of(part: Schema, root: Schema) -> bool:
    """llama.cpp makes one object of an allOf, of nothing where none of its schemas is one."""
    branches, types = list(_schemas(part.get("allOf"))), part.get("type")
    if not branches or part.keys() & {"$ref", "anyOf", "oneOf", "const", "enum", "properties"}:
        return False
    is_read = types is None or not {"object", "string"}.isdisjoint(types if isinstance(types, list) else [types])
    merged = {"properties", "enum", "anyOf"}
    return is_read and all(merged.isdisjoint(_referred_to(each, root)) for each in branches)


def _check_merged(part: Schema, root: Schema) -> None:
    """The properties of all alternatives of an allOf may be left out, in one object."""
    alternatives = [each for branch in _schemas(part.get("allOf")) for each in _alternatives(branch)]
    named = [_referred_to(each, root).get("properties") for each in alternatives]
    num = sum(len(each) for each in named if isinstance(each, dict))
    if num > MAX_OPTIONAL:
        raise Unbounded(_too_many_optional("the anyOf of an allOf", num))


def _alternatives(branch: Schema) -> Iterator[Schema]:
    for key in ("anyOf", "oneOf"):
        yield from _schemas(branch.get(key))


def _referred_to(part: Schema, root: Schema) -> Schema:
    for _ in range(_MAX_STEPS):
        if not isinstance(part.get("$ref"), str):
            break
        part = target(root, part["$ref"]) or {}
    return part


def _schemas(values: Any) -> Iterator[Schema]:
    """Those among the values that are schemas."""
    if isinstance(values, list):
        yield from (each for each in values if isinstance(each, dict))


def _parts(schema: Schema) -> Iterator[Schema]:
    """What an engine reads of it as it stands there; of definitions only those that something refers to."""
    for key, value in schema.items():
        if key in VALUES or key == "$defs":
            continue
        if not isinstance(value, dict):
            yield from _schemas(value)
        elif key in NAMED:
            yield from _schemas(list(value.values()))
        else:
            yield value


def _check_types(schema: Schema) -> None:
    """A schema of several types is read as one of each, whatever is in it."""
    types = schema.get("type")
    if types is None or isinstance(types, str):
        return
    if not isinstance(types, list) or not all(isinstance(each, str) for each in types):
        raise Unbounded("type is neither a name, as 'object', nor a list of names")
    if any(types.count(each) > 1 for each in types[:10]) or len(types) > 10:
        raise Unbounded("a list of types has each of them once")
    if "allOf" in schema and "object" in types and "string" in types:
        raise Unbounded("allOf: not where both 'object' and 'string' are allowed; use anyOf for them")


def _check_names(schema: Schema) -> None:
    properties = schema.get("properties")
    longest = max(properties, key=len, default="") if isinstance(properties, dict) else ""
    if len(longest) > MAX_NAME_LENGTH:
        raise Unbounded(
            f"the property {longest[:20]}… has a name of {len(longest)} characters; at most {MAX_NAME_LENGTH} are accepted"
        )


def _check_reference(schema: Schema) -> None:
    reference = schema.get("$ref")
    if isinstance(reference, str) and len(reference) > MAX_REFERENCE_LENGTH:
        raise Unbounded(f"a $ref has {len(reference)} characters; at most {MAX_REFERENCE_LENGTH} are accepted")


def _check_optional(schema: Schema) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or len(properties) <= MAX_OPTIONAL:
        return
    named = {each for each in required if isinstance(each, str)} if isinstance(required, list) else set()
    num = len(properties.keys() - named)
    if num > MAX_OPTIONAL:
        raise Unbounded(_too_many_optional("an object", num))


def _too_many_optional(what: str, num: int) -> str:
    return f"{what} has {num} properties that may be left out; at most {MAX_OPTIONAL} are accepted"


def _num_read_again(schema: Schema) -> int:
    """The values of an enum beside a list of types, for each type but the first."""
    types, values = schema.get("type"), schema.get("enum")
    return len(values) * (len(types) - 1) if types and isinstance(types, list) and isinstance(values, list) else 0


def _num_readings(schema: Schema, patterns: Readings) -> int:
    """Of a text. Raises Unbounded."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str) or not is_of_whole_text(pattern):
        return 0
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise Unbounded(f"a pattern has more than {MAX_PATTERN_LENGTH} characters")
    try:
        return patterns.add(pattern)
    except Unreadable as error:
        raise Unbounded(f"pattern {pattern[:100]}: {error}") from None
