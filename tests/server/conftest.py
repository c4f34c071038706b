from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.journal import Journal
from octoai.server.journal import writer as journal_writer
from tests.load.upstream import Upstream
from tests.running import InProcess
from tests.server.journals import SMALL, Opened
from tests.server.keyed import PATH
from tests.talking import Talk, request


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """An engine of the test's own that does as each request says, and counts."""
    running = Upstream()
    yield running
    running.close()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens journals in the test's directory, and sees to it that their threads end with them."""
    journals: list[Journal] = []

    def open_one(segment_bytes: int = SMALL) -> Journal:
        journals.append(Journal.open(tmp_path / "journal", segment_bytes=segment_bytes))
        return journals[-1]

    yield open_one
    for journal in journals:
        journal.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "journal"]


@pytest.fixture
def by_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel does not sync by itself."""

    def none(_: Any) -> None:
        raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(journal_writer, "Syncs", none)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """One for all tests of a file that need nothing special of the engine and count nothing."""
    running = InProcess(ScriptedEngine(), tmp_path_factory.mktemp("service"))
    yield running
    running.close()


@pytest.fixture
def talk() -> Iterator[Callable[[InProcess], Talk]]:
    """Opens connections to a service, which end with the test."""
    open_: list[Talk] = []

    def start(service: InProcess) -> Talk:
        open_.append(Talk(service))
        return open_[-1]

    yield start
    for each in open_:
        each.close()


@pytest.fixture
def begin(talk: Callable[[InProcess], Talk]) -> Callable[..., Talk]:
    """Begins streams under Idempotency-Keys, whose connections end with the test."""

    def start(service: InProcess, key: str, **params: Any) -> Talk:
        begun = talk(service)
        head = f"idempotency-key: {key}\r\nconnection: close\r\n"
        begun.send(PATH, request(service, **{"stream": True, **params}), head=head)
        return begun

    return start
