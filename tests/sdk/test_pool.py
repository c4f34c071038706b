"""The connections of the clients: what is kept, for how long, and how long is waited on one."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from octoai import ApiError, ApiTimeoutError, AsyncOctoAI, OctoAI, Timeout, _async_connection, _connection, _pool
from octoai._sockets import tune
from tests.sdk.conftest import MESSAGES
from tests.sdk.misbehaving import Exchange, answer, chunk

LONG = "x" * 8_000_000
OK = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{"choices":1}'
REFUSAL = b'{"error":{"message":"too large"}}'
TOO_LARGE = b"HTTP/1.1 413 X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(REFUSAL),
    REFUSAL,
)


@contextmanager
def listening(serve_one: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a service that takes a request as it likes; its connections have little room for what it has not
    read."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    taken: list[socket.socket] = []

    def serve_all() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                taken.append(connection)
                threading.Thread(target=serve_quietly, args=(connection,), daemon=True).start()

    def serve_quietly(connection: socket.socket) -> None:
        with suppress(OSError):
            serve_one(connection)

    thread = threading.Thread(target=serve_all, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(2)
        for connection in taken:
            connection.close()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes little of a request before it has left."""

    def tuned(raw: socket.socket) -> None:
        tune(raw)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)

    monkeypatch.setattr(_pool, "tune", tuned)
    monkeypatch.setattr(_async_connection, "tune", tuned)


def head_of(connection: socket.socket) -> tuple[bytes, int]:
    """The head of a request, and how much of its body is still to come."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = connection.recv(4096)
        if not block:
            raise ConnectionResetError
        data += block
    head, _, body = data.lower().partition(b"\r\n\r\n")
    return head, int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]) - len(body)


def take_slowly(connection: socket.socket, left: int, pause: float) -> None:
    while left > 0:
        left -= len(connection.recv(min(left, 200_000)))
        time.sleep(pause)


@pytest.mark.usefixtures("narrow")
def test_a_long_request_may_take_longer_than_one_wait(api: Any) -> None:
    def serve_one(connection: socket.socket) -> None:
        take_slowly(connection, head_of(connection)[1], 0.02)
        connection.sendall(OK)
        time.sleep(1)

    with listening(serve_one) as url:
        began = time.monotonic()
        client = api.client(timeout=Timeout(read=0.5), max_retries=0)
        assert api.call(client, "infer", url, {"x": LONG}) == {"choices": 1}
        assert time.monotonic() - began > 0.8


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_first_token_of_a_long_request_is_waited_for_when_it_has_left(
    api: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    def serve_one(connection: socket.socket) -> None:
        if scheme == "https":
            connection = context.wrap_socket(connection, server_side=True)
        take_slowly(connection, head_of(connection)[1], 0.02 if scheme == "http" else 0.002)  # of TLS, 16 KB at once
        event = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + event)
        connection.close()

    with listening(serve_one) as url:
        address = url.replace("http://127.0.0.1", f"{scheme}://localhost")
        client = api.client(base_url=address, timeout=Timeout(read=5, first_token=0.5), max_retries=0)
        assert api.text(api.stream(client, messages=[{"role": "user", "content": LONG}])) == ["a"]


@pytest.mark.parametrize(
    ("timeout", "deadline"), [(Timeout(total=0.6), "total"), (Timeout(read=0.6), "read"), (Timeout(None, 0.6), "read")]
)
def test_a_long_request_that_does_not_leave_ends_in_time(api: Any, timeout: Timeout, deadline: str) -> None:
    def serve_one(connection: socket.socket) -> None:
        _, left = head_of(connection)
        if deadline == "total":
            take_slowly(connection, left, 0.3)
        time.sleep(3)

    with listening(serve_one) as url:
        began = time.monotonic()
        with pytest.raises(ApiTimeoutError) as caught:
            api.call(api.client(timeout=timeout, max_retries=0), "infer", url, {"x": LONG})
        assert caught.value.deadline == deadline
        assert time.monotonic() - began < 1.8


@pytest.mark.parametrize("timeout", [Timeout(read=4), None])
def test_a_refusal_is_read_before_all_of_a_request_has_left(api: Any, timeout: Any) -> None:
    served: list[bytes] = []

    def serve_one(connection: socket.socket) -> None:
        while True:
            head, left = head_of(connection)
            served.append(head)
            if left > 1_000_000:
                connection.sendall(TOO_LARGE)
                time.sleep(5)  # and reads no more
            connection.recv(left) if left > 0 else None
            connection.sendall(OK)

    with listening(serve_one) as url:
        client = api.client(timeout=timeout, max_retries=0)
        began = time.monotonic()
        with pytest.raises(ApiError, match="too large") as caught:
            api.call(client, "infer", url, {"x": LONG})
        assert caught.value.status_code == 413
        assert api.call(client, "infer", url, {}) == {"choices": 1}  # by another connection
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("ending", ["said", "cut off", "lost"])
def test_a_refusal_may_say_why_only_when_all_of_a_request_has_left(api: Any, ending: str) -> None:
    def serve_one(connection: socket.socket) -> None:
        _, left = head_of(connection)
        connection.sendall(TOO_LARGE[: -len(REFUSAL)])
        time.sleep(0.1)
        if ending == "lost":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        else:
            take_slowly(connection, left, 0)
            connection.sendall(REFUSAL if ending == "said" else REFUSAL[:5])
        connection.close()

    with listening(serve_one) as url:
        began = time.monotonic()
        with pytest.raises(ApiError, match="too large" if ending == "said" else "413") as caught:
            api.call(api.client(timeout=Timeout(read=4), max_retries=0), "infer", url, {"x": LONG})
        assert caught.value.status_code == 413
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("timeout", "streams"),
    [
        (Timeout(read=0.8), False),
        (Timeout(read=0.8), True),
        (Timeout(read=9, total=0.8), False),
        (Timeout(read=9, first_token=0.8), True),
    ],
)
def test_a_refusal_that_does_not_say_why_is_one(api: Any, timeout: Timeout, streams: bool) -> None:
    def serve_one(connection: socket.socket) -> None:
        head_of(connection)
        connection.sendall(TOO_LARGE[: -len(REFUSAL)])
        time.sleep(3)  # and neither reads any more nor says why

    with listening(serve_one) as url:
        client = api.client(timeout=timeout, max_retries=0)
        began = time.monotonic()
        with pytest.raises(ApiError, match="413") as caught:
            if streams:
                api.all(client.infer_stream(url, {"x": LONG}))
            else:
                api.call(client, "infer", url, {"x": LONG})
        assert caught.value.status_code == 413
        assert time.monotonic() - began < 1.5  # the reason is waited for once


@pytest.mark.usefixtures("narrow")
def test_what_is_redirected_is_not_sent_to_the_place_that_redirects(api: Any) -> None:
    taken: list[int] = []

    def serve_one(connection: socket.socket) -> None:
        head, left = head_of(connection)
        if b" /moved " in head:
            take_slowly(connection, left, 0)
            connection.sendall(OK)
            return
        connection.sendall(b"HTTP/1.1 307 X\r\nlocation: /moved\r\nconnection: close\r\n\r\n")
        taken.append(0)
        while block := connection.recv(64 * 1024):
            taken[0] += len(block)
            time.sleep(0.01)

    with listening(serve_one) as url:
        assert api.call(api.client(max_retries=0), "infer", url, {"x": LONG}) == {"choices": 1}
    assert taken[0] < len(LONG) / 2


def test_an_answer_that_begins_before_all_of_a_request_has_left_is_no_refusal(api: Any) -> None:
    def serve_one(connection: socket.socket) -> None:
        _, left = head_of(connection)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(OK[:-5])
        take_slowly(connection, left, 0)
        connection.sendall(OK[-5:])
        time.sleep(1)

    with listening(serve_one) as url:
        assert api.call(api.client(max_retries=0), "infer", url, {"x": LONG}) == {"choices": 1}


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


def test_connections_of_services_that_nobody_asks_any_more_are_closed(api: Any, serve: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(_connection, "MAX_IDLE_SECONDS", 0.2)
    monkeypatch.setattr(_async_connection, "MAX_IDLE_SECONDS", 0.2)
    closed: list[float | None] = []

    def script(x: Exchange) -> None:
        x.reply(200, {})
        closed.append(x.seconds_until_closed(3))

    others = [serve(script) for _ in range(3)]
    last = serve(lambda x: x.reply(200, {}))
    client = api.client()
    for server in (*others, last):
        api.call(client, "infer", server.url, {})
    time.sleep(0.3)
    api.call(client, "infer", last.url, {})
    deadline = time.monotonic() + 1
    while len(closed) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(closed) == 3
    assert None not in closed


def test_a_stream_that_outlives_its_client_leaves_no_connection(serve: Any) -> None:
    closed: list[float | None] = []

    def script(x: Exchange) -> None:
        x.stream([chunk("a"), chunk("b", finish="stop")])
        closed.append(x.seconds_until_closed(2))

    server = serve(script)

    async def work() -> None:
        async with AsyncOctoAI(base_url=server.url, api_key="k") as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            await anext(stream)
        assert [each.choices[0].delta.content async for each in stream] == ["b"]
        deadline = time.monotonic() + 1
        while not closed and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    asyncio.run(work())
    assert len(closed) == 1
    assert closed[0] is not None
    assert closed[0] < 1


def test_connections_of_a_forgotten_client_do_not_wait_for_the_garbage_collector(serve: Any) -> None:
    closed: list[float | None] = []

    def script(x: Exchange) -> None:
        x.reply(200, answer())
        closed.append(x.seconds_until_closed(2))

    server = serve(script)

    async def work() -> None:
        client = AsyncOctoAI(base_url=server.url, api_key="k")
        await client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
        del client
        deadline = time.monotonic() + 1
        while not closed and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert closed

    gc.disable()
    try:
        asyncio.run(work())
    finally:
        gc.enable()
