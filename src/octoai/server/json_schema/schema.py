"""Which JSON Schemas are accepted for an answer, or for a tool's arguments: bounded ones.

An engine turns a schema into a grammar and tries it on every token, for everybody in the same batch: llama.cpp took
0.4 s an answer for an `enum` of 100 values, 7 s for one of 2,000 and did not come back within 30 s from one of 5,000.
It does not come back either from bounds whose larger one is first, and from a reference to itself it crashes. The
bounds are those that OpenAI documents for structured outputs, where it has one. Of patterns: `patterns`, of those that
are followed together: `unions`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from graphlib import CycleError, TopologicalSorter

from octoai.server.errors import BadRequest
from octoai.server.json_schema.expressions import Unreadable
from octoai.server.json_schema.extents import check_bounds, num_alike, num_repeated
from octoai.server.json_schema.keywords import (
    CHOICES,
    REPEATED_AT_MOST,
    Schema,
    Unbounded,
    listed,
    named,
    target,
    within,
)
from octoai.server.json_schema.patterns import Readings
from octoai.server.json_schema.rewriting import LEADS_TO_ITSELF, MAX_PARTS, TOO_MANY_PARTS, Rewriting
from octoai.server.json_schema.unions import Ambiguous, Unions

MAX_BYTES = 128 * 1024
MAX_ALTERNATIVES = 1000
MAX_OPTIONAL = 400  # an engine has a rule for each that can come after each: a second, and 4.6 of 900
MAX_ALIKE_RULES = 10_000_000  # of optional properties whose names are one to llama.cpp: 215 of them take 0.6 s more
MAX_NAME_LENGTH = 256  # beside additionalProperties llama.cpp descends a level for each character: 30,000 crashed it
MAX_ALIKE = 30_000  # letters of all values that begin alike, each of which an engine follows: two or three seconds
MAX_REPEATED = 400_000  # an engine makes a part of its grammar for each: of 1.8 million it took 4 s and gigabytes
_STRIPPED = re.compile("[^a-zA-Z0-9-]+")  # by llama.cpp, of the names of rules
_BRANCHES = (*CHOICES, "enum", "prefixItems", "properties")


def bounded(schema: Schema) -> Schema:
    """The schema of an answer, where it is small enough. Raises BadRequest."""
    _refuse_unbounded([schema], "response_format")
    return schema


def refuse_unbounded_tools(schemas: Sequence[Schema]) -> None:
    """Where one of them is to be called engines make one grammar of the arguments of all. Raises BadRequest."""
    _refuse_unbounded(schemas, "tools")


def for_llama_cpp(schema: Schema) -> Schema:
    """As it reads it rightly. Raises BadRequest, where it would read something else whatever is said."""
    rewriting = Rewriting(schema)
    read = rewriting.done()
    if rewriting.unfollowed:
        raise BadRequest(f"response_format: {rewriting.unfollowed}", param="response_format")
    return read


def _refuse_unbounded(schemas: Sequence[Schema], param: str) -> None:
    try:
        try:
            size = sum([len(json.dumps(schema, allow_nan=False)) for schema in schemas])
        except ValueError:
            raise Unbounded(
                "the schema has a number that is none in JSON: NaN, or one that is too large, as 1e999"
            ) from None
        if size > MAX_BYTES:
            raise Unbounded(f"the schema has {size} bytes; at most {MAX_BYTES} are accepted")
        seen, read = _Seen(), [Rewriting(schema).done() for schema in schemas]
        for schema in read:
            seen.add(schema)
    except Unbounded as refused:
        raise BadRequest(f"{param}: {refused}", param=param) from None


class _Seen:
    """What there is in schemas that are offered together."""

    def __init__(self) -> None:
        self._num_parts = self._num_alternatives = self._num_repeated = self._num_alike_rules = 0
        self._patterns = Readings()
        self._texts: dict[int, int] = {}
        self._literals: set[str] = set()

    def add(self, schema: Schema) -> None:
        """Raises Unbounded."""
        targets: dict[str, Schema] = {}
        parts = [schema]
        for part in parts:  # which there are more of with each
            self._add_part(part)
            reference = part.get("$ref")
            if isinstance(reference, str) and reference not in targets:
                targets[reference] = target(schema, reference) or {}
                parts.append(targets[reference])
            parts.extend(within(part))
        unions = Unions(targets, self._texts)
        try:
            same_value = {id(part): map(id, same) for part in parts if (same := unions.same_value(part))}
            TopologicalSorter(same_value).prepare()
        except CycleError:
            raise Unbounded(LEADS_TO_ITSELF) from None
        self._refuse_too_many()
        try:
            unions.check(schema)
        except Ambiguous as error:
            raise Unbounded(str(error)) from None

    def _refuse_too_many(self) -> None:
        if self._num_repeated > MAX_REPEATED:
            raise Unbounded(
                f"minLength, maxLength, minItems, maxItems and the bounds of patterns come to {self._num_repeated} in "
                f"all (each to {REPEATED_AT_MOST} at most); {MAX_REPEATED} are accepted"
            )
        if self._num_alternatives > MAX_ALTERNATIVES:
            counted = f"{self._num_alternatives} properties, branches and enum values"
            raise Unbounded(f"the schema has {counted}; at most {MAX_ALTERNATIVES} are accepted")
        if sum(map(len, self._literals)) > MAX_ALIKE and (num := num_alike(self._literals)) > MAX_ALIKE:
            raise Unbounded(
                f"values of enum and const, or names of properties that may be left out, begin alike in {num} letters, "
                f"summed over them; at most {MAX_ALIKE} are accepted: leave out what all begin with, or offer fewer"
            )

    def _add_part(self, part: Schema) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise Unbounded(TOO_MANY_PARTS)
        self._num_alternatives += sum(len(part[key]) for key in _BRANCHES if isinstance(part.get(key), (dict, list)))
        self._num_repeated += num_repeated(part)
        properties = named(part, "properties")
        if len(longest := max(properties, key=len, default="")) > MAX_NAME_LENGTH:
            named_so = f"the property {longest[:20]}… has a name of {len(longest)} characters"
            raise Unbounded(f"{named_so}; at most {MAX_NAME_LENGTH} are taken")
        optional = properties.keys() - {each for each in listed(part, "required") if isinstance(each, str)}
        if optional:
            self._add_optional(optional)
        values = [part["const"]] if "const" in part else listed(part, "enum")
        self._literals.update(optional, map(json.dumps, values))
        check_bounds(part)
        self._texts[id(part)] = _num_readings(part, self._patterns)

    def _add_optional(self, names: Collection[str]) -> None:
        """What may follow one is a rule with its name, which llama.cpp makes again for each one before it, and tells by
        a number from those of names that are the same to it, looking through all of these."""
        if len(names) > MAX_OPTIONAL:
            raise Unbounded(
                f"an object has {len(names)} properties that may be left out; at most {MAX_OPTIONAL} are accepted"
            )
        alike = Counter([_STRIPPED.sub("-", name) for name in names])
        self._num_alike_rules += len(names) * sum([num * num for num in alike.values()])
        if self._num_alike_rules > MAX_ALIKE_RULES:
            raise Unbounded(
                "too many properties that may be left out have names that differ only in what is neither a Latin "
                "letter nor a digit: require more of them, or give fewer"
            )


def _num_readings(schema: Schema, patterns: Readings) -> int:
    """Of a text. Raises Unbounded."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str):
        return 0
    try:
        return patterns.add(pattern)
    except Unreadable as error:
        given = schema.get("$comment", pattern)
        raise Unbounded(f"pattern {given[:100]}: {error}") from None
