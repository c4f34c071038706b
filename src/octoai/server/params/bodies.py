"""A body in JSON, read and checked; what is wrong with it is told in FastAPI's shape, which OctoAI's clients know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from octoai.server.errors import InvalidBody, MalformedBody

MAX_PROBLEMS = 100  # that are told of one body: who has more finds out nothing by them
MAX_SHOWN_KEY = 64  # characters of a caller's own key: each is answered several times
MAX_LISTED_PROBLEMS = 10_000  # to list three million takes nine seconds and three gigabytes
# Nobody else is served while a body is read. Of small values ten megabytes are millions, and each list or text among
# them costs much more than a number. So many numbers take a quarter of a second, and prompts of token ids have no more:
# with ids of four digits ten megabytes are full.
MAX_VALUES = 2**21
MAX_LISTS_AND_TEXTS = 2**17
COUNTED_BYTES = 2**18  # a body of fewer bytes cannot have too many


def checked(adapter: TypeAdapter[Any], body: bytes) -> dict[str, Any]:
    if len(body) > COUNTED_BYTES:
        _refuse_countless(body)
    try:
        params: dict[str, Any] = adapter.validator.validate_json(body)
        return params
    except ValidationError as error:
        if error.error_count() > MAX_LISTED_PROBLEMS:
            raise invalid((), f"More than {MAX_LISTED_PROBLEMS} values are wrong", "value_error") from None
        problems = error.errors(include_url=False, include_context=False, include_input=False)[:MAX_PROBLEMS]
    if problems[0]["type"] == "json_invalid":
        raise MalformedBody(f"The body is not valid JSON: {problems[0]['msg'].removeprefix('Invalid JSON: ')}")
    raise InvalidBody(_detail(problems, _lenient_json(body)))


def _refuse_countless(body: bytes) -> None:
    """422 for more values than are read, keys among them, before any of them takes memory."""
    most_lists_and_texts = _num(b'"', body) // 2 + _num(b"[", body) + _num(b"{", body)  # or they stand in texts
    if most_lists_and_texts <= MAX_LISTS_AND_TEXTS and (len(body) < 2 * MAX_VALUES or _num(b",", body) <= MAX_VALUES):
        return
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # what quotes are left begin a text or end it
    num_texts = plain.count(b'"') // 2
    if num_texts <= MAX_LISTS_AND_TEXTS:
        between = b"".join(plain.split(b'"')[::2])
        num_lists = between.count(b"[") + between.count(b"{")
        if num_texts + num_lists <= MAX_LISTS_AND_TEXTS and between.count(b",") <= MAX_VALUES:
            return
    said = f"A body has at most {MAX_VALUES} values, and {MAX_LISTS_AND_TEXTS} texts, lists and objects among them"
    raise invalid((), said, "too_long")


def _num(character: bytes, body: bytes) -> int:
    """How often it stands there. `count` looks at every byte: at an image's for longer than reading it takes."""
    return len(body) - len(body.replace(character, b""))


def _lenient_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # pydantic reads what json does not: then paths stay as pydantic says them
        return None


def invalid(place: Sequence[str | int], message: str, kind: str) -> InvalidBody:
    return InvalidBody([{"loc": ["body", *place], "msg": message, "type": kind}])


def _detail(problems: Iterable[Mapping[str, Any]], data: Any) -> list[dict[str, Any]]:
    """One row a field, in FastAPI's shape. Of a union's complaints the ones that go deepest say what is wrong."""
    rows: dict[tuple[str | int, ...], dict[str, Any]] = {}
    for problem in problems:
        place = _place(problem["loc"], data, missing=problem["type"] == "missing")
        if place not in rows:
            rows[place] = {"loc": ["body", *place], "msg": problem["msg"], "type": problem["type"]}
        elif problem["msg"].lower() not in rows[place]["msg"].lower():
            rows[place]["msg"] += f", or {problem['msg'][0].lower()}{problem['msg'][1:]}"
    outer = {place[:length] for place in rows for length in range(1, len(place))}
    return [row for place, row in rows.items() if place not in outer]


def _place(location: Sequence[str | int], data: Any, *, missing: bool) -> tuple[str | int, ...]:
    """The path in the body. Pydantic's also has the names of a union's branches, which mean nothing to a caller."""
    place: list[str | int] = []
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(data, dict) and (part in data or (is_last and missing)):
            place.append(part[:MAX_SHOWN_KEY] if isinstance(part, str) else part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            place.append(part)
            data = data[part] if part < len(data) else None
    return tuple(place)
