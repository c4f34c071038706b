"""How much a part of a schema asks for: bounds that can be kept, and how often something is to be written out.

llama.cpp does not come back from bounds whose larger one is first, and makes a part of its grammar for each repetition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from itertools import groupby, pairwise
from os.path import commonprefix

from octoai.server.json_schema.keywords import MAX_INTEGER, REPEATED_AT_MOST, Schema, Unbounded, number, types_of

_MAX_COUNT = 2**31 - 1
LEAST_INTEGER = -(2**63)  # with MAX_INTEGER to llama.cpp the same as no bound
MAX_LONE_BOUND = 10**15 - 1  # llama.cpp has no more digits where there is but one bound
_COUNTED = (("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"))
_REPETITION = re.compile(r"[{,]\s*\+?([0-9]{1,9})")


def check_bounds(schema: Schema) -> None:
    for least_name, most_name in _COUNTED:
        least, most = number(schema, least_name), number(schema, most_name)
        if least is not None and least > _MAX_COUNT:
            raise Unbounded(f"{least_name}: at most {_MAX_COUNT} is accepted")
        if least is not None and most is not None and least > most:
            raise Unbounded(f"{least_name} is more than {most_name}")
    if "integer" in types_of(schema):
        _check_integer(schema)


def _check_integer(schema: Schema) -> None:
    least, most = LEAST_INTEGER, MAX_INTEGER
    for name in ("exclusiveMinimum", "minimum", "exclusiveMaximum", "maximum"):
        bound = number(schema, name)
        if bound is None:
            continue
        if not LEAST_INTEGER <= bound <= MAX_INTEGER:
            raise Unbounded(f"{name}: for integers at least -2^63, and less than 2^63")
        if name.endswith("inimum"):
            least = math.ceil(bound) if name == "minimum" else math.floor(bound) + 1
        else:
            most = math.floor(bound) if name == "maximum" else math.ceil(bound) - 1
    if least > most:
        raise Unbounded("no integer lies between minimum and maximum")
    is_lone = least > MAX_LONE_BOUND and most == MAX_INTEGER
    if is_lone or (most < -MAX_LONE_BOUND and least <= LEAST_INTEGER + 1):
        raise Unbounded(
            f"integers: a minimum of more than {MAX_LONE_BOUND} needs a maximum of less than 2^63 - 1, and a maximum "
            f"of less than -{MAX_LONE_BOUND} a minimum of more than 1 - 2^63"
        )


def num_repeated(schema: Schema) -> int:
    """How often parts of it are, at most: what is bounded is written out. A list of items is as many."""
    items, pattern = schema.get("items"), schema.get("pattern")
    num = len(items) if isinstance(items, list) else 0
    for names in (("minLength", "maxLength"), ("minItems", "maxItems")):
        num += max([0, *[int(min(REPEATED_AT_MOST, number(schema, name) or 0)) for name in names]])
    if isinstance(pattern, str):
        num += sum(min(int(each), REPEATED_AT_MOST) for each in _REPETITION.findall(pattern))
    return num


def num_alike(texts: Collection[str]) -> int:
    """How many of the texts are still possible at each letter that they share, summed over the letters, at most."""
    shared = [len(commonprefix(pair)) for pair in pairwise(sorted(texts))]  # noqa: RUF071 letters are what is meant
    num = before = 0
    for length in sorted(set(shared) - {0}):
        runs = [len(list(run)) for is_longer, run in groupby(shared, length.__le__) if is_longer]
        num += (length - before) * (max(runs) + 1)
        before = length
    return num
