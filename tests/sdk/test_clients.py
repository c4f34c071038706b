"""Clients as objects: where their settings come from, copies, processes and event loops."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import os
import pickle
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from octoai import (
    ApiError,
    ApiTimeoutError,
    AsyncOctoAI,
    ConfigurationError,
    OctoAI,
    OctoAIEnvironment,
    StreamInterrupted,
    Timeout,
    _credentials,
)
from tests.sdk.conftest import MESSAGES
from tests.sdk.misbehaving import Exchange, Server, answer, chunk, words

FILE_URL = "http://127.0.0.1:7001"


def token_of(client: OctoAI) -> Any:
    return client._settings.access.token


def test_the_local_service_is_the_default() -> None:
    assert OctoAI().base_url == "http://127.0.0.1:8000"
    assert token_of(OctoAI()) is None


def test_argument_then_environment_then_file(monkeypatch: pytest.MonkeyPatch) -> None:
    _credentials.write(endpoint=FILE_URL, token='from "file" \\')
    assert OctoAI().base_url == FILE_URL
    assert token_of(OctoAI()) == 'from "file" \\'
    for older, newer in (("OCTOAI_API_KEY", "OCTOAI_API_TOKEN"), ("OCTOAI_API_TOKEN", "OCTOAI_TOKEN")):
        monkeypatch.setenv(older, older)
        monkeypatch.setenv(newer, newer)
        assert token_of(OctoAI()) == newer
    monkeypatch.setenv("OCTOAI_API_BASE", "http://base:1/v1")
    assert OctoAI().base_url == "http://base:1"
    monkeypatch.setenv("OCTOAI_BASE_URL", "http://url:1/v1/")
    assert OctoAI().base_url == "http://url:1"
    assert OctoAIEnvironment.PRODUCTION.text_gen == "http://url:1"
    own = OctoAIEnvironment(default="http://x", image_gen="http://x", text_gen="http://own:1")
    assert OctoAI(environment=own).base_url == "http://own:1"
    assert OctoAI(environment=own, base_url="http://arg:1", api_key="arg").base_url == "http://arg:1"
    assert token_of(OctoAI(api_key="arg")) == "arg"


def test_the_files_token_goes_only_to_the_files_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    _credentials.write(endpoint=FILE_URL, token="secret")
    assert token_of(OctoAI(base_url=f"{FILE_URL}/v1")) == "secret"
    assert token_of(OctoAI(base_url="http://127.0.0.1:7002")) is None
    assert not OctoAI()._settings.access.covers("http://127.0.0.1:7002/infer")
    monkeypatch.setenv("OCTOAI_BASE_URL", "http://other")
    assert token_of(OctoAI()) is None


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(
    "named", [{}, {"XDG_CONFIG_HOME": "~/.config"}, {"OCTOAI_CONFIG_DIR": "~/c"}, {"OCTOAI_CONFIG_DIR": "~"}]
)
def test_without_a_home_directory_there_is_no_credentials_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, named: dict[str, str]
) -> None:
    for variable in ("OCTOAI_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, directory in named.items():
        monkeypatch.setenv(variable, directory)
    monkeypatch.chdir(tmp_path)
    for below in ("~/.config/octoai", "~/c", "~"):
        _credentials.write(endpoint=FILE_URL, token="of whoever made this", file=f"{below}/credentials.toml")
    assert (OctoAI().base_url, token_of(OctoAI())) == (_credentials.DEFAULT_ENDPOINT, None)
    with pytest.raises(ConfigurationError, match=r"no home directory; set OCTOAI_CONFIG_DIR to "):
        _credentials.write(endpoint=FILE_URL, token="t")
    assert str(_credentials.path()).startswith("~")


def test_the_credentials_file_is_private(tmp_path: Any) -> None:
    written = _credentials.write(endpoint=FILE_URL, token="t")
    assert written == _credentials.path() == tmp_path / "config" / "credentials.toml"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert stat.S_IMODE(written.parent.stat().st_mode) == 0o700
    assert list(written.parent.iterdir()) == [written]
    stored = _credentials.read()
    assert stored is not None
    assert (stored.endpoint, stored.token) == (FILE_URL, "t")
    written.write_text("endpoint = [")
    with pytest.raises(ApiError, match="not valid TOML"):
        OctoAI()
    assert OctoAI(base_url="http://x", api_key="y")


def test_dead_hosts_are_refused_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = OctoAIEnvironment(default="x", image_gen="x", text_gen="https://text.octoai.run")
    with pytest.raises(ApiError, match="shut down"):
        OctoAI(environment=dead)
    monkeypatch.setenv("OCTOAI_API_BASE", "https://text.octoai.run/v1")
    with pytest.raises(ApiError, match="shut down"):
        AsyncOctoAI()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://a b", "http://u:p@host", ""])
def test_a_bad_address_is_refused_at_once(url: str) -> None:
    if url:
        with pytest.raises(ApiError):
            OctoAI(base_url=url)
    else:
        assert OctoAI(base_url=url).base_url == "http://127.0.0.1:8000"


def test_a_client_never_shows_its_token() -> None:
    for client in OctoAI(api_key="s3cret"), AsyncOctoAI(api_key="s3cret"):
        assert "s3cret" not in repr(client) + str(vars(client)) + repr(client._settings.access)


@pytest.mark.parametrize("settings", [{"timeout": "3"}, {"timeout": True}, {"max_retries": -1}, {"api_key": 3}])
def test_settings_of_the_wrong_type_are_refused(settings: Any) -> None:
    with pytest.raises(TypeError):
        OctoAI(**settings)


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_copy_works_and_shares_no_connection(serve: Any, made: Any) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    with OctoAI(base_url=server.url, api_key="k", timeout=Timeout(read=3), max_retries=1) as client:
        client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
        with made(client) as twin:
            assert twin.text_gen.create_chat_completion(model="m", messages=MESSAGES)
    assert server.connections == 2
    assert server.requests[1].headers["authorization"] == "Bearer k"


@pytest.mark.parametrize("kind", [OctoAI, AsyncOctoAI])
def test_a_stand_in_takes_the_place_of_text_generation(kind: Any) -> None:
    client = kind(base_url="http://127.0.0.1:9", api_key="k")
    with mock.patch.object(client.text_gen, "create_chat_completion", new=mock.Mock(return_value="said")):
        assert client.text_gen.create_chat_completion(model="m", messages=MESSAGES) == "said"
    client.text_gen = stand_in = object()
    assert client.text_gen is stand_in
    assert copy.copy(client).text_gen is stand_in
    with mock.patch.object(kind, "text_gen", "for all"):
        assert kind().text_gen == "for all"


def test_text_generation_stays_as_it_is_when_its_client_is_closed_or_copied(serve: Any) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    client = OctoAI(base_url=server.url, api_key="k")
    text_gen = client.text_gen
    for _ in range(2):
        assert text_gen.create_chat_completion(model="m", messages=MESSAGES)
        client.close()
    assert server.connections == 2
    assert client.text_gen is text_gen
    assert copy.copy(client).text_gen is not text_gen


def test_a_client_that_nobody_holds_closes_its_connections(serve: Any) -> None:
    waited: list[float | None] = []

    def script(x: Exchange) -> None:
        x.reply(200, answer())
        waited.append(x.seconds_until_closed())

    client = OctoAI(base_url=serve(script).url, api_key="k")
    client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
    gc.disable()
    try:
        del client
        deadline = time.monotonic() + 4
        while not waited and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        gc.enable()
    assert waited[0] is not None
    assert waited[0] < 1


def test_an_async_client_can_be_copied_and_pickled() -> None:
    client = AsyncOctoAI(base_url="http://x", api_key="k")
    for twin in copy.deepcopy(client), pickle.loads(pickle.dumps(client)):
        assert twin.base_url == "http://x"


def test_both_clients_have_the_same_methods() -> None:
    def methods(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    from octoai.text_gen.client import AsyncTextGenClient, TextGenClient

    assert methods(OctoAI) == methods(AsyncOctoAI)
    assert methods(TextGenClient) == methods(AsyncTextGenClient)
    for name in methods(TextGenClient):
        sync, other = (inspect.signature(getattr(cls, name)) for cls in (TextGenClient, AsyncTextGenClient))
        assert sync.parameters.keys() == other.parameters.keys()


@pytest.mark.parametrize("kind", [OctoAI, AsyncOctoAI])
def test_an_environment_of_ones_own_names_its_address(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(OctoAIEnvironment):
        text_gen = "http://mine:9000"

        def __init__(self) -> None: ...

    class Computed(OctoAIEnvironment):
        def __init__(self) -> None: ...

        @property
        def text_gen(self) -> str:  # type: ignore[override]
            return "http://mine:9000"

    monkeypatch.setenv("OCTOAI_BASE_URL", "http://configured:9000")
    for own in (Fixed(), Computed(), OctoAIEnvironment(default="", image_gen="", text_gen="http://mine:9000")):
        assert kind(environment=own).base_url == "http://mine:9000"
    for configured in (OctoAIEnvironment.PRODUCTION, copy.deepcopy(OctoAIEnvironment.SECURE_LINK)):
        assert kind(environment=configured, follow_redirects=True).base_url == "http://configured:9000"
    for none in (None, "http://mine:9000", OctoAIEnvironment):
        with pytest.raises(TypeError, match="environment must be an OctoAIEnvironment"):
            kind(environment=none)
        with pytest.raises(TypeError, match="environment must be an OctoAIEnvironment"):
            kind(environment=none, base_url="http://mine:9000")
    images = OctoAIEnvironment(default="", image_gen="http://images", text_gen="")
    assert kind(environment=images, base_url="http://mine:9000").base_url == "http://mine:9000"
    with pytest.raises(TypeError, match=r"environment\.text_gen must be the address"):
        kind(environment=images)


def test_an_async_client_serves_two_event_loops(serve: Any) -> None:
    server = serve(lambda x: x.stream(words()) if x.json["stream"] else x.reply(200, answer()))
    client = AsyncOctoAI(base_url=server.url, api_key="k", max_retries=0)

    async def work() -> int:
        await client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
        stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
        return len([item async for item in stream])

    assert asyncio.run(work()) == 3
    assert asyncio.run(work()) == 3


def test_an_async_token_callable_is_awaited(serve: Any) -> None:
    server = serve(lambda x: x.reply(200, answer()))

    async def token() -> str:
        await asyncio.sleep(0)
        return "later"

    async def work() -> None:
        async with AsyncOctoAI(base_url=server.url, api_key=token) as client:
            await client.text_gen.create_chat_completion(model="m", messages=MESSAGES)

    asyncio.run(work())
    assert server.requests[0].headers["authorization"] == "Bearer later"
    with pytest.raises(ApiError, match="not a string"):
        OctoAI(base_url=server.url, api_key=token).text_gen.create_chat_completion(  # type: ignore[arg-type]
            model="m", messages=[]
        )


def test_a_cancelled_call_closes_its_connection(serve: Any) -> None:
    waited: list[float | None] = []

    def script(x: Exchange) -> None:
        x.begin_stream()
        waited.append(x.seconds_until_closed())

    async def work() -> None:
        async with AsyncOctoAI(base_url=serve(script).url, api_key="k") as client:
            stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.final(), 0.3)
            await asyncio.sleep(0.2)
        assert waited

    asyncio.run(work())
    assert waited[0] is not None
    assert waited[0] < 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_children_get_their_own_answers(serve: Any) -> None:
    """Parent and children share a warmed client, and ask at the same time."""

    def script(x: Exchange) -> None:
        x.reply(200, answer(x.json["messages"][0]["content"]))

    server = serve(script)
    client = OctoAI(base_url=server.url, api_key="k", max_retries=0)

    def asks(name: str) -> bool:
        for number in range(20):
            messages = [{"role": "user", "content": f"{name}-{number}"}]
            got = client.text_gen.create_chat_completion(model="m", messages=messages)
            if got.choices[0].message.content != f"{name}-{number}":
                return False
        return True

    assert asks("warm")
    children = []
    for name in "abc":
        pid = os.fork()
        if pid == 0:
            os._exit(0 if asks(name) else 1)
        children.append(pid)
    assert asks("parent")
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    assert server.connections == 4  # the parent's own is still the first
    client.close()


def test_threads_may_share_a_client(serve: Any) -> None:
    server = serve(lambda x: x.reply(200, answer(x.json["messages"][0]["content"])))
    wrong: list[str] = []
    with OctoAI(base_url=server.url, api_key="k") as client:

        def ask(name: str) -> None:
            for _ in range(20):
                messages = [{"role": "user", "content": name}]
                got = client.text_gen.create_chat_completion(model="m", messages=messages)
                if got.choices[0].message.content != name:
                    wrong.append(name)

        threads = [threading.Thread(target=ask, args=(f"t{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert server.connections <= 8


def test_a_client_can_be_used_after_it_was_closed(serve: Any) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    client = OctoAI(base_url=server.url, api_key="k")
    for _ in range(2):
        client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
        client.close()
    assert server.connections == 2


def test_a_child_does_not_keep_its_parents_stream_open(api: Any, serve: Any) -> None:
    """A forked child has copies of its parent's descriptors. The service notices a close all the same."""
    waited: list[float | None] = []

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        waited.append(x.seconds_until_closed(3))

    stream = api.stream(api.client(base_url=serve(script).url))
    api.next(stream)
    pid = os.fork()
    if pid == 0:
        time.sleep(2)
        os._exit(0)
    api.close_stream(stream)
    while not waited:
        time.sleep(0.01)
    os.waitpid(pid, 0)
    assert waited[0] is not None
    assert waited[0] < 1


def test_a_child_leaves_its_parents_stream_alone(serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        time.sleep(0.5)
        x.event(chunk("b", finish="stop"))
        x.end_stream()

    client = OctoAI(base_url=serve(script).url, api_key="k")
    stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
    next(stream)
    pid = os.fork()
    if pid == 0:
        stream.close()
        client.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert list(stream.text()) == ["b"]
    client.close()


def test_a_stream_can_be_closed_by_another_thread(serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(chunk("a"))
        x.seconds_until_closed()

    stream = OctoAI(base_url=serve(script).url, api_key="k").text_gen.create_chat_completion_stream(
        model="m", messages=MESSAGES
    )
    next(stream)
    began = time.monotonic()
    closing = threading.Timer(0.2, stream.close)
    closing.start()
    with pytest.raises(ApiError, match="it was closed before"):
        next(stream)
    closing.join()
    assert time.monotonic() - began < 2


@contextmanager
def closed_after(server: Server, stream: Any, num_requests: int) -> Iterator[None]:
    """Another thread closes the stream once the server has seen so many requests; whoever reads it leaves then."""
    closed_at: list[float] = []

    def close() -> None:
        while len(server.requests) < num_requests:
            time.sleep(0.01)
        time.sleep(0.1)  # and what is answered at once has been
        closed_at.append(time.monotonic())
        stream.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    yield
    closing.join()
    assert time.monotonic() - closed_at[0] < 1.5


@pytest.mark.parametrize("kept", [False, True])
def test_a_stream_can_be_closed_by_another_thread_before_its_answer_begins(serve: Any, kept: bool) -> None:
    left: list[float | None] = []

    def script(x: Exchange) -> None:
        if not x.json["stream"]:
            x.reply(200, answer())
        else:
            left.append(x.seconds_until_closed())

    server = serve(script)
    client = OctoAI(base_url=server.url, api_key="k")
    if kept:
        client.text_gen.create_chat_completion(model="m", messages=MESSAGES)
    stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
    with closed_after(server, stream, 1 + kept), pytest.raises(StreamInterrupted, match="it was closed before"):
        next(stream)
    deadline = time.monotonic() + 2
    while not left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left[0] is not None
    assert len(left) == 1
    assert len(server.requests) == 1 + kept


def test_a_stream_can_be_closed_by_another_thread_between_two_attempts(serve: Any) -> None:
    server = serve(lambda x: x.reply(503, {}, retry_after=5))
    client = OctoAI(base_url=server.url, api_key="k")
    stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
    with closed_after(server, stream, 1), pytest.raises(StreamInterrupted, match="it was closed before"):
        next(stream)
    assert len(server.requests) == 1


def test_an_async_client_works_on_uvloop(serve: Any) -> None:
    """What most web servers run on: not a subclass of asyncio's own loop, and its transports differ."""
    uvloop = pytest.importorskip("uvloop")
    waited: list[float | None] = []

    def script(x: Exchange) -> None:
        if x.number <= 3:
            x.stream(words())
        else:
            x.begin_stream()
            x.event(chunk("a"))
            waited.append(x.seconds_until_closed())

    server = serve(script)

    async def use() -> None:
        async with AsyncOctoAI(base_url=server.url, api_key="k", timeout=Timeout(idle=0.3)) as client:
            for number in range(4):
                stream = client.text_gen.create_chat_completion_stream(model="m", messages=MESSAGES)
                if number < 3:
                    assert (await stream.final()).choices[0].message.content == "w0 w1 w2 "
                else:
                    with pytest.raises(ApiTimeoutError):
                        await stream.final()
            await asyncio.sleep(0.2)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(use())
    assert server.connections == 1
    assert waited[0] is not None
    assert waited[0] < 1
