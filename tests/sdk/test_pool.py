"""The connections of the synchronous client: what is kept, for how long, and what they say."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from octoai import OctoAI
from tests.sdk.misbehaving import Exchange, answer


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_connections_that_other_services_have_closed_are_let_go(serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.reply(200, {})
        x.hang_up()

    closing = [serve(script) for _ in range(8)]
    last = serve(lambda x: x.reply(200, {}))
    client = OctoAI(api_key="k")
    client.infer(last.url, {})
    before = len(os.listdir("/proc/self/fd"))
    for server in closing:
        client.infer(server.url, {})
    deadline = time.monotonic() + 3
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.02)
        client.infer(last.url, {})
    assert len(os.listdir("/proc/self/fd")) <= before
    assert last.connections == 1


def test_connections_of_several_services_are_kept(serve: Any) -> None:
    servers = [serve(lambda x: x.reply(200, answer())) for _ in range(3)]
    client = OctoAI(api_key="k")
    for _ in range(3):
        for server in servers:
            client.infer(server.url, {})
    assert [server.connections for server in servers] == [1, 1, 1]
