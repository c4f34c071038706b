"""The connections of the clients: what is kept, for how long, and how long is waited on one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from octoai import ApiTimeoutError, OctoAI, Timeout
from tests.sdk.misbehaving import Exchange, answer, chunk


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


@pytest.mark.parametrize("drip", [b"0", b"0\r\nx: ", b"3;x="], ids=["a size", "a trailer", "an extension"])
def test_bytes_that_are_no_body_do_not_begin_a_wait_anew(api: Any, serve: Any, drip: bytes) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream(content_type="application/json" if not x.json["stream"] else "text/event-stream")
        x.event(chunk("a"))
        x.send(drip)
        for _ in range(60):
            x.send(b"0")
            time.sleep(0.05)

    url = serve(script).url
    for timeout, deadline in ((Timeout(total=0.5), "total"), (Timeout(idle=0.5, first_token=5), "idle")):
        began = time.monotonic()
        with pytest.raises(ApiTimeoutError) as caught:
            api.all(api.stream(api.client(base_url=url, timeout=timeout, max_retries=0)))
        assert caught.value.deadline == deadline
        assert time.monotonic() - began < 1.5
    began = time.monotonic()
    with pytest.raises(ApiTimeoutError) as caught:
        api.chat(api.client(base_url=url, timeout=Timeout(total=0.5), max_retries=0))
    assert caught.value.deadline == "total"
    assert time.monotonic() - began < 1.5


def test_what_follows_the_end_delays_nobody(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a", finish="stop"))
        x.send(b"e\r\ndata: [DONE]\n\n\r\n0\r\n")
        for _ in range(60):
            x.send(b"x: y\r\n")
            time.sleep(0.02)

    client = api.client(base_url=serve(script).url)
    began = time.monotonic()
    api.all(api.stream(client))
    assert time.monotonic() - began < 0.6
