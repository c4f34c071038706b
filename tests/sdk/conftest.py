"""One suite for both clients: `api` drives either with the same plain calls."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from octoai import AsyncOctoAI, OctoAI
from tests.sdk.misbehaving import Script, Server, answer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in (
        *("OCTOAI_TOKEN", "OCTOAI_API_TOKEN", "OCTOAI_API_KEY", "OCTOAI_BASE_URL", "OCTOAI_API_BASE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCTOAI_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Server]]:
    """Start a server with a script; all are stopped, and their own failures shown, at the end."""
    servers: list[Server] = []

    def start(script: Script) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
    for server in servers:
        if server.errors:
            raise server.errors[0]


@pytest.fixture
def echo(serve: Callable[[Script], Server]) -> Server:
    """One that answers every request with the same."""
    return serve(lambda x: x.reply(200, answer(), x_request_id="req-7"))


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path / "localhost.pem")


def make_certificate(file: Path) -> Path:
    """A file with a certificate of `localhost`, which is its own authority, and its key."""
    made = f"req -x509 {_NEW_KEY} -keyout {file} -out {file}.crt -days 2 -subj /CN=localhost"
    _openssl(*made.split(), "-addext", "subjectAltName=DNS:localhost")
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


def make_signed_certificate(directory: Path) -> tuple[Path, Path]:
    """A file with a certificate of `localhost` and its key, and one with the authority that has signed it, neither with
    more extensions than it needs."""
    key, signed, authority = (directory / name for name in ("service.pem", "signed.pem", "authority.pem"))
    bare, names = directory / "bare.cnf", directory / "names.cnf"
    bare.write_text(
        "[req]\ndistinguished_name=name\nx509_extensions=authority\n[name]\n[authority]\nbasicConstraints=CA:true\n"
    )
    names.write_text("subjectAltName=DNS:localhost\n")
    first = f"req -x509 -config {bare} {_NEW_KEY} -keyout {authority}.key -out {authority} -days 2 -subj /CN=authority"
    second = f"req -config {bare} {_NEW_KEY} -keyout {key} -out {key}.csr -subj /CN=localhost"
    third = f"x509 -req -in {key}.csr -CA {authority} -CAkey {authority}.key -CAcreateserial -extfile {names}"
    for made in (first, second, f"{third} -out {signed}"):
        _openssl(*made.split())
    key.write_bytes(key.read_bytes() + signed.read_bytes())
    return key, authority


_NEW_KEY = "-nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256"


def _openssl(*arguments: str) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes a certificate with the command openssl")
    subprocess.run([openssl, *arguments], check=True, capture_output=True)


class SyncApi:
    """The synchronous client, with its streams as lists."""

    kind = "sync"

    def __init__(self) -> None:
        self.clients: list[Any] = []

    def client(self, **settings: Any) -> Any:
        self.clients.append(OctoAI(**{"api_key": "test-token", **settings}))
        return self.clients[-1]

    def chat(self, client: Any, **params: Any) -> Any:
        return client.text_gen.create_chat_completion(**{"model": "m", "messages": MESSAGES, **params})

    def complete(self, client: Any, **params: Any) -> Any:
        return client.text_gen.create_completion(**{"model": "m", "prompt": "p", **params})

    def stream(self, client: Any, **params: Any) -> Any:
        return client.text_gen.create_chat_completion_stream(**{"model": "m", "messages": MESSAGES, **params})

    def complete_stream(self, client: Any, **params: Any) -> Any:
        return client.text_gen.create_completion_stream(**{"model": "m", "prompt": "p", **params})

    def all(self, stream: Any) -> list[Any]:
        return list(stream)

    def next(self, stream: Any) -> Any:
        return next(stream)

    def take(self, stream: Any, count: int) -> list[Any]:
        """Leave the loop after so many."""
        taken = []
        for item in stream:
            taken.append(item)
            if len(taken) == count:
                break
        return taken

    def text(self, stream: Any) -> list[str]:
        return list(stream.text())

    def final(self, stream: Any) -> Any:
        return stream.final()

    def close_stream(self, stream: Any) -> None:
        stream.close()

    def call(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(client, method)(*args, **kwargs)

    def entered(self, stream: Any, then: Callable[[], None] = lambda: None) -> None:
        with stream:
            then()

    def end(self) -> None:
        for client in self.clients:
            client.close()


class AsyncApi(SyncApi):
    """The asynchronous one, on one event loop for the whole test."""

    kind = "async"

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def client(self, **settings: Any) -> Any:
        self.clients.append(AsyncOctoAI(**{"api_key": "test-token", **settings}))
        return self.clients[-1]

    def chat(self, client: Any, **params: Any) -> Any:
        return self.run(super().chat(client, **params))

    def complete(self, client: Any, **params: Any) -> Any:
        return self.run(super().complete(client, **params))

    def all(self, stream: Any) -> list[Any]:
        async def gather() -> list[Any]:
            return [item async for item in stream]

        return self.run(gather())

    def next(self, stream: Any) -> Any:
        return self.run(stream.__anext__())

    def take(self, stream: Any, count: int) -> list[Any]:
        async def some() -> list[Any]:
            taken = []
            async for item in stream:
                taken.append(item)
                if len(taken) == count:
                    break
            await asyncio.sleep(0.05)
            return taken

        return self.run(some())

    def text(self, stream: Any) -> list[str]:
        async def gather() -> list[str]:
            return [item async for item in stream.text()]

        return self.run(gather())

    def final(self, stream: Any) -> Any:
        return self.run(stream.final())

    def close_stream(self, stream: Any) -> None:
        self.run(stream.close())

    def call(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        result = getattr(client, method)(*args, **kwargs)
        return self.run(result) if asyncio.iscoroutine(result) else result

    def entered(self, stream: Any, then: Callable[[], None] = lambda: None) -> None:
        async def enter() -> None:
            async with stream:
                then()

        self.run(enter())

    def end(self) -> None:
        async def close() -> None:
            for client in self.clients:
                await client.close()

        with suppress(RuntimeError):
            self.run(close())
        self.runner.close()


@pytest.fixture(params=[SyncApi, AsyncApi], ids=["sync", "async"])
def api(request: pytest.FixtureRequest) -> Iterator[SyncApi]:
    driver = request.param()
    yield driver
    driver.end()
