"""What clients can make their connections keep, without a token and with one, is bounded."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from octoai.server import accounts
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import Unavailable
from octoai.server.http import ending
from octoai.server.http import protocol as protocol_module
from octoai.server.http.incoming import Bodies, ClientLeft, Incoming
from octoai.server.http.protocol import MAX_AHEAD, MAX_HEAD_BYTES, protocol_for
from tests.running import InProcess, Start
from tests.server.pipes import LINE, Pipe, Recording, request
from tests.talking import asked, statuses, until

PATH = "/v1/chat/completions"
CHUNKED = LINE + b"host: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"


class Held(Pipe):
    """Knows whether it reads."""

    is_paused = is_aborted = False
    num_unread = 0

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def abort(self) -> None:
        self.is_aborted = True

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class Edge(Recording):
    """Takes large bodies, and says of each how large it is."""

    async def answer(self, incoming: Incoming) -> None:
        with suppress(ClientLeft):
            size = len(await incoming.body(10**6, 5))
            incoming.request_id = "x"
            incoming.begin(200, [(b"content-length", b"%d" % len(str(size)))])
            incoming.end(b"%d" % size)


async def nothing(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def connected(keep_alive: float = 75, asgi: Any = nothing) -> tuple[Any, Held]:
    config = uvicorn.Config(asgi, log_config=None, lifespan="off", ws="none")
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]
    config.load()
    pipe = Held()
    protocol: Any = protocol_for(Edge())(config, ServerState(), {})  # type: ignore[arg-type]
    protocol.connection_made(pipe)
    return protocol, pipe


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


def test_who_does_not_read_its_answers_is_given_no_more_of_them() -> None:
    async def main() -> None:
        protocol, pipe = connected()
        protocol.pause_writing()
        protocol.data_received(request("a", b"1", "") * 5)
        await settle()
        assert pipe.written.count(b"HTTP/1.1 200 OK") == 1
        assert pipe.is_paused
        protocol.resume_writing()
        await settle()
        assert pipe.written.count(b"HTTP/1.1 200 OK") == 5
        assert not pipe.is_paused
        protocol.connection_lost(None)

    asyncio.run(main())


def test_who_sends_one_at_a_time_and_does_not_read_is_not_read_either() -> None:
    async def main() -> None:
        protocol, pipe = connected()
        protocol.pause_writing()
        protocol.data_received(request("a", b"1", ""))
        await settle()
        assert pipe.is_paused
        protocol.resume_writing()
        assert not pipe.is_paused
        protocol.connection_lost(None)

    asyncio.run(main())


def test_requests_sent_ahead_are_read_as_they_are_answered_and_no_faster() -> None:
    async def main() -> None:
        protocol, pipe = connected()
        protocol.data_received(request("a", b"1", "") * 50)
        assert pipe.is_paused
        while pipe.written.count(b"HTTP/1.1 200 OK") < 40:
            await asyncio.sleep(0)
            assert pipe.is_paused
        await settle()
        await settle()
        assert pipe.written.count(b"HTTP/1.1 200 OK") == 50
        assert not pipe.is_paused
        protocol.connection_lost(None)

    asyncio.run(main())


async def echo(scope: Any, _: Any, send: Any) -> None:
    path = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(path))]})
    await send({"type": "http.response.body", "body": path})


AHEAD: dict[str, Callable[[int], bytes]] = {
    "short": lambda _: b"GET /docs HTTP/1.1\r\n\r\n",
    "the same head": lambda _: request("a", b"1", ""),
    "both": lambda number: request("a", b"1", "") if number % 5 else b"GET /docs HTTP/1.1\r\nhost: x\r\n\r\n",
    "in chunks": lambda _: request("a", b"1", "chunked"),
}


@pytest.mark.parametrize("kind", AHEAD)
def test_what_is_sent_ahead_is_kept_as_it_came_but_for_a_few_requests(kind: str) -> None:
    """A thousand of them took 2.4 MB, for which a client had to send 30 KB, and no token."""

    async def main() -> None:
        protocol, pipe = connected(asgi=echo)
        protocol.data_received(AHEAD["the same head"](0))
        await settle()
        sent, num_kept = b"".join(map(AHEAD[kind], range(3000))), 0
        tracemalloc.start()
        protocol.data_received(sent)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size < 2 * len(sent) + 200_000
        while pipe.written.count(b"HTTP/1.1 200 OK") < 3001:
            assert pipe.is_paused or len(protocol.pipeline) < 2
            num_kept = max(num_kept, len(protocol.pipeline))
            await asyncio.sleep(0)
        assert num_kept < MAX_AHEAD + 30
        await settle()
        assert not pipe.is_paused
        protocol.connection_lost(None)

    asyncio.run(main())


def test_who_reads_the_body_of_an_earlier_request_lets_nobody_send_more_ahead() -> None:
    async def reads(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(0)
        await nothing(scope, receive, send)

    async def main() -> None:
        protocol, pipe = connected(asgi=reads)
        block = b"POST /docs HTTP/1.1\r\ncontent-length: 1\r\n\r\nx" * 100
        num_sent = num_held = 0
        while pipe.written.count(b"HTTP/1.1 200 OK") < 1000:
            if num_sent < 10 and not pipe.is_paused:
                protocol.data_received(block)
                num_sent += 1
            num_held = max(num_held, len(protocol._held))
            await asyncio.sleep(0)
        assert num_held <= len(block)
        await settle()
        assert not pipe.is_paused
        protocol.connection_lost(None)

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 700, 5000, 10**6])
def test_however_many_come_at_once_each_is_answered_in_its_order(size: int) -> None:
    async def main() -> None:
        protocol, pipe = connected(asgi=echo)
        sent, expected = [], []
        for number in range(300):
            path, body = b"/%d" % number, [b"x", b"\r\n\r\n" * 300, b"\n" * 2000][number % 3] * (number % 7)
            how = ["", "", "last", "chunked"][number % 4]
            sent += [b"GET %b HTTP/1.1\r\n\r\n" % path, request("a", body, how)]
            expected += [path, b"%d" % len(body)]
        data = b"".join(sent)
        for start in range(0, len(data), size):
            protocol.data_received(data[start : start + size])
            while pipe.is_paused:
                await asyncio.sleep(0)
        await settle()
        answers = re.findall(
            rb"HTTP/1.1 200 OK\r\n(?:.+\r\n)*content-length: (\d+)\r\n(?:.+\r\n)*\r\n([^H]+)", pipe.written
        )
        assert [body for _, body in answers] == expected
        protocol.connection_lost(None)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["its client has left", "it is being closed"])
def test_what_goes_through_asgi_ends_unsaid_where_another_waits_behind_it(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        go_on, heard = asyncio.Event(), []

        async def asgi(scope: Any, receive: Any, send: Any) -> None:
            heard.append(await receive())
            await go_on.wait()
            await nothing(scope, receive, send)
            heard.append(await receive())

        protocol, pipe = connected(asgi=asgi)
        protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
        await settle()
        if how == "its client has left":
            protocol.connection_lost(ConnectionResetError())
        else:
            pipe.close()
        go_on.set()
        await settle()
        assert [message["type"] for message in heard] == ["http.request", "http.disconnect"]
        assert pipe.written == b""
        protocol.connection_lost(None)

    asyncio.run(main())
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


LINES: dict[str, Callable[[int], bytes]] = {
    "many lines": lambda _: b"a: " + b"b" * 1000 + b"\r\n",
    "one line": lambda number: b"b" * 1000 if number else b"a: ",
}


@pytest.mark.parametrize("kind", LINES)
def test_what_comes_behind_the_last_chunk_is_not_kept_and_bounded(kind: str) -> None:
    async def main() -> None:
        protocol, pipe = connected()
        protocol.data_received(CHUNKED + b"0\r\n")
        num_headers, num_bytes = len(protocol.headers), 0
        while not pipe.is_closed:
            line = LINES[kind](num_bytes)
            protocol.data_received(line)
            num_bytes += len(line)
            assert len(protocol.headers) == num_headers
            assert num_bytes < 2 * MAX_HEAD_BYTES
        assert pipe.written.startswith(b"HTTP/1.1 431 ")
        protocol.connection_lost(None)
        await settle()

    asyncio.run(main())


def test_a_little_behind_the_last_chunk_does_no_harm_nor_does_a_large_body() -> None:
    async def main() -> None:
        protocol, pipe = connected()
        for _ in range(3):
            protocol.data_received(CHUNKED)
            for _ in range(100):
                protocol.data_received(b"3e8\r\n" + b"x" * 50)
                await asyncio.sleep(0)
                protocol.data_received(b"x" * 950 + b"\r\n")
            protocol.data_received(b"0\r\nexpect: 100-continue\r\n\r\n")
            await settle()
        assert pipe.written.count(b"HTTP/1.1 200 OK") == pipe.written.count(b"\r\n\r\n100003") == 3
        protocol.connection_lost(None)

    asyncio.run(main())


def test_who_reads_slowly_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LINGER_SECONDS", 0.03)

    async def main() -> None:
        protocol, pipe = connected()
        pipe.num_unread = 1000
        protocol.data_received(request("a", b"1", "close"))
        await settle()
        while pipe.num_unread > 100:
            pipe.num_unread -= 100
            await asyncio.sleep(0.02)
            assert not pipe.is_aborted
        await asyncio.sleep(0.1)  # and now not at all
        assert pipe.is_aborted
        protocol.connection_lost(None)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["rests", "says that it closes", "is refused", "closes its half", "sends on"])
def test_a_connection_that_is_closed_does_not_wait_for_its_client_for_ever(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ending, "LINGER_SECONDS", 0.05)

    async def main() -> None:
        protocol, pipe = connected(keep_alive=0.01)
        pipe.num_unread = 1000
        if how == "is refused":
            protocol.data_received(b"nonsense\r\n\r\n")
        elif how == "sends on":
            protocol.pause_writing()
            protocol.data_received(request("a", b"1", "") * 5)
        else:
            protocol.data_received(request("a", b"1", "close" if how == "says that it closes" else ""))
        if how == "closes its half":
            protocol.eof_received()
        await settle()
        assert not pipe.is_aborted
        await asyncio.sleep(0.2)
        assert pipe.is_closed
        assert pipe.is_aborted
        protocol.connection_lost(None)

    asyncio.run(main())


def large(service: InProcess, num_bytes: int, token: str = "") -> bytes:
    message = asked(service, user="x" * num_bytes)
    return message.replace(service.token.encode(), token.encode()) if token else message


def test_large_bodies_on_their_way_are_bounded_together_and_shared_between_accounts(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol_module, "Bodies", partial(Bodies, 3_000_000))
    service = in_process(ScriptedEngine())
    bodies: Bodies = service._server.config.http.bodies  # type: ignore[union-attr]
    service.books(lambda db: accounts.create(db, "acme"))
    acme = service.mint("acme", "acme").text
    kept = [socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(4)]
    for connection in kept[:2]:
        connection.sendall(large(service, 1_000_000, acme)[:900_000])
    until(lambda: bodies.num_left < 1_000_000)
    for connection, expect in zip(kept[2:], (b"", b"expect: 100-continue\r\n"), strict=True):  # it would have all of it
        head = large(service, 1_000_000, acme).partition(b"\r\n\r\n")[0]
        connection.sendall(head + b"\r\n" + expect + b"\r\n")
        assert statuses(connection, 1) == [b"503"]
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for message in (large(service, 450_000), large(service, 10, acme), large(service, 450_000)):
            connection.sendall(message)
            assert statuses(connection, 1) == [b"200"]
    for connection in kept:
        connection.close()
    until(lambda: bodies.num_left == 3_000_000)
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(large(service, 2_500_000, acme))
        assert statuses(connection, 1) == [b"200"]
    assert bodies.num_left == 3_000_000


def test_a_body_of_unknown_length_has_the_room_that_it_has_come_to(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol_module, "Bodies", partial(Bodies, 1_000_000))
    service = in_process(ScriptedEngine())
    bodies: Bodies = service._server.config.http.bodies  # type: ignore[union-attr]
    head, _, body = large(service, 2_000_000).partition(b"\r\n\r\n")
    head = head[: head.rindex(b"content-length")] + b"transfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(head + b"%x\r\n%b" % (len(body), body[:700_000]))
        until(lambda: bodies.num_left < 400_000)
        connection.sendall(body[700_000:] + b"\r\n0\r\n\r\n")
        assert statuses(connection, 1) == [b"503"]
    assert bodies.num_left == 1_000_000


def test_who_is_alone_leaves_an_eighth_of_the_room_and_others_no_less_than_they_have() -> None:
    bodies = Bodies(800)
    bodies.hold("one", 700)
    for name, num_bytes in (("one", 1), ("two", 51)):
        with pytest.raises(Unavailable) as caught:
            bodies.hold(name, num_bytes)
    assert (caught.value.status, caught.value.code, caught.value.headers) == (503, "overloaded", {"retry-after": "1"})
    bodies.hold("two", 50)
    bodies.free("one", 700)
    bodies.hold("one", 350)
    for name, num_bytes in (("one", 51), ("two", 176)):
        with pytest.raises(Unavailable):
            bodies.hold(name, num_bytes)
    bodies.free("one", 350)
    bodies.hold("two", 650)
    bodies.free("two", 700)
    assert bodies.num_left == 800


@pytest.mark.parametrize("token", ["", "octoai_nobody"], ids=["answered", "refused"])
def test_a_connection_does_not_keep_the_body_of_its_last_request(in_process: Start, token: str) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(large(service, 1_000_000, token))
        assert statuses(connection, 1) == [b"401" if token else b"200"]
        (kept,) = service._server.server_state.connections
        assert len(kept.cycle._body) < 200_000  # type: ignore[union-attr]


def said(service: InProcess, size: int, *, path: str = PATH, version: int = 11, **headers: str) -> tuple[int, str]:
    """Of a request whose client sends all of it before it listens."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    connection._http_vsn = version  # type: ignore[attr-defined]
    connection._http_vsn_str = f"HTTP/1.{version - 10}"  # type: ignore[attr-defined]
    with closing(connection):
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a" * size}]}).encode()
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())["code"]


@pytest.mark.parametrize("how", ["close", "keep-alive", "HTTP/1.0"])
def test_who_is_refused_while_it_sends_hears_why(in_process: Callable[..., InProcess], how: str) -> None:
    """nginx asks in HTTP/1.0 where it is not told otherwise: each of these was a 502 there."""
    service = in_process(ScriptedEngine())
    more: dict[str, Any] = {"version": 10} if how == "HTTP/1.0" else {"connection": how}
    good = f"Bearer {service.token}"
    for _ in range(3):
        assert said(service, 4_000_000, authorization="Bearer nobody", **more) == (401, "invalid_api_key")
        assert said(service, 12_000_000, authorization=good, **more) == (413, "body_too_large")
        assert said(service, 4_000_000, path="/v1/nothing", authorization=good, **more)[0] == 404


def test_who_never_stops_sending_is_left_some_time_later(
    in_process: Callable[..., InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "LINGER_SECONDS", 0.3)
    service = in_process(ScriptedEngine())
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), 5) as client:
        client.sendall(head.encode())
        answer = client.makefile("rb").read()  # to its end, though the request has none
        assert answer.startswith(b"HTTP/1.1 401 ") and answer.endswith(b"}")
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 5:
                client.sendall(head.encode())  # it is not read as another request either
                time.sleep(0.01)
        assert time.monotonic() - began < 2


def test_who_asks_first_whether_to_send_is_told_by_what_goes_through_asgi_too(
    in_process: Callable[..., InProcess],
) -> None:
    service = in_process(ScriptedEngine())
    body = b'{"name": "t"}'
    head = (
        f"POST /v1/admin/tokens HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
        f"content-length: {len(body)}\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), 5) as client:
        client.sendall(head.encode())
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 200 ")


def test_what_cannot_be_read_is_no_fault_of_ours(
    in_process: Callable[..., InProcess], caplog: pytest.LogCaptureFixture
) -> None:
    service = in_process(ScriptedEngine())
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
        "transfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\nno chunk\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), 5) as client:
        client.sendall(head.encode())
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 400 ")
    service.close()  # at once, though its client had not ended
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
