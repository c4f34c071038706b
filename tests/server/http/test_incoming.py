"""A request's body, as its connection tells of it."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

from octoai.server.http.heads import Head
from octoai.server.http.incoming import Incoming

NUM_BLOCKS = 20_000


def incoming() -> Incoming:
    connection: Any = SimpleNamespace(flow=SimpleNamespace(resume_reading=lambda: None))
    return Incoming(connection, Head("/v1/completions", {}, keep_alive=True, expects_continue=False))


def test_a_body_of_many_small_blocks_is_counted_in_no_time() -> None:
    request = incoming()
    began = time.process_time()
    for number in range(NUM_BLOCKS):
        request.came(b"x")
        assert request.num_waiting_bytes == number + 1
    assert time.process_time() - began < 0.5  # 0.01 s where it is as it should be, 2 s where it is not


def test_a_body_of_many_small_blocks_takes_about_its_bytes() -> None:
    request = incoming()
    blocks = [b"%03d" % (number % 1000) for number in range(NUM_BLOCKS)]
    tracemalloc.start()
    try:
        for number in range(NUM_BLOCKS):
            request.came(b"%03d" % (number % 1000))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 2 * 3 * NUM_BLOCKS
    request.came_whole()
    assert asyncio.run(request.body(10**6, 1)) == b"".join(blocks)
