"""Schemas in other words that mean the same, where llama.cpp reads the usual ones as something else.

It looks at a `$ref`, then at alternatives, and at nothing that stands beside them; of an `allOf` it makes one object,
of the properties that it finds. So what is said of one value is said in one part. And it makes one grammar of a schema,
whose rules have the names of what they were made for, but for what is neither a Latin letter nor a digit: `$defs` whose
names are Chinese are all one rule to it, as are `Item_` and `Item__`, and a property that is called like one of them.
So what is referred to gets names of ours, which nobody else knows.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from functools import cache
from itertools import product
from math import prod
from typing import Any

from octoai.server.json_schema.keywords import (
    ANYTHING,
    CHOICES,
    COMBINING,
    OF_SCHEMAS,
    READ,
    Schema,
    Unbounded,
    check_types,
    listed,
    named,
    place_of,
    target,
    within,
)
from octoai.server.json_schema.plain import Impossible, Unfollowed, both, heeded, possible, put_right, told_pattern

MAX_PARTS = 20_000  # with what $refs stand for, in an allOf each time
MAX_REFERENCE_LENGTH = 1000
_UNKNOWN_NAME = secrets.token_hex(4)
_BESIDE = READ - COMBINING
_CHOICES = frozenset(CHOICES)
_HOLDING = {"properties", *OF_SCHEMAS}
_STEP, _MANY = 17, 100  # letters in the name of a rule; a property's whose name may be like others' has many
LEADS_TO_ITSELF = "a $ref leads to itself: let properties or items be between"
TOO_MANY_PARTS = (
    f"the schema has more than {MAX_PARTS} parts, with those that its $refs stand for, in an allOf for each of them: "
    "refer to what is large without allOf, to fewer alternatives, and give shorter patterns"
)


class Rewriting:
    """Each part that is referred to stands once among the definitions, and no other does; nor does anything stand
    beside a reference or alternatives. `unfollowed`: what of it llama.cpp cannot be told, and what to write instead."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._num_parts = 0
        self._targets: dict[str, Schema | None] = {}
        self._names: dict[tuple[int, ...], str] = {}  # by the ids of all that is said of what is referred to
        self._waiting: list[tuple[str, Sequence[Schema]]] = []
        self._told_pattern = cache(told_pattern)
        self.unfollowed = ""

    def done(self) -> Schema:
        """Raises Unbounded."""
        try:
            whole = self._definition([self._schema])
            definitions = {}
            while self._waiting:
                name, parts = self._waiting.pop()
                definitions[name] = self._definition(parts)
        except RecursionError:
            raise Unbounded("its parts are nested too deeply") from None
        return {**whole, "$defs": definitions} if definitions else whole

    def _take_part(self, part: Schema) -> None:
        self._take(1 + len(part) // 64)  # of what nobody reads there may be much
        check_types(part)

    def _take(self, num_parts: int) -> None:
        self._num_parts += num_parts
        if self._num_parts > MAX_PARTS:
            raise Unbounded(TOO_MANY_PARTS)

    def _definition(self, parts: Sequence[Schema]) -> dict[str, Any]:
        """What is said of one value by each of the parts."""
        if not parts:
            return {}
        if len(parts) == 1 and not _says_more_than_one(parts[0]):
            return self._written(parts[0])
        said = self._said(parts)
        if len(said) == 1 and not _says_more_than_one(said[0]):
            return self._reference(said)
        try:
            return self._combined(said, parts[0])
        except Impossible:
            return self._impossible(parts[0])

    def _leave_out(self, part: Schema, words: str) -> None:
        if not self.unfollowed:
            place = place_of(part, self._schema)
            self.unfollowed = f"{place}: {words}" if place else words

    def _impossible(self, part: Schema) -> dict[str, Any]:
        """What is left of it to be counted: other engines are given it as it came."""
        self._leave_out(part, "no value is all that it says")
        return {"enum": part["enum"]} if "enum" in part else {}

    def _written(self, part: Schema, num_letters: int = 0) -> dict[str, Any]:
        """`num_letters`: of the name that llama.cpp gives a rule for it."""
        self._take_part(part)
        if _says_more_than_one(part):
            return self._reference(self._said([part]))
        try:
            return self._plain(part, part, num_letters)
        except Impossible:
            return self._impossible(part)

    def _plain(self, part: Schema, place: Schema, num_letters: int = 0) -> dict[str, Any]:
        """Raises Impossible."""
        if isinstance(part.get("$ref"), str):
            found = self._target(part["$ref"])
            return {"$ref": part["$ref"]} if found is None else self._reference([found])
        kept = heeded(part)
        try:
            kept = put_right(kept)
        except Unfollowed as error:
            self._leave_out(place, str(error))
        if isinstance(kept.get("pattern"), str):
            self._put_pattern_right(kept)
        return {
            key: self._value_written(key, value, num_letters) if key in _HOLDING else value
            for key, value in kept.items()
            if key in READ or key == "$comment"
        }

    def _put_pattern_right(self, part: dict[str, Any]) -> None:
        given = part["pattern"]
        told = self._told_pattern(given)
        if told is None:  # any text is taken, of the length that is said
            del part["pattern"]
            part.setdefault("minLength", 0)
        else:
            self._take(len(told) // 64)  # it may be much longer
            part |= {"pattern": told, "$comment": given}  # a refusal shows what was given

    def _value_written(self, key: str, value: Any, num_letters: int) -> Any:
        if key == "properties" and isinstance(value, dict):
            letters = {name: len(name) if name.isascii() and name.isalnum() else _MANY for name in value}
            return {
                name: self._any_written(each, num_letters + letters[name])
                for name, each in value.items()
                if each is not False
            }
        if isinstance(value, list):
            value = possible(value) if key in _CHOICES else value
            return [self._any_written(each, num_letters + _STEP) for each in value]
        return self._any_written(value, num_letters + _STEP) if isinstance(value, dict) or key == "items" else value

    def _any_written(self, said: Any, num_letters: int) -> Any:
        """What has a long name, and more in it, is told as a definition: it takes llama.cpp a while to make a rule of
        such a name, and an object has many."""
        if not isinstance(said, dict):
            return {} if said is True else said
        is_long = num_letters >= _MANY and within(said)
        return self._reference([said]) if is_long else self._written(said, num_letters)

    def _said(self, parts: Sequence[Schema]) -> list[Schema]:
        """All that say something of the value that the parts are of: they, what they refer to, and what is in their
        allOf."""
        found: dict[int, Schema] = {}
        for part in parts:
            self._add_said(part, found, set())
        return [part for part in found.values() if not (READ - {"$ref", "allOf"}).isdisjoint(part)]

    def _add_said(self, part: Schema, found: dict[int, Schema], path: set[int]) -> None:
        if id(part) in path:
            raise Unbounded(LEADS_TO_ITSELF)
        if id(part) in found:
            return
        self._take_part(part)
        found[id(part)] = part
        path.add(id(part))
        if "$ref" in part:
            target = self._target(part["$ref"]) if isinstance(part["$ref"], str) else None
            if target is None:
                self._leave_out(part, "$ref: it leads nowhere in the schema; refer to one of its $defs")
            else:
                self._add_said(target, found, path)
        for each in self._members(part, "allOf") if "allOf" in part else ():
            self._add_said(each, found, path)
        path.remove(id(part))

    def _members(self, part: Schema, key: str) -> list[Schema]:
        members = listed(part, key) if key == "allOf" else possible(listed(part, key))
        members = [ANYTHING if each is True else each for each in members]
        schemas: list[Schema] = [each for each in members if isinstance(each, dict)]
        if not schemas or len(schemas) < len(members):
            self._leave_out(part, f"{key}: a list of objects that are schemas is wanted")
        return schemas

    def _combined(
        self, said: Sequence[Schema], place: Schema, chosen_from: frozenset[int] = frozenset()
    ) -> dict[str, Any]:
        """`chosen_from`: the parts of whose alternatives some are among what is said. Raises Impossible."""
        choosing = {id(part) for part in said if not _CHOICES.isdisjoint(part)}
        if choosing & chosen_from:
            raise Unbounded(LEADS_TO_ITSELF)
        self._take(sum(map(_size, said)) // 8)
        plain = [{key: value for key, value in heeded(part).items() if key not in COMBINING} for part in said]
        choices = [self._members(part, key) for part in said for key in CHOICES if key in part]
        if not choices:
            return self._plain(self._merged(plain, place), place)
        self._take(prod(map(len, choices)))
        alternatives = []
        for chosen in product(*choices):
            try:
                alternatives.append(self._combined([*plain, *self._said(chosen)], place, chosen_from | choosing))
            except Impossible:
                continue
        if not alternatives:
            raise Impossible
        return {"anyOf": alternatives} if len(alternatives) > 1 else alternatives[0]

    def _merged(self, parts: Sequence[Schema], place: Schema) -> dict[str, Any]:
        """Raises Impossible."""
        said: dict[str, list[Any]] = {}
        for part in parts:
            for key, value in part.items():
                said.setdefault(key, []).append(value)
        whole = {key: values[0] for key, values in said.items()}
        num_arrays = sum(not {"items", "prefixItems"}.isdisjoint(part) for part in parts)
        if num_arrays > 1 and ("prefixItems" in whole or isinstance(whole["items"], list)):
            self._leave_out(place, "items: of a list of them and of another schema; write one that says both")
        for key, values in said.items():
            if key in ("items", "additionalProperties"):
                whole[key] = self._together(values)
            elif len(values) > 1:
                try:
                    whole[key] = both(key, values)
                except Unfollowed as error:
                    self._leave_out(place, str(error))
        if "properties" in whole and len(parts) > 1:
            whole["properties"] = self._properties(parts)
        return whole

    def _properties(self, parts: Sequence[Schema]) -> dict[str, Any]:
        """One that a part does not name is what that part says all others are."""
        names = dict.fromkeys(name for part in parts for name in named(part, "properties"))
        self._take(len(names) * len(parts))
        found = {}
        for name in names:
            said = [named(part, "properties").get(name, part.get("additionalProperties", True)) for part in parts]
            found[name] = self._together(said)
        return {name: value for name, value in found.items() if value is not False}

    def _together(self, said: Sequence[Any]) -> Any:
        """One schema for all of them."""
        if any(each is False for each in said):
            return False
        schemas = [each for each in said if isinstance(each, dict) and not READ.isdisjoint(each)]
        if len(schemas) > 1:
            return self._reference(self._said(schemas))
        return schemas[0] if schemas else said[0]

    def _reference(self, parts: Sequence[Schema]) -> dict[str, Any]:
        key = tuple(map(id, parts))
        if key not in self._names:
            # It ends in a letter: llama.cpp counts up rules of one name by digits behind it.
            self._names[key] = f"r{_UNKNOWN_NAME}n{len(self._names)}x"
            self._waiting.append((self._names[key], parts))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _target(self, reference: str) -> Schema | None:
        if len(reference) > MAX_REFERENCE_LENGTH:
            raise Unbounded(f"a $ref has {len(reference)} characters; at most {MAX_REFERENCE_LENGTH} are accepted")
        if reference not in self._targets:
            self._targets[reference] = target(self._schema, reference)
        return self._targets[reference]


def _says_more_than_one(part: Schema) -> bool:
    """Of what llama.cpp looks at one after the other."""
    combining = COMBINING.intersection(part)
    return "allOf" in combining or len(combining) > 1 or (bool(combining) and not _BESIDE.isdisjoint(part))


def _size(part: Schema) -> int:
    """How much there is in it to be looked at for each alternative that it stands beside: values, and their letters."""
    values = [listed(part, "enum"), listed(part, "required"), list(named(part, "properties"))]
    letters = json.dumps([*values, part.get("const"), part.get("pattern")])
    return len(part) + sum(map(len, values)) + len(letters) // 32
