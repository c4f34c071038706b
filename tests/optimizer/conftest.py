from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from octoai.optimizer import kernels


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's own kernels, compiled for this machine."""
    place = tmp_path_factory.mktemp("kernels")
    engine = version("xllamacpp")
    kernels.make(place / "made.so", engine, work=place / "making", num_threads=2, environ=os.environ)
    return place / "made.so"
