"""What two processes say to each other, however one of them ends."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from octoai.server.workers.channel import Channel, ChannelClosed, Message


def between(both: Callable[[Channel, socket.socket], Awaitable[None]]) -> None:
    """A channel, and the bare other end of it."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            channel = await Channel.over(ours)
            await both(channel, theirs)
            await channel.close()

    asyncio.run(asyncio.wait_for(main(), 20))


async def heard(channel: Channel) -> list[Message]:
    return [message async for message in channel.messages()]


def test_a_process_that_is_killed_while_it_writes_is_gone_as_any_other() -> None:
    async def both(channel: Channel, theirs: socket.socket) -> None:
        asking = asyncio.create_task(channel.ask("report", seconds=20))
        await asyncio.sleep(0)
        theirs.sendall(b'{"kind": "ready"}\n{"kind": "answer", "number": 0, "said": [1, ')
        theirs.shutdown(socket.SHUT_RDWR)
        assert await heard(channel) == [{"kind": "ready"}]
        with pytest.raises(ChannelClosed):
            await asking

    between(both)


def test_names_of_files_that_are_not_unicode_come_over_as_they_are() -> None:
    async def both(channel: Channel, theirs: socket.socket) -> None:
        name = os.fsdecode(b"/data/\xff")
        other = await Channel.over(theirs.dup())
        other.tell("serve", settings={"data_dir": name})
        await other.close()
        theirs.shutdown(socket.SHUT_RDWR)
        assert await heard(channel) == [{"kind": "serve", "settings": {"data_dir": name}}]

    between(both)
