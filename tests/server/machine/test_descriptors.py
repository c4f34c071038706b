"""A service has as many file descriptors as it may, and says so where that is not enough."""

from __future__ import annotations

import errno
import http.client
import itertools
import json
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from octoai.server.machine.descriptors import WANTED, raise_limit
from tests.load.upstream import Upstream
from tests.running import Serve
from tests.talking import until

NOFILE = resource.RLIMIT_NOFILE


@pytest.fixture
def engine() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


@pytest.fixture
def service(tmp_path: Path, engine: Upstream) -> Iterator[Serve]:
    (tmp_path / "octoai.toml").write_text(f'[[models]]\nid = "m1"\nengine_url = "{engine.url}"\ndialect = "vllm"\n')
    soft, hard = resource.getrlimit(NOFILE)
    resource.setrlimit(NOFILE, (min(soft, 512), hard))
    try:
        serving = Serve(tmp_path)
    finally:
        resource.setrlimit(NOFILE, (soft, hard))
    yield serving
    serving.stop()


def asked(service: Serve, path: str, **said: float) -> tuple[int, Any]:
    """Status and answer; 0 where the connection was turned away."""
    connection = http.client.HTTPConnection(urlsplit(service.url).netloc, timeout=20)
    try:
        body = {"model": "m1", "max_tokens": 100, "messages": [{"role": "user", "content": json.dumps(said)}]}
        connection.request(
            "POST" if said else "GET", path, json.dumps(body), {"authorization": f"Bearer {service.token}"}
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except OSError:
        return 0, None
    finally:
        connection.close()


def leave(service: Serve, num: int) -> None:
    """It has what it has, and so many more: the limit is on a descriptor's number, and of those the lowest
    that is free is taken."""
    taken = {int(each.name) for each in Path(f"/proc/{service.process.pid}/fd").iterdir()}
    free = itertools.filterfalse(taken.__contains__, itertools.count())
    limit = next(itertools.islice(free, num, None))
    resource.prlimit(service.process.pid, NOFILE, (limit, resource.getrlimit(NOFILE)[1]))


def with_one_more(service: Serve, silent: list[socket.socket]) -> str:
    """The log, when there is another connection that says nothing."""
    place = urlsplit(service.url)
    silent.append(socket.create_connection((place.hostname or "", place.port or 0)))
    return service.log.read_text()


@pytest.mark.slow
def test_it_takes_as_many_as_it_may_and_says_when_none_is_left(service: Serve) -> None:
    _, hard = resource.getrlimit(NOFILE)
    soft = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    assert resource.prlimit(service.process.pid, NOFILE) == (soft, hard)

    chat = "/v1/chat/completions"
    leave(service, 20)
    with ThreadPoolExecutor(30) as pool:  # each takes two, and then the last of them only one
        asking = [pool.submit(asked, service, chat, number=number, num_tokens=30, pace=0.2) for number in range(30)]
        time.sleep(1)
        silent: list[socket.socket] = []
        until(lambda: "connections are turned away" in with_one_more(service, silent), 5)
        for connection in silent:
            connection.close()
        answers = [each.result() for each in asking]
    assert {status for status, _ in answers} - {0} == {200, 503}
    assert {said["code"] for status, said in answers if status == 503} == {"overloaded"}
    assert service.log.read_text().count("for a connection to an engine") == 1
    assert asked(service, chat, number=100, num_tokens=3)[0] == 200


@pytest.mark.parametrize("call", ["getrlimit", "setrlimit"])
@pytest.mark.parametrize("error", [OSError(errno.EPERM, "refused"), ValueError("not allowed")])
def test_a_system_that_refuses_leaves_the_limit_as_it_is(
    monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    asked = []

    def refuse(*values: object) -> None:
        asked.append(values)
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(resource, call, refuse)
    raise_limit()
    assert asked
