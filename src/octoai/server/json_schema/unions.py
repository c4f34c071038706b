"""In how many ways an answer can be read at once, by the alternatives of a schema: an engine follows all of them.

Alternatives that begin alike are followed together, for every token there is, until what was written tells them apart.
Nesting multiplies them: where two that begin alike lead back to where they are chosen from there is no bound, and
llama.cpp took 24 s for 40 tokens of two such arrays. A schema is read as llama.cpp reads it: the required properties
come first, in the order of `properties`. Knows of patterns only in how many ways each is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from octoai.server.json_schema.keywords import Schema, alternatives, named, types_of, within

MAX_READINGS = 128  # about a second for a short answer; 900 took eleven
_LITERALS = 8  # count as one other reading, with which an enum may have as many as are accepted of alternatives
_TEXTS = 40  # readings of a text count as one other: there may be plain ones beside any pattern that is accepted
_MAX_NAMES = 8  # of properties in which alternatives are told apart, or not at all
_KINDS = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}
_KINDS[type(None)] = "null"
_ALL = frozenset(_KINDS.values())
_PLAIN = _ALL - {"object", "array"}
_DONE = 2**62  # more than there are parts
_ADVICE = "give each, as its first required property, one with a const of its own"
_SIMPLER = f"{_ADVICE}, or patterns that are read in fewer"
_Path = Sequence[frozenset[str] | None]  # what comes first, and then: one of these, or anything
_Beginning = Mapping[str, _Path]  # for each kind of value that it can be


class Ambiguous(ValueError):
    """The schema cannot be offered to an engine; the text says why."""


class Unions:
    """Those of a schema. `targets`: what its references stand for; none leads to itself by references alone. `texts`:
    in how many ways a text is read by the patterns of a part, by its id."""

    def __init__(self, targets: Mapping[str, Schema], texts: Mapping[int, int]) -> None:
        self._targets = targets
        self._texts = texts
        self._begun: dict[int, tuple[_Beginning, int]] = {}
        self._readings: dict[int, int] = {}

    def check(self, schema: Schema) -> None:
        """Raises Ambiguous."""
        try:
            for group in self._groups(schema):
                num = self._num_readings(group)
                if num > MAX_READINGS:
                    raise Ambiguous(f"alternatives of anyOf can be read in more than {MAX_READINGS} ways: {_SIMPLER}")
                self._readings.update(dict.fromkeys(map(id, group), num))
        except RecursionError:
            raise Ambiguous("its alternatives are nested too deeply") from None

    def _groups(self, schema: Schema) -> Iterator[list[Schema]]:
        """Parts that all lead to each other, or one that does not lead to itself. What they lead to comes first."""
        numbers = {id(schema): 0}
        path, borders = [schema], [0]  # those in no group yet, and where among them one may begin
        walk = [(schema, iter(self._within(schema)))]
        while walk:
            part, rest = walk[-1]
            for each in rest:
                number = numbers.setdefault(id(each), len(path))
                if number == len(path):
                    path.append(each)
                    borders.append(number)
                    walk.append((each, iter(self._within(each))))
                    break
                while number < borders[-1]:
                    borders.pop()
            else:
                walk.pop()
                start = numbers[id(part)]
                if start == borders[-1]:
                    borders.pop()
                    yield path[start:]
                    numbers.update((id(each), _DONE) for each in path[start:])
                    del path[start:]

    def _within(self, schema: Schema) -> list[Schema]:
        """What an engine reads of it: not the definitions that nothing refers to."""
        reference = schema.get("$ref")
        return [self._targets[reference]] if isinstance(reference, str) else within(schema)

    def _num_readings(self, group: Sequence[Schema]) -> int:
        """Of a group, whose parts have no number yet. `beside`: what is followed together with one that leads back."""
        most, beside = 1, 0
        for part in group:
            within = [self._readings.get(id(each), 1) for each in self._within(part)]
            most = max(most, self._begin(part)[1] // _LITERALS, self._texts.get(id(part), 0) // _TEXTS, *within)
            for together in self._alike(alternatives(part)):
                if most > MAX_READINGS:
                    break
                others = [self._readings[id(each)] for each in together if id(each) in self._readings]
                num_back = len(together) - len(others)
                if num_back > 1:
                    raise Ambiguous(f"alternatives of anyOf that begin alike lead back to it: {_ADVICE}")
                if num_back:
                    beside = max(beside, sum(others))
                else:
                    most = max(most, sum(others))
        return most + beside

    def _alike(self, alternatives: Sequence[Schema]) -> Iterator[list[Schema]]:
        """For each of them those that it cannot be told from, without literals: nothing more is in those."""
        begun = [(each, self._begin(each)[0]) for each in alternatives if _literals(each) is None]
        for _, beginning in begun:
            yield [each for each, other in begun if _are_alike(beginning, other)]

    def _begin(self, schema: Schema) -> tuple[_Beginning, int]:
        """How it begins, and in how many ways at first."""
        if id(schema) not in self._begun:
            self._begun[id(schema)] = self._beginning(schema)
        return self._begun[id(schema)]

    def _beginning(self, schema: Schema) -> tuple[_Beginning, int]:
        same = self.same_value(schema)
        if same:
            begun = [self._begin(each) for each in same]
            return _either([beginning for beginning, _ in begun]), sum(num for _, num in begun)
        literals = _literals(schema)
        if literals is not None:
            return _of_literals(literals), len(literals) * max(1, len(_types(schema)))  # read once for each type
        types = _types(schema) or ["object" if "properties" in schema else "array" if "items" in schema else ""]
        kinds = types if _ALL.issuperset(types) else list(_ALL)
        return {kind: self._names(schema) if kind == "object" else () for kind in kinds}, len(kinds)

    def same_value(self, schema: Schema) -> list[Schema]:
        """The schemas in it of the value that it is itself of."""
        return self._within(schema) if isinstance(schema.get("$ref"), str) else alternatives(schema)

    def _names(self, schema: Schema) -> _Path:
        """Those of its required properties, each with its value, up to one in which there can be more alternatives."""
        required = schema.get("required")
        properties = named(schema, "properties")
        path: list[frozenset[str] | None] = []
        for name in islice(
            (each for each in properties if isinstance(required, list) and each in required), _MAX_NAMES
        ):
            value = properties[name]
            while isinstance(value, dict) and isinstance(value.get("$ref"), str):
                value = self._targets[value["$ref"]]
            literals = _literals(value) if isinstance(value, dict) else []
            path += [frozenset({name}), None if literals is None else frozenset(map(repr, literals))]
            if literals is None and not all(map(_is_plain, alternatives(value) or [value])):
                break
        return path


def _types(schema: Schema) -> list[str]:
    return ["number" if each == "integer" else each for each in types_of(schema)]


def _is_plain(schema: Schema) -> bool:
    types = _types(schema)
    return _literals(schema) is not None or (bool(types) and _PLAIN.issuperset(types))


def _literals(schema: Schema) -> list[Any] | None:
    if any(key in schema for key in ("$ref", "oneOf", "anyOf")):  # which engines look at first
        return None
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _of_literals(values: Sequence[Any]) -> _Beginning:
    found: dict[str, set[str]] = {}
    for value in values:
        found.setdefault(_KINDS[type(value)], set()).add(repr(value))
    return {kind: [frozenset(texts)] if kind in _PLAIN else () for kind, texts in found.items()}


def _either(beginnings: Sequence[_Beginning]) -> _Beginning:
    found: dict[str, _Path] = {}
    for beginning in beginnings:
        for kind, path in beginning.items():
            together = zip(found.get(kind, path), path, strict=False)
            found[kind] = [one and other and one | other for one, other in together]
    return found


def _are_alike(one: _Beginning, other: _Beginning) -> bool:
    return any(
        all(not a or not b or not a.isdisjoint(b) for a, b in zip(path, other[kind], strict=False))
        for kind, path in one.items()
        if kind in other
    )
