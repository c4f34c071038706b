"""A record is one line of JSON, whatever is in it."""

from __future__ import annotations

import json
import logging
import os

import pytest

from octoai.server.logs import JsonLines


@pytest.mark.parametrize("value", ["plain", os.fsdecode(b"/data/\xff"), 2**70, {"in": [2**64]}])
def test_a_record_is_one_line_whatever_is_in_it(value: object) -> None:
    record = logging.LogRecord("octoai.test", logging.INFO, __file__, 1, "what was said: %s", (value,), None)
    record.fields = {"value": value}
    line = JsonLines().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert said["message"] == f"what was said: {value}"
    assert said["value"] == value
