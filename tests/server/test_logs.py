"""A record is one line of JSON, whatever is in it; and there are no more of a kind than somebody would read."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octoai.server import logs, run, serving
from octoai.server.logs import Bounded, JsonLines, Lines
from octoai.server.serving import Stop
from tests.talking import until


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


class Read:
    """A pipe that records are written to, and what comes out of it."""

    def __init__(self) -> None:
        self.output, self.input = os.pipe()
        self._handler = Lines(self.input)
        self._handler.setFormatter(JsonLines())
        self.log = logging.Logger("octoai.test")
        self.log.addHandler(self._handler)

    def flush(self) -> None:
        self._handler.flush()

    def lines(self) -> list[dict[str, Any]]:
        """All that there are, once nothing comes any more."""
        os.set_blocking(self.output, False)
        text, until_time = b"", time.monotonic() + 1
        while time.monotonic() < until_time:
            try:
                text += os.read(self.output, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def read() -> Iterator[Read]:
    read = Read()
    yield read
    os.close(read.output)  # which also ends a writing that waits


def test_nobody_waits_for_who_reads_no_more_and_what_is_lost_is_counted(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING_BYTES", 50_000)
    began = time.monotonic()
    for number in range(3000):
        read.log.info("said", extra={"fields": {"number": number}})
    assert time.monotonic() - began < 2
    lines, number = read.lines(), 0
    for line in lines:
        assert line.get("number", number) == number
        number += line.get("left_out", 1)
    assert number == 3000
    assert 0 < len([line for line in lines if line["level"] == "warning"]) < 4
    read.log.info("said", extra={"fields": {"number": 3000}})
    assert [line["number"] for line in read.lines()] == [3000]


def test_what_could_not_be_written_is_counted_once_it_can_be(read: Read) -> None:
    other = os.open("/dev/full", os.O_WRONLY)
    pipe = os.dup(read.input)
    os.dup2(other, read.input)
    for _ in range(3):
        read.log.info("said")
        read.flush()
    os.dup2(pipe, read.input)
    read.log.info("said again")
    said, lost = read.lines()
    assert (said["message"], lost["left_out"]) == ("said again", 3)


def test_a_line_that_a_full_disk_cut_spoils_no_other_and_is_counted(tmp_path: Path) -> None:
    """The limit on a file's size is of a whole process: this is one of its own."""
    program = f"""
import logging, os, resource
from octoai.server import logs

handler = logs.Lines(os.open({str(tmp_path / "log")!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
handler.setFormatter(logging.Formatter("%(message)s%(fields)s", defaults={{"fields": ""}}))
log = logging.Logger("octoai.test")
log.addHandler(handler)

def says(*lines: str, room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    for line in lines:
        log.info(line)
    handler.flush()

says("first", "second", "third", "fourth", room=10)  # to the middle of the second
says("fifth", room=16)  # and to the fifth's end, but for that of its line
says("sixth", room=10_000)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["first", "seco", "fifth", "sixth", "lines of this log are lost{'left_out': 3}"]


def test_an_end_waits_for_who_reads_and_not_for_who_does_not(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.5)
    read.log.info("said")
    began = time.monotonic()
    read.flush()
    assert time.monotonic() - began < 0.4
    assert len(os.read(read.output, 1 << 20).splitlines()) == 1
    read.log.info("said" * 50_000)
    read.flush()
    assert 0.5 <= time.monotonic() - began < 2


def test_what_was_said_before_an_end_is_written() -> None:
    program = "from octoai.server import logs; import logging; logs.set_up('info')\n"
    program += "for number in range(2000): logging.info('%d', number)"
    ran = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=True)
    assert [json.loads(line)["message"] for line in ran.stderr.splitlines()] == [str(number) for number in range(2000)]


def test_many_lines_are_written_in_pieces_that_others_cannot_come_between() -> None:
    lines = [bytes([65 + number % 26]) * (number % 900) + b"\n" for number in range(100)] + [b"x" * 9000, b"y"]
    blocks = list(logs._blocks(lines))
    assert [line for block in blocks for line in block] == lines
    assert all(len(block) == 1 or sum(map(len, block)) <= 4096 for block in blocks)
    assert len(blocks) < 25


def test_a_line_for_who_reads_no_more_is_waited_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SAY_SECONDS", 0.3)
    output, descriptor = os.pipe()
    with open(descriptor, "w") as stream:
        logs.say("heard", stream)
        assert os.read(output, 100) == b"heard\n"
        with pytest.raises(TimeoutError):
            logs.say("x" * 100_000, stream)
        until(lambda: len(os.read(output, 1 << 20)) < 65_536, 5)  # what waited is written, and goes
    os.close(output)


@pytest.mark.parametrize("stream", ["stdout", "stderr"], ids=["it is ready", "it is finishing requests"])
def test_nobody_is_served_later_for_a_line_that_is_not_read(monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    output, descriptor = os.pipe()
    os.set_blocking(descriptor, False)
    os.write(descriptor, b"x" * (1 << 20))
    os.set_blocking(descriptor, True)

    async def main() -> None:
        drained = asyncio.Event()
        began = time.monotonic()
        if stream == "stdout":
            run._say_ready("http://x")
        else:
            asyncio.get_running_loop().call_later(0.1, drained.set)
            await serving._drain(SimpleNamespace(num_requests=1, drain=drained.wait), Stop())  # type: ignore[arg-type]
        assert time.monotonic() - began < 0.6

    with open(descriptor, "w") as full:
        monkeypatch.setattr(sys, stream, full)
        asyncio.run(main())
        monkeypatch.undo()
        said = b""
        while not said.endswith(b"\n"):  # it is written all the same
            said += os.read(output, 1 << 20)
        assert said.strip(b"x").startswith(b"octoai ready on http:" if stream == "stdout" else b"octoai: finishing 1 ")
    os.close(output)
