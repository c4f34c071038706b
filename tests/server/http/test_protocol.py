"""How answers leave: in how few writes, seen from a bare socket."""

from __future__ import annotations

import json
import socket
import time

import pytest

from octoai.server.engines.scripted import ScriptedEngine
from tests.running import InProcess, Start
from tests.talking import asked, is_idle, statuses, until


def first_and_last_read(service: InProcess) -> tuple[bytes, bytes]:
    body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": "hi"}], "stream": True})
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        reads = [connection.recv(1 << 20)]
        while not reads[-1].endswith(b"0\r\n\r\n"):
            reads.append(connection.recv(1 << 20))
    return reads[0], reads[-1]


def test_headers_and_first_event_leave_together(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 0.05, " world", 0.05]))
    for _ in range(5):
        first, _ = first_and_last_read(service)
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b'"role":"assistant"' in first
        assert b'"content":"Hello"' in first


def test_done_and_the_end_of_the_body_leave_together(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 0.05, " world", 0.05]))
    for _ in range(5):
        _, last = first_and_last_read(service)
        assert last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b'"finish_reason":"stop"' in last


def test_a_request_head_without_an_end_is_cut_off(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-long: ")
        received = b""
        try:
            for _ in range(200):
                connection.sendall(b"a" * 10_000)
        except OSError:
            pass  # it hung up while we were still sending: that is the point
        else:
            received = connection.recv(1000)
    assert received == b"" or received.startswith(b"HTTP/1.1 431 ")


def test_a_large_body_does_not_count_as_a_head(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    text = "word " * 7000
    for _ in range(2):
        body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": text}], "x": "y" * 300_000})
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_too_large_is_answered_even_when_the_client_sends_all_of_it_first(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
        connection.sendall(f"{head}content-length: 12000000\r\n\r\n".encode())
        connection.sendall(b"x" * 12_000_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_what_is_no_http_is_refused_in_the_one_shape_with_an_id(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GARBAGE / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(nonsense)
            answer = b""
            while block := connection.recv(65536):
                answer += block
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"x-request-id: req_" in head
        said = json.loads(body)
        assert said["code"] == said["error"]["code"] == "invalid_http"


def test_requests_sent_ahead_are_answered_in_their_order_whichever_way_they_go(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 0.05, " world"]))
    live = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    wrong = asked(service).replace(b"octoai_", b"nobody_")
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(asked(service) + live + wrong + asked(service) + b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n")
        assert statuses(connection, 5) == [b"200", b"200", b"401", b"200", b"404"]
        connection.sendall(asked(service))  # and the connection is still good
        assert statuses(connection, 1) == [b"200"]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions?api-version=1", "/v1/chat%2Fcompletions", "http://x/v1/chat/completions"]
)
def test_a_path_may_be_written_in_other_ways(in_process: Start, path: str) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(asked(service, f"POST {path} HTTP/1.1"))
        assert statuses(connection, 1) == [b"200"]


def test_other_methods_are_told_which_is_right(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"allow: POST" in answer


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked_where_its_token_is_good(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    head, _, body = asked(service, head="expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert statuses(connection, 1) == [b"200"]


@pytest.mark.parametrize(
    ("path", "change", "status"),
    [
        ("/v1/chat/completions", (b"octoai_", b"nobody_"), b"401"),
        ("/v1/chat/completions", (b"content-length: ", b"content-length: 900000"), b"413"),
        ("/v1/chat/completions", (b"host: x", b"host: x\r\ncontent-encoding: gzip"), b"415"),
        ("/v1/admin/tokens", (b"octoai_", b"nobody_"), b"401"),
        ("/nowhere", (b"", b""), b"404"),
        ("/v1/models", (b"POST", b"GET"), b"200"),
    ],
)
def test_who_is_answered_before_its_body_is_asked_for_is_not_taken_to_send_it(
    in_process: Start, path: str, change: tuple[bytes, bytes], status: bytes
) -> None:
    service = in_process(ScriptedEngine())
    head, _, _ = asked(service, f"POST {path} HTTP/1.1", head="expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(head.replace(*change) + b"\r\n\r\n")
        received = b""
        while block := connection.recv(65536):
            received += block
    assert received.startswith(b"HTTP/1.1 %b " % status)
    assert b"\r\nconnection: close\r\n" in received


def test_a_body_may_come_in_pieces_and_in_chunks(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    head, _, body = asked(service).partition(b"\r\n\r\n")
    chunked = head[: head.rindex(b"content-length")] + b"transfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for piece in (head[:40], head[40:] + b"\r\n\r\n", body[:5], body[5:]):
            connection.sendall(piece)
            time.sleep(0.02)
        assert statuses(connection, 1) == [b"200"]
        for piece in (chunked, *(b"%x\r\n%b\r\n" % (len(each), each) for each in (body[:9], body[9:])), b"0\r\n\r\n"):
            connection.sendall(piece)
            time.sleep(0.02)
        assert statuses(connection, 1) == [b"200"]


def test_who_says_that_it_closes_is_closed(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    for asking in (
        asked(service, head="connection: close\r\n"),
        asked(service, "POST /v1/chat/completions HTTP/1.0"),
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(asking)
            received = b""
            while block := connection.recv(65536):
                received += block
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection: close\r\n" in received


@pytest.mark.parametrize("num_behind", [10, 70_000, 400_000])
def test_what_comes_behind_the_last_request_is_no_matter(in_process: Start, num_behind: int) -> None:
    service = in_process(ScriptedEngine([0.1, "Hello"]))
    for asking in (
        asked(service, head="connection: close\r\n"),
        asked(service, "POST /v1/chat/completions HTTP/1.0", head="connection: keep-alive\r\n"),
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(asking)
            time.sleep(0.02)
            connection.sendall(b"x" * num_behind)
            received = b""
            while block := connection.recv(65536):
                received += block
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.count(b"HTTP/1.1 ") == 1


def test_an_older_client_is_sent_no_chunks(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(asked(service, "POST /v1/chat/completions HTTP/1.0", stream=True))
        received = b""
        while block := connection.recv(65536):
            received += block
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.slow
def test_a_connection_that_rests_is_closed_after_a_while_and_not_before(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 0.6, " world"]))
    service._server.config.timeout_keep_alive = 1
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(asked(service))
            assert statuses(connection, 1) == [b"200"]
            time.sleep(0.6)
        began = time.monotonic()
        assert connection.recv(1000) == b""
        assert 0.2 < time.monotonic() - began < 3


POSTED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
NEVER_WHOLE = {
    "nothing": (b"", b""),
    "half a head": (POSTED, b""),
    "a head that trickles": (POSTED + b"x-long: ", b"x"),
    "a refused body that does not come": (POSTED + b"content-length: 100000\r\n\r\n{", b""),
    "a refused body that trickles": (POSTED + b"content-length: 100000\r\n\r\n{", b"x"),
    "a body for nobody that trickles": (b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{", b"x"),
}


@pytest.mark.parametrize("is_first", [True, False], ids=["at once", "behind a request"])
def test_a_connection_is_not_kept_for_what_never_comes_whole(in_process: Start, is_first: bool) -> None:
    service = in_process(ScriptedEngine())
    service._server.config.timeout_keep_alive = 1
    began = time.monotonic()
    kept = {kind: socket.create_connection(("127.0.0.1", service.port), timeout=0.01) for kind in NEVER_WHOLE}
    for kind, connection in kept.items():
        connection.sendall((b"" if is_first else asked(service)) + NEVER_WHOLE[kind][0])
    while kept:
        assert time.monotonic() - began < 5, list(kept)
        for kind in [kind for kind, connection in kept.items() if is_over(connection, NEVER_WHOLE[kind][1])]:
            kept.pop(kind).close()
            assert time.monotonic() - began > 0.9


def is_over(connection: socket.socket, more: bytes) -> bool:
    """Send more, and see whether it was closed."""
    try:
        connection.sendall(more)
        return connection.recv(65536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.slow
def test_half_a_head_behind_it_does_not_end_an_answer_that_takes_longer(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", *[0.3, " world"] * 8]))
    service._server.config.timeout_keep_alive = 1
    second = asked(service)
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(asked(service) + second[:50])
        assert statuses(connection, 1) == [b"200"]
        time.sleep(0.5)
        connection.sendall(second[50:])
        assert statuses(connection, 1) == [b"200"]


def test_a_refused_body_that_comes_in_the_end_leaves_its_connection_as_good_as_new(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    service._server.config.timeout_keep_alive = 1
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(POSTED + b"content-length: 2\r\n\r\n{")
        assert statuses(connection, 1) == [b"401"]
        time.sleep(0.7)
        connection.sendall(b"}")
        time.sleep(0.7)
        connection.sendall(asked(service))
        assert statuses(connection, 1) == [b"200"]


def test_what_is_no_http_is_not_answered_in_the_middle_of_an_answer(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 0.3, " world"]))
    for behind in (b"", asked(service, stream=True)):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(asked(service, stream=True))
            received = connection.recv(65536)
            connection.sendall(behind + b"nonsense\r\n\r\n" + asked(service))
            while block := connection.recv(65536):
                received += block
        *answers, refusal = received.split(b"HTTP/1.1 ")[1:]
        assert len(answers) == 1 + bool(behind)
        assert all(answer.startswith(b"200 ") and answer.endswith(b"0\r\n\r\n") for answer in answers)
        assert refusal.startswith(b"400 ")
    assert len(service.engine.seen) == 3  # type: ignore[attr-defined]


def test_a_body_that_cannot_be_read_has_no_second_answer(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    for line in (b"POST /v1/chat/completions", b"POST /nowhere"):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(line + b" HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            received = connection.recv(65536)
            connection.sendall(b"nonsense\r\n")
            while block := connection.recv(65536):
                received += block
        assert received.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 404 "))
        assert received.count(b"HTTP/1.1 ") == 1


def test_what_is_no_http_is_answered_behind_what_came_before_it(in_process: Start) -> None:
    service = in_process(ScriptedEngine([0.1, "Hello"]))
    token = f"authorization: Bearer {service.token}\r\n".encode()
    bad_body = token + b"transfer-encoding: chunked\r\n\r\nnonsense\r\n"
    minting = b"POST /v1/admin/tokens HTTP/1.1\r\nhost: x\r\n"
    minted = minting + token + b'content-length: 12\r\n\r\n{"name":"t"}'
    for nonsense in (b"nonsense\r\n\r\n", POSTED + bad_body, minting + bad_body):
        for before in ([], [asked(service)], [asked(service)] * 2, [minted], [minted, asked(service), minted]):
            with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
                connection.sendall(b"".join(before) + nonsense)
                assert statuses(connection, len(before) + 1) == [b"200"] * len(before) + [b"400"]
                assert connection.recv(1) == b""


def test_who_has_sent_ahead_and_leaves_is_noticed_at_once(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 8.0, " world"]))
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(asked(service) * 2)
        until(lambda: len(service.service.jobs) == 1)
    until(lambda: is_idle(service), 2)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_after_a_large_body_is_noticed_at_once(in_process: Start, is_stream: bool) -> None:
    service = in_process(ScriptedEngine(["Hello", 8.0, " world"]))
    message = {"role": "user", "content": "h" * 200_000}
    body = json.dumps({"model": service.model, "messages": [message], "stream": is_stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.token}\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: len(service.service.jobs) == 1)
    until(lambda: is_idle(service), 2)


def test_who_has_sent_another_kind_of_request_ahead_and_leaves_is_noticed_at_once(in_process: Start) -> None:
    service = in_process(ScriptedEngine(["Hello", 8.0, " world"]))
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(asked(service) + b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: len(service.service.jobs) == 1)
    until(lambda: is_idle(service), 2)


UPGRADE = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n"  # as Java's client sends it


@pytest.mark.parametrize("place", [0, 1, 30, None], ids=["with its head", "later", "in two", "at once"])
def test_who_offers_another_protocol_is_answered_in_this_one(in_process: Start, place: int | None) -> None:
    service = in_process(ScriptedEngine())
    message = asked(service, head=UPGRADE)
    start = message.index(b"\r\n\r\n") + 4
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for _ in range(2):
            if place is None:
                connection.sendall(message * 3 + asked(service))
                assert statuses(connection, 4) == [b"200"] * 4
            else:
                connection.sendall(message[: start + place])
                time.sleep(0.05)
                connection.sendall(message[start + place :])
                assert statuses(connection, 1) == [b"200"]


def test_a_body_behind_the_offer_of_another_protocol_is_never_a_request(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    inner = asked(service)
    for path in ("/v1/chat/completions", "/v1/admin/accounts", "/nowhere"):
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{UPGRADE}content-length: {len(inner)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(head.encode())
            time.sleep(0.05)
            connection.sendall(inner + b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            first, second = statuses(connection, 2)
            assert first in (b"401", b"404")
            assert second == b"200"
    assert not service.engine.seen


@pytest.mark.parametrize("line", ["POST /v1/chat/completions", "CONNECT x:80"])
def test_a_body_of_unknown_length_behind_the_offer_of_another_protocol_is_refused(in_process: Start, line: str) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        head = f"{line} HTTP/1.1\r\nhost: x\r\n{UPGRADE}transfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"0\r\n\r\n" + asked(service))
        received = b""
        while block := connection.recv(65536):
            received += block
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1


def test_a_get_that_offers_another_protocol_is_answered(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(f"GET /health/live HTTP/1.1\r\nhost: x\r\n{UPGRADE}\r\n".encode() * 1000 + asked(service))
        assert statuses(connection, 1001) == [b"200"] * 1001
