"""A connection that is closed leaves nothing for the garbage collector, which comes seldom: thousands would pile up."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from octoai.server.engines.openai.connection import Connection
from octoai.server.http.incoming import ClientLeft, Incoming
from octoai.server.http.protocol import protocol_for
from tests.server.pipes import Recording, request

NUM_CONNECTIONS = 5


@pytest.fixture(autouse=True)
def _no_collector() -> Any:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Edge(Recording):
    """Notices, as the service's does, when a client leaves."""

    async def answer(self, incoming: Incoming) -> None:
        with suppress(ClientLeft):
            await super().answer(incoming)


async def through_asgi(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"12345"})


@asynccontextmanager
async def serving(found: list[weakref.ref[Any]]) -> AsyncIterator[int]:
    config = uvicorn.Config(through_asgi, log_config=None, lifespan="off", ws="none")
    config.load()
    make, state = protocol_for(Edge()), ServerState()  # type: ignore[arg-type]

    def made() -> Any:
        protocol = make(config, state, {})
        found.append(weakref.ref(protocol))
        return protocol

    loop = asyncio.get_running_loop()
    server = await loop.create_server(made, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def settled(found: list[weakref.ref[Any]]) -> list[Any]:
    """Those that are still there when the loop has had the time to let go of them."""
    for _ in range(50):
        await asyncio.sleep(0.01)
        if not any(each() for each in found):
            break
    return [each() for each in found if each() is not None]


@pytest.mark.parametrize("ends", ["client closes", "client leaves early", "service closes"])
def test_a_client_that_has_gone_leaves_nothing(ends: str) -> None:
    async def main() -> None:
        found: list[weakref.ref[Any]] = []
        async with serving(found) as port:
            for _ in range(NUM_CONNECTIONS):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                sent = request("a", b"12345", "close" if ends == "service closes" else "")
                for _ in range(2 if ends == "client closes" else 1):  # the second by a head that is known
                    writer.write(sent[:-2] if ends == "client leaves early" else sent)
                    if ends != "client leaves early":
                        assert (await reader.readuntil(b"12345")).startswith(b"HTTP/1.1 200")
                writer.close()
            assert len(found) == NUM_CONNECTIONS
            assert await settled(found) == []

    uvloop.run(main())


@pytest.mark.parametrize("num_ahead", [0, 3])
def test_a_client_of_what_goes_through_asgi_leaves_nothing(num_ahead: int) -> None:
    async def main() -> None:
        found: list[weakref.ref[Any]] = []
        async with serving(found) as port:
            for _ in range(NUM_CONNECTIONS):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                assert (await reader.readuntil(b"12345")).startswith(b"HTTP/1.1 200")
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * num_ahead)
                await asyncio.sleep(0)
                writer.transport.abort()
            assert await settled(found) == []

    uvloop.run(main())


@pytest.mark.parametrize("ends", ["engine closes", "we abort"])
def test_an_engine_that_has_gone_leaves_nothing(ends: str) -> None:
    async def main() -> None:
        found: list[weakref.ref[Any]] = []
        loop = asyncio.get_running_loop()
        async with serving([]) as port:
            for _ in range(NUM_CONNECTIONS):
                _, connection = await loop.create_connection(lambda: Connection(loop), "127.0.0.1", port)
                found.append(weakref.ref(connection))
                assert await connection.ask(request("a", b"1", "close" if ends == "engine closes" else ""), 5) == 200
                assert await connection.block(5) == b"1"
                if ends == "engine closes":
                    await asyncio.sleep(0.02)
                connection.abort()
                del connection, _
            assert await settled(found) == []

    uvloop.run(main())
