"""Who comes while the loop is busy is let in by several doors."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import closing

import pytest
import uvloop

from octoai.server.http.listener import NUM_DOORS, CannotListen, Port, doors, listen

NUM_CLIENTS = 80


def num_turns(*, has_several: bool) -> int:
    """Of a busy loop, until all of a burst of clients are heard."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        num_heard = 0

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                nonlocal num_heard
                num_heard += 1

        listener = listen("127.0.0.1", 0)
        address, open_doors = listener.getsockname(), doors(listener) if has_several else [listener]
        servers = [await loop.create_server(Protocol, sock=door) for door in open_doors]
        clients = [socket.create_connection(address) for _ in range(NUM_CLIENTS)]
        turns = 0
        while num_heard < NUM_CLIENTS:
            turns += 1
            time.sleep(0.002)  # noqa: ASYNC251  # what a busy loop does
            await asyncio.sleep(0)
        for server in servers:
            server.close()
        for each in (*open_doors, *clients):
            each.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address).close()
        return turns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(main(), 30))


def test_a_burst_of_clients_is_heard_in_fewer_turns() -> None:
    assert num_turns(has_several=True) <= NUM_CLIENTS // NUM_DOORS + 5
    assert num_turns(has_several=False) >= NUM_CLIENTS // 2, "uvloop takes more than one in a turn: one door would do"


def test_a_port_of_workers_is_held_while_none_of_them_listens() -> None:
    with closing(Port("127.0.0.1", 0)) as port:
        for _ in range(2):
            with pytest.raises(CannotListen, match="it is in use"):
                listen("127.0.0.1", port.number).close()
            with pytest.raises(CannotListen, match="it is in use"):
                Port("127.0.0.1", port.number).close()
            listener = port.listener(is_listening=True)  # of a worker that dies
            with listener, socket.create_connection(("127.0.0.1", port.number)), listener.accept()[0]:
                pass
    with closing(Port("127.0.0.1", port.number)):
        pass


@pytest.mark.parametrize("host", ["nonesuch.invalid", "192.0.2.1"])  # no name of a machine; of another machine
def test_a_host_that_is_not_here_is_told_to_be_another_host(host: str) -> None:
    with pytest.raises(CannotListen, match=r"choose another with --host$"):
        listen(host, 0).close()


def test_a_port_that_is_in_use_is_told_to_be_another_port() -> None:
    with closing(listen("127.0.0.1", 0)) as other, pytest.raises(CannotListen, match=r"choose another with --port$"):
        listen("127.0.0.1", other.getsockname()[1]).close()
