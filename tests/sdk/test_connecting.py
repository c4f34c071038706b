"""Connecting: whichever moment it is left in, and whichever of a host's addresses answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import ssl
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octoai import (
    ApiConnectionError,
    ApiTimeoutError,
    AsyncOctoAI,
    ConfigurationError,
    OctoAI,
    StreamInterrupted,
    Timeout,
    _tls,
)
from octoai._deadlines import Deadlines
from octoai._transport import Request, failure
from tests.sdk.conftest import MESSAGES, make_certificate, make_signed_certificate
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


@pytest.mark.skipif(sys.platform == "win32", reason="where a socket can be shut down while it connects")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_stream_may_be_closed_while_it_connects(silent: tuple[str, int], forgotten: list[Any], scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"{scheme}://127.0.0.1:{silent[1] if scheme == 'http' else mute.getsockname()[1]}"

        async def close_later() -> None:
            stream = AsyncOctoAI(api_key="k").infer_stream(url, {})
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.2)
            await stream.close()
            with pytest.raises(StreamInterrupted, match="it was closed before"):
                await asyncio.wait_for(reading, 2)

        asyncio.run(close_later())
        stream = OctoAI(api_key="k").infer_stream(url, {})
        began = time.monotonic()
        closing = threading.Timer(0.2, stream.close)
        closing.start()
        with pytest.raises(StreamInterrupted, match="it was closed before"):
            next(stream)
        closing.join()
        assert time.monotonic() - began < 2
    del stream
    gc.collect()
    assert not forgotten


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


@pytest.fixture
def default_authorities(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whom a client trusts where the environment names nobody."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    _tls._context.cache_clear()
    yield
    _tls._context.cache_clear()


@pytest.fixture
def encrypted(certificate: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    return behind_tls(certificate, serve, monkeypatch)


def behind_tls(certificate: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a service behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    create = socket.create_server

    def created(address: Any, **named: Any) -> Any:
        # Not on connect: there, one that fails would end the listener.
        return context.wrap_socket(create(address, **named), server_side=True, do_handshake_on_connect=False)

    with monkeypatch.context() as patched:
        patched.setattr(socket, "create_server", created)
        return f"https://localhost:{serve(lambda x: x.reply(200, answer())).port}"


@pytest.mark.usefixtures("default_authorities")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_handshake_that_stalls_keeps_nobody_else_waiting() -> None:
    """Neither another thread nor a child that is forked meanwhile."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        url = f"https://127.0.0.1:{mute.getsockname()[1]}"
        client = OctoAI(max_retries=0, timeout=Timeout(connect=0.6))
        took: list[float] = []

        def ask() -> None:
            began = time.monotonic()
            with pytest.raises(ApiTimeoutError):
                client.infer(url, {})
            took.append(time.monotonic() - began)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        child = os.fork()
        if not child:
            ask()
            os._exit(0)
        for thread in threads:
            thread.join()
        assert len(took) == 5
        assert max(took) < 1.2
        deadline = time.monotonic() + 3
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.02)


@pytest.mark.usefixtures("default_authorities")
@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="where OpenSSL knows the system's authorities")
def test_the_authorities_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def noted(name: str) -> None:
        load = getattr(ssl.SSLContext, name)

        def note(context: ssl.SSLContext, *places: Any, **named: Any) -> None:
            read.append(places)
            load(context, *places, **named)

        monkeypatch.setattr(ssl.SSLContext, name, note)

    noted("load_verify_locations")
    noted("set_default_verify_paths")

    async def twice(url: str) -> None:
        for _ in range(2):
            async with AsyncOctoAI(max_retries=0, timeout=Timeout(connect=0.2)) as client:
                with pytest.raises(ApiTimeoutError):
                    await client.infer(url, {})

    with socket.create_server(("127.0.0.1", 0)) as mute:
        asyncio.run(twice(f"https://127.0.0.1:{mute.getsockname()[1]}"))
    assert len(read) == 1


@pytest.mark.usefixtures("default_authorities")
def test_a_service_is_trusted_whose_authority_the_environment_or_the_system_names(
    api: Any, encrypted: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ApiConnectionError, match="certificate verify failed") as caught:
        api.chat(api.client(base_url=encrypted))
    assert caught.value.attempts == 1
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert api.chat(api.client(base_url=encrypted)).choices[0].message.content == "hello"


@pytest.mark.usefixtures("default_authorities")
def test_a_long_request_leaves_by_tls(api: Any, encrypted: str, certificate: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    client = api.client(base_url=encrypted, timeout=Timeout(read=5), max_retries=0)
    for length in (5_000_000, 3, 100_000):
        messages = [{"role": "user", "content": "x" * length}]
        assert api.chat(client, messages=messages).choices[0].message.content == "hello"


@pytest.mark.usefixtures("default_authorities")
@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="where OpenSSL knows the system's authorities")
def test_an_openssl_of_another_distribution_finds_the_systems_authorities(
    api: Any, encrypted: str, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = ssl.DefaultVerifyPaths(None, None, "SSL_CERT_FILE", "/nowhere", "SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    monkeypatch.setattr(_tls, "_FILES", ("/nowhere", str(certificate)))
    assert api.chat(api.client(base_url=encrypted)).choices[0].message.content == "hello"


@pytest.mark.usefixtures("default_authorities")
def test_authorities_that_have_been_exchanged_are_those_of_new_connections(
    api: Any, encrypted: str, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = make_certificate(tmp_path / "another.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    client = api.client(base_url=encrypted, max_retries=0)
    with pytest.raises(ApiConnectionError, match="certificate verify failed"):
        api.chat(client)
    exchanged = tmp_path / "exchanged.pem"
    exchanged.write_bytes(certificate.read_bytes())
    exchanged.replace(file)
    assert api.chat(client).choices[0].message.content == "hello"


@pytest.mark.usefixtures("default_authorities")
def test_authorities_that_are_being_rewritten_are_those_of_before(
    api: Any, encrypted: str, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "authorities.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    content = Path(f"{certificate}.crt").read_bytes()
    for now in (content, b"", content[:300], None, content):
        if now is None:
            file.unlink()
        else:
            file.write_bytes(now)
        assert api.chat(api.client(base_url=encrypted)).choices[0].message.content == "hello"


@pytest.mark.usefixtures("default_authorities")
def test_an_authority_of_ones_own_is_trusted_by_newer_pythons_too(
    api: Any, serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that is made as most instructions have it; since 3.13 Python's own settings refuse it."""
    service, authority = make_signed_certificate(tmp_path)
    made = ssl.create_default_context

    def as_of_3_13(**places: Any) -> ssl.SSLContext:
        context = made(**places)
        context.verify_flags |= ssl.VERIFY_X509_STRICT | 0x80000  # PARTIAL_CHAIN
        return context

    monkeypatch.setattr(ssl, "create_default_context", as_of_3_13)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    url = behind_tls(service, serve, monkeypatch)
    assert api.chat(api.client(base_url=url)).choices[0].message.content == "hello"


@pytest.mark.usefixtures("default_authorities")
def test_the_settings_of_tls_are_pythons_own(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As those of every other program that the same variables are set for."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    ours, pythons = _tls.tls_context(), ssl.create_default_context()
    for name in ("verify_mode", "check_hostname", "options", "minimum_version", "keylog_filename"):
        assert getattr(ours, name) == getattr(pythons, name)
    assert ours.verify_flags == pythons.verify_flags & ~ssl.VERIFY_X509_STRICT
    assert ours.keylog_filename == str(tmp_path / "keys")


@pytest.mark.usefixtures("default_authorities")
def test_a_file_for_keys_that_cannot_be_written_is_named(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "nowhere" / "keys"))
    with pytest.raises(ConfigurationError, match=f"SSLKEYLOGFILE={tmp_path}/nowhere/keys should be a file"):
        _tls.tls_context()


@pytest.mark.usefixtures("default_authorities")
@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:9"])
@pytest.mark.parametrize("content", [None, b"no certificates"])
def test_authorities_that_cannot_be_read_are_named(
    api: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: str | None, content: bytes | None
) -> None:
    file = tmp_path / "authorities.pem"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    if proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ConfigurationError, match=f"SSL_CERT_FILE={file}"):
        api.chat(api.client(base_url="https://127.0.0.1:9"))
