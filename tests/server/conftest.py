from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.load.upstream import Upstream


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """An engine of the test's own that does as each request says, and counts."""
    running = Upstream()
    yield running
    running.close()
