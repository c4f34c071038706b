from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue
from octoai.server.engines.base import Engine
from octoai.server.machine.places import cache_dir
from octoai.server.sources import WeightStore
from octoai.server.store import Place
from tests.postgres import PostgresServer, ServerMissing
from tests.running import InProcess, Serve

OURS = [name for name in os.environ if name.startswith(("OCTOAI_", "OPENAI_")) and name != "OCTOAI_CACHE_DIR"]


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: a full collection that went through it as well would take a
    third of a second, in the middle of whatever a test measures just then."""
    gc.collect()
    gc.freeze()


SKIP_POSTGRES = os.environ.get("OCTOAI_SKIP_POSTGRES") == "1"


@pytest.fixture(autouse=True)
def _own_place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what belongs to the person running it; models stay in the usual cache."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    place = tmp_path_factory.mktemp("place")
    monkeypatch.setenv("OCTOAI_CACHE_DIR", str(CACHE))
    monkeypatch.setenv("OCTOAI_CONFIG_DIR", str(place / "config"))
    monkeypatch.setenv("OCTOAI_DATA_DIR", str(place / "data"))


CACHE = cache_dir(os.environ)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The weights of the embedded model, downloaded once."""
    return WeightStore(CACHE).pull(Catalogue.load()[EMBEDDED_MODEL_ID])


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Shared: a test that stops or pauses it starts or resumes it."""
    if SKIP_POSTGRES:
        pytest.skip("OCTOAI_SKIP_POSTGRES=1: nothing was tested with PostgreSQL")
    try:
        server = PostgresServer()
    except ServerMissing as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    yield server
    server.remove()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database of the test's own."""
    url = postgres_server.new_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a test keeps what the service keeps: each such test runs with both databases."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    return Place(tmp_path / "data", url)


@pytest.fixture
def in_process(tmp_path: Path) -> Iterator[Callable[..., InProcess]]:
    """Start the application over an engine; stopped after the test."""
    running: list[InProcess] = []

    def start(engine: Engine, **options: object) -> InProcess:
        running.append(InProcess(engine, tmp_path / f"data{len(running)}", **options))  # type: ignore[arg-type]
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture(scope="session")
def served(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """The service with the real model, as a person starts it. Shared: a test must leave it as it found it."""
    service = Serve(tmp_path_factory.mktemp("served"), environ={"OCTOAI_CACHE_DIR": str(CACHE)})
    yield service
    assert service.stop() == 0


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user of a container whom its list of users does not have."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
