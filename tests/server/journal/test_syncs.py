"""Files brought to the disk by the kernel, by each of the two ways it has."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from octoai.server.journal import syncs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")


@pytest.fixture(params=["by a ring", "the older way"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "the older way":
        monkeypatch.setattr(syncs, "_ring", lambda: None)
    elif syncs._ring() is None:
        pytest.skip("io_uring is not allowed here")
    return str(request.param)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


async def synced(kernel: syncs.Syncs, fd: int) -> OSError | None:
    told: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    kernel.submit(fd, told.set_result)
    async with asyncio.timeout(20):
        return await told


@pytest.mark.usefixtures("way")
def test_a_file_is_synced_again_and_again(fd: int) -> None:
    async def main() -> None:
        kernel = syncs.Syncs(asyncio.get_running_loop())
        for number in range(100):
            os.pwrite(fd, b"record", 6 * number)
            assert await synced(kernel, fd) is None

    asyncio.run(main())


@pytest.mark.usefixtures("way")
def test_several_at_once_are_each_told(fd: int) -> None:
    async def main() -> None:
        kernel = syncs.Syncs(asyncio.get_running_loop())
        assert await asyncio.gather(*(synced(kernel, fd) for _ in range(syncs.MAX_AT_ONCE))) == [None] * 16

    asyncio.run(main())


@pytest.mark.usefixtures("way")
def test_what_cannot_be_synced_fails(fd: int) -> None:
    async def main() -> None:
        kernel = syncs.Syncs(asyncio.get_running_loop())
        reader, writer = os.pipe()
        try:
            error = await synced(kernel, writer)
        except OSError as raised:
            error = raised
        assert isinstance(error, OSError)
        os.close(reader)
        os.close(writer)
        assert await synced(kernel, fd) is None, "what came after it is synced as before"

    asyncio.run(main())


@pytest.mark.usefixtures("way")
def test_what_is_done_is_told_without_the_loop(fd: int) -> None:
    async def main() -> None:
        kernel = syncs.Syncs(asyncio.get_running_loop())
        told: list[OSError | None] = []
        os.pwrite(fd, b"record", 0)
        kernel.submit(fd, told.append)
        while not told:  # the loop does not run meanwhile
            kernel.collect()
        await asyncio.sleep(0.01)
        assert told == [None]

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.fixture
def _signals() -> Iterator[None]:
    """Thousands a second, as of a child that ends, or of a window that changes its size."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    program = f"import os\nwhile True: os.kill({os.getpid()}, {int(signal.SIGUSR1)})"
    sender = subprocess.Popen([sys.executable, "-c", program])
    yield
    sender.kill()
    sender.wait()
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("way", "_signals")
def test_a_signal_in_between_loses_nothing(fd: int) -> None:
    async def main() -> None:
        kernel = syncs.Syncs(asyncio.get_running_loop())
        for number in range(10):
            told: list[OSError | None] = []
            os.pwrite(fd, b"record", 6 * number)
            kernel.submit(fd, told.append)
            while not told:
                kernel.collect()
            assert told == [None]
            assert await synced(kernel, fd) is None

    asyncio.run(main())
