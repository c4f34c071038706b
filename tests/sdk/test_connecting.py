"""Connecting: whichever moment it is left in, and whichever of a host's addresses answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from octoai import ApiConnectionError, ApiTimeoutError, AsyncOctoAI, OctoAI, StreamInterrupted, Timeout
from octoai._deadlines import Deadlines
from octoai._transport import Request, failure
from tests.sdk.conftest import MESSAGES
from tests.sdk.misbehaving import answer

Resolve = Callable[[list[tuple[str, int]]], None]
NOBODY = ("127.0.0.2", 9)  # refuses


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Set the addresses of the host `many.test`."""
    asked = socket.getaddrinfo

    def set_addresses(addresses: list[tuple[str, int]]) -> None:
        def found(host: Any, *arguments: Any, **named: Any) -> Any:
            if host != "many.test":
                return asked(host, *arguments, **named)
            return [info for address in addresses for info in asked(*address, type=socket.SOCK_STREAM)]

        monkeypatch.setattr(socket, "getaddrinfo", found)

    return set_addresses


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address that answers nothing: its queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as queue:
        address = full.getsockname()
        for _ in range(4):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield address


def ask(url: str, **settings: Any) -> Any:
    async def work() -> Any:
        async with AsyncOctoAI(base_url=url, api_key="k", max_retries=0, **settings) as client:
            return await client.text_gen.create_chat_completion(model="m", messages=MESSAGES)

    return asyncio.run(work())


@pytest.fixture
def forgotten() -> Iterator[list[Any]]:
    """Warnings of what nobody closed."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield caught  # type: ignore[misc]


@pytest.mark.parametrize("host", ["127.0.0.1", "many.test"])
def test_a_call_that_is_cancelled_in_any_turn_leaves_no_connection(
    serve: Any, resolve: Resolve, forgotten: list[Any], host: str
) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    port = int(server.url.rpartition(":")[2])
    resolve([NOBODY, ("127.0.0.1", port)])

    async def left_after(turns: int) -> None:
        async with AsyncOctoAI(base_url=f"http://{host}:{port}", api_key="k", max_retries=0) as client:
            call = asyncio.create_task(client.text_gen.create_chat_completion(model="m", messages=MESSAGES))
            for turn in range(turns):
                await asyncio.sleep(0.0005 if turn == 2 else 0)  # for the thread that looks the name up
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    for turns in range(40):
        asyncio.run(left_after(turns))
    gc.collect()
    assert [str(each.message) for each in forgotten] == []


def test_the_next_address_is_asked_at_once_where_one_refuses(serve: Any, resolve: Resolve) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    port = int(server.url.rpartition(":")[2])
    resolve([NOBODY, NOBODY, ("127.0.0.1", port)])
    began = time.monotonic()
    assert ask(f"http://many.test:{port}").choices[0].message.content
    assert time.monotonic() - began < 0.2


def test_the_next_address_is_asked_soon_where_one_is_silent(
    serve: Any, resolve: Resolve, silent: tuple[str, int], forgotten: list[Any]
) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    port = int(server.url.rpartition(":")[2])
    resolve([silent, ("127.0.0.1", port)])
    began = time.monotonic()
    assert ask(f"http://many.test:{port}").choices[0].message.content
    assert 0.2 < time.monotonic() - began < 2
    gc.collect()
    assert not forgotten


def test_where_no_address_answers_the_error_says_why(resolve: Resolve) -> None:
    resolve([NOBODY, NOBODY])
    with pytest.raises(ApiConnectionError, match=r"Connect call failed .*127\.0\.0\.2"):
        ask("http://many.test:9")
    resolve([])
    with pytest.raises(ApiConnectionError, match=r"many\.test has no address"):
        ask("http://many.test:9")


def test_where_no_address_answers_in_time_it_is_given_up(
    resolve: Resolve, silent: tuple[str, int], forgotten: list[Any]
) -> None:
    resolve([silent, silent])
    with pytest.raises(ApiTimeoutError, match="connect"):
        ask("http://many.test:9", timeout=Timeout(connect=0.4, read=5))
    gc.collect()
    assert not forgotten


KERNELS = OSError(errno.ETIMEDOUT, "Connection timed out")  # a TimeoutError by its class


@pytest.mark.parametrize("timeout", [None, Timeout()])
def test_a_connection_that_the_kernel_gives_up_is_no_deadline(timeout: Any) -> None:
    deadlines = Deadlines(Timeout.of(timeout), streams=False)
    lost = failure(KERNELS, Request("GET", "http://x", {}), deadlines)
    assert isinstance(lost, ApiConnectionError)
    assert lost.retryable
    assert isinstance(failure(TimeoutError(), Request("GET", "http://x", {}), deadlines), ApiTimeoutError)


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_a_connection_that_the_kernel_gives_up_is_none_for_a_library(library: str) -> None:
    module = pytest.importorskip(library)

    def lost(_request: Any) -> Any:
        raise module.ReadTimeout("timed out") from KERNELS

    with module.Client(transport=module.MockTransport(lost)) as own:
        client = OctoAI(base_url="http://127.0.0.1:9", httpx_client=own, timeout=None, max_retries=0)
        with pytest.raises(ApiConnectionError):
            client.text_gen.create_chat_completion(model="m", messages=MESSAGES)


def test_an_answer_that_the_kernel_gives_up_is_cut_off() -> None:
    class Lost:
        status, headers = 200, {"content-type": "text/event-stream"}

        def send(self, *_: Any) -> Any:
            return self

        def receive(self, _seconds: Any) -> bytes:
            raise KERNELS

        def close(self) -> None: ...

    client = OctoAI(transport=Lost(), timeout=None, max_retries=0)  # type: ignore[arg-type]
    with pytest.raises(ApiConnectionError, match="cut off"):
        client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
    with pytest.raises(StreamInterrupted, match="too early"):
        list(client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES))


def test_all_addresses_together_have_one_time_to_connect(resolve: Resolve, silent: tuple[str, int]) -> None:
    resolve([silent, silent, silent])
    for timeout in (Timeout(connect=0.6, read=5), Timeout(total=0.6)):
        began = time.monotonic()
        with pytest.raises(ApiTimeoutError) as caught:
            OctoAI(base_url="http://many.test:9", max_retries=0, timeout=timeout).infer("http://many.test:9", {})
        assert caught.value.deadline == ("total" if timeout.total else "connect")
        assert time.monotonic() - began < 1.1


def test_the_handshake_has_no_time_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"https://127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ApiTimeoutError, match="connect"):
            OctoAI(max_retries=0, timeout=Timeout(connect=0.5)).infer(url, {})
        assert time.monotonic() - began < 1.5


def test_an_address_that_is_silent_leaves_time_for_the_next(
    serve: Any, resolve: Resolve, silent: tuple[str, int]
) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    resolve([silent, ("127.0.0.1", server.port)])
    assert OctoAI(max_retries=0, timeout=Timeout(connect=1)).infer(f"http://many.test:{server.port}", {})
    resolve([NOBODY, ("127.0.0.1", server.port)])
    assert OctoAI(max_retries=0, timeout=Timeout(connect=1)).infer(f"http://many.test:{server.port}", {})


def test_an_address_of_a_family_that_the_kernel_lacks_is_passed_over(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old(socket.socket):
        def __init__(self, family: int = -1, *arguments: Any, **named: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *arguments, **named)

    server = serve(lambda x: x.reply(200, answer()))
    newer = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", server.port, 0, 0))
    older = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [newer, older])
    monkeypatch.setattr(socket, "socket", Old)
    url = f"http://many.test:{server.port}"
    assert OctoAI(max_retries=0).infer(url, {})
    assert ask(url).choices[0].message.content


def test_an_address_that_is_far_away_is_waited_for_although_there_are_many(
    serve: Any, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Far(socket.socket):
        def connect(self, address: Any) -> None:
            patience = self.gettimeout() or 0.3
            time.sleep(min(patience, 0.3))
            if patience < 0.3:
                raise TimeoutError
            super().connect(address)

    server = serve(lambda x: x.reply(200, answer()))
    resolve([("127.0.0.1", server.port)] * 6)
    monkeypatch.setattr(socket, "socket", Far)
    assert OctoAI(max_retries=0, timeout=Timeout(connect=1)).infer(f"http://many.test:{server.port}", {})
