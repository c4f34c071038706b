"""Which JSON Schemas are accepted for an answer, or for a tool's arguments: bounded ones.

An engine turns a schema into a grammar and tries it on every token, for everybody in the same batch: llama.cpp took
0.4 s an answer for an `enum` of 100 values, 7 s for one of 2,000 and did not come back within 30 s from one of 5,000.
It does not come back either from bounds whose larger one is first, and from a reference to itself it crashes. The
bounds are those that OpenAI documents for structured outputs, where it has one. Of patterns: `patterns`, of those that
are followed together: `unions`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from octoai.server.errors import BadRequest
from octoai.server.patterns import Readings, Unreadable
from octoai.server.references import target
from octoai.server.rewriting import (
    DEFINITIONS,
    MAX_COUNT,
    MAX_INTEGER,
    NAMED,
    VALUES,
    Schema,
    limits_nothing,
    without_lone_all_ofs,
)
from octoai.server.unions import Ambiguous, Unions

MAX_BYTES = 128 * 1024
MAX_ALTERNATIVES = 1000
MAX_OPTIONAL = 400  # an engine has a rule for each that can come after each: a second, and 4.6 of 900
MAX_PATTERN_LENGTH = 2000
MAX_PARTS = 20_000  # with what $refs stand for, once for each spelling, in an allOf each time: 240,000 took 8 s
LEAST_INTEGER = -(2**63)  # with MAX_INTEGER to llama.cpp the same as no bound
MAX_LONE_BOUND = 10**15 - 1  # llama.cpp has no more digits where there is but one bound
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
_COUNTED = (("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"))
_MAX_STEPS = 20  # from one $ref to the next


class _Unbounded(ValueError):
    """The text says why."""


def bounded(schema: Schema) -> Schema:
    """The schema of an answer, where it is small enough, as engines read it rightly. Raises BadRequest."""
    return _bounded([schema], "response_format")[0]


def refuse_unbounded_tools(schemas: Sequence[Schema]) -> None:
    """Where one of them is to be called engines make one grammar of the arguments of all. Raises BadRequest."""
    _bounded(schemas, "tools")


def _bounded(schemas: Sequence[Schema], param: str) -> Sequence[Schema]:
    try:
        size = sum([len(json.dumps(schema)) for schema in schemas])
        if size > MAX_BYTES:
            raise _Unbounded(f"the schema has {size} bytes; at most {MAX_BYTES} are accepted")
        schemas = [without_lone_all_ofs(schema) for schema in schemas]
        seen = _Seen()
        for schema in schemas:
            seen.add(schema)
        return schemas
    except _Unbounded as refused:
        raise BadRequest(f"{param}: {refused}", param=param) from None


class _Seen:
    """What there is in schemas that are offered together."""

    def __init__(self) -> None:
        self._num_parts = self._num_alternatives = 0
        self._patterns = Readings()
        self._texts: dict[int, int] = {}
        self._known: set[tuple[int, str]] = set()

    def add(self, schema: Schema) -> None:
        """Raises _Unbounded."""
        targets = {"#": schema}
        same_value: dict[int, list[int]] = {}
        merged: dict[int, bool] = {}
        waiting: list[tuple[Schema, str, bool | None]] = [(schema, "", None)]
        while waiting and self._num_parts <= MAX_PARTS:
            part, spelling, is_optional = waiting.pop()
            self._add_part(part, spelling)
            _check_all_of(part, schema)
            of_same_value = [each for key in _SAME_VALUE for each in _schemas(part.get(key))]
            reference = part.get("$ref")
            if isinstance(reference, str):
                is_new = reference not in targets
                if is_new:
                    targets[reference] = target(schema, reference)
                if is_optional is not None:
                    self._add_copy(targets[reference], is_optional)
                if is_new or is_optional is not None:
                    waiting.append((targets[reference], reference, is_optional))
                of_same_value.append(targets[reference])
            if of_same_value:
                same_value[id(part)] = [id(each) for each in of_same_value]
            merged |= _merged(part)
            waiting.extend((each, spelling, merged.get(id(each))) for each in _parts(part))
        try:
            TopologicalSorter(same_value).prepare()
        except CycleError:
            raise _Unbounded("a $ref leads to itself: let properties or items be between") from None
        self._refuse_too_many()
        try:
            Unions(targets, self._texts).check(schema)
        except Ambiguous as error:
            raise _Unbounded(str(error)) from None

    def _refuse_too_many(self) -> None:
        if self._num_parts > MAX_PARTS:
            raise _Unbounded(
                f"the schema has more than {MAX_PARTS} parts, with those that its $refs stand for, in an allOf for "
                "each of them: refer to what is large, or leads back there, without allOf"
            )
        if self._num_alternatives > MAX_ALTERNATIVES:
            counted = f"{self._num_alternatives} properties, branches and enum values (these for each type of a list)"
            raise _Unbounded(f"the schema has {counted}; at most {MAX_ALTERNATIVES} are accepted")

    def _add_part(self, part: Schema, spelling: str) -> None:
        """`spelling`: of the reference that it was found by. An engine reads it once for each."""
        self._num_parts += 1
        if (id(part), spelling) in self._known:
            return
        self._known.add((id(part), spelling))
        self._num_alternatives += sum(len(part[key]) for key in _BRANCHES if isinstance(part.get(key), (dict, list)))
        self._num_alternatives += _num_read_again(part)
        if id(part) not in self._texts:
            _check_types(part)
            _check_optional(part)
            _check_bounds(part)
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
    alternatives = [each for branch in branches for key in ("anyOf", "oneOf") for each in _schemas(branch.get(key))]
    return dict.fromkeys(map(id, branches), False) | dict.fromkeys(map(id, alternatives), True)


def _check_all_of(part: Schema, root: Schema) -> None:
    """llama.cpp makes one object of it, of nothing where none of its schemas is one."""
    branches = list(_schemas(part.get("allOf")))
    if not branches or part.keys() & {"$ref", "anyOf", "oneOf", "const", "enum", "properties"}:
        return
    if part.get("type") in (None, "object", "string") and not any(_is_merged(root, each) for each in branches):
        raise _Unbounded("allOf: none of its schemas has properties or an enum; write what they say as one schema")


def _is_merged(root: Schema, branch: Schema) -> bool:
    for _ in range(_MAX_STEPS):
        if not isinstance(branch.get("$ref"), str):
            break
        branch = target(root, branch["$ref"])
    return bool(branch.keys() & {"properties", "enum", "anyOf", "$ref"})


def _schemas(values: Any) -> Iterator[Schema]:
    """Those among the values that are schemas."""
    if isinstance(values, list):
        yield from (each for each in values if isinstance(each, dict))


def _parts(schema: Schema) -> Iterator[Schema]:
    """What an engine reads of it as it stands there; of definitions only those that something refers to."""
    for key, value in schema.items():
        if key in VALUES or key in DEFINITIONS:
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
    if not isinstance(types, list):
        return
    if any(types.count(each) > 1 for each in types[:10]) or len(types) > 10:
        raise _Unbounded("a list of types has each of them once")
    if "allOf" in schema and "object" in types and "string" in types:
        raise _Unbounded("allOf: not where both 'object' and 'string' are allowed; use anyOf for them")


def _check_optional(schema: Schema) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or len(properties) <= MAX_OPTIONAL:
        return
    named = {each for each in required if isinstance(each, str)} if isinstance(required, list) else set()
    num = len(properties.keys() - named)
    if num > MAX_OPTIONAL:
        raise _Unbounded(f"an object has {num} properties that may be left out; at most {MAX_OPTIONAL} are accepted")


def _num_read_again(schema: Schema) -> int:
    """The values of an enum beside a list of types, for each type but the first."""
    types, values = schema.get("type"), schema.get("enum")
    return len(values) * (len(types) - 1) if types and isinstance(types, list) and isinstance(values, list) else 0


def _check_bounds(schema: Schema) -> None:
    for least_name, most_name in _COUNTED:
        least, most = _given(schema, least_name), _given(schema, most_name)
        if least is not None and least > MAX_COUNT:
            raise _Unbounded(f"{least_name}: at most {MAX_COUNT} is accepted")
        if least is not None and most is not None and least > most:
            raise _Unbounded(f"{least_name} is more than {most_name}")
    types = schema.get("type")
    if types == "integer" or (isinstance(types, list) and "integer" in types):
        _check_integer(schema)


def _check_integer(schema: Schema) -> None:
    """As llama.cpp reads them: where there is a minimum it does not look at an exclusive one."""
    least, most = LEAST_INTEGER, MAX_INTEGER
    for name in ("exclusiveMinimum", "minimum", "exclusiveMaximum", "maximum"):
        bound = _given(schema, name)
        if bound is None:
            continue
        if not LEAST_INTEGER <= bound <= MAX_INTEGER:
            raise _Unbounded(f"{name}: for integers at least -2^63, and less than 2^63")
        if name.endswith("inimum"):
            least = math.ceil(bound) if name == "minimum" else math.floor(bound) + 1
        else:
            most = math.floor(bound) if name == "maximum" else math.ceil(bound) - 1
    if least > most:
        raise _Unbounded("no integer lies between minimum and maximum")
    is_lone = least > MAX_LONE_BOUND and most == MAX_INTEGER
    if is_lone or (most < -MAX_LONE_BOUND and least <= LEAST_INTEGER + 1):
        raise _Unbounded(
            f"integers: a minimum of more than {MAX_LONE_BOUND} needs a maximum of less than 2^63 - 1, and a maximum "
            f"of less than -{MAX_LONE_BOUND} a minimum of more than 1 - 2^63"
        )


def _given(schema: Schema, name: str) -> int | float | None:
    """None also where it limits nothing."""
    value = schema.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and not limits_nothing(name, value) else None


def _num_readings(schema: Schema, patterns: Readings) -> int:
    """Of a text. llama.cpp reads a pattern only where it is one of the whole text. Raises _Unbounded."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str) or not (pattern.startswith("^") and pattern.endswith("$")):
        return 0
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise _Unbounded(f"a pattern has more than {MAX_PATTERN_LENGTH} characters")
    try:
        return patterns.add(pattern)
    except Unreadable as error:
        raise _Unbounded(f"pattern {pattern[:100]}: {error}") from None
