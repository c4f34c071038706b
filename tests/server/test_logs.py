"""A record is one line of JSON, whatever is in it; and there are no more of a kind than somebody would read."""

from __future__ import annotations

import asyncio
import json
import logging
import os

import pytest

from octoai.server.logs import Bounded, JsonLines


@pytest.mark.parametrize("value", ["plain", os.fsdecode(b"/data/\xff"), 2**70, {"in": [2**64]}])
def test_a_record_is_one_line_whatever_is_in_it(value: object) -> None:
    record = logging.LogRecord("octoai.test", logging.INFO, __file__, 1, "what was said: %s", (value,), None)
    record.fields = {"value": value}
    line = JsonLines().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert said["message"] == f"what was said: {value}"
    assert said["value"] == value


def test_of_many_lines_of_a_kind_some_are_written_and_the_rest_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        bounded = Bounded(logging.getLogger("octoai.test"), most_a_second=3)
        for number in range(9):
            bounded.info("said", {"kind": "many"}, lambda number=number: {"number": number})  # type: ignore[misc]
        bounded.info("said", {"kind": "one"}, lambda: {"number": 9})
        await asyncio.sleep(1.2)
        bounded.info("said", {"kind": "many"}, lambda: {"number": 10})

    asyncio.run(main())
    assert [record.fields for record in caplog.records] == [  # type: ignore[attr-defined]
        *({"kind": "many", "number": number} for number in range(3)),
        {"kind": "one", "number": 9},
        {"kind": "many", "left_out": 6},
        {"kind": "many", "number": 10},
    ]
