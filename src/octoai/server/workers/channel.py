"""What two processes say to each other over a socket: messages, and questions that are answered. Lines of JSON.

Knows nothing of what is said; names of files may be in it, which are not always Unicode: Python's own JSON has them
too. A socket whose other end is gone says that its process is, however it ended.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

MAX_LINE_BYTES = 2**28
ANSWER = "answer"

Message = dict[str, Any]


class ChannelClosed(Exception):
    """The other process is gone."""


class Channel:
    """One end. Somebody must read `messages` for questions to be answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._is_closed = False

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        return cls(*await asyncio.open_unix_connection(sock=end, limit=MAX_LINE_BYTES))

    def tell(self, kind: str, **facts: Any) -> None:
        """What is told to a process that is gone is lost."""
        if not self._is_closed:
            self._writer.write(json.dumps({"kind": kind, **facts}).encode() + b"\n")

    async def ask(self, kind: str, *, seconds: float) -> Any:
        """What the other end answers. Raises TimeoutError, ChannelClosed."""
        if self._is_closed:
            raise ChannelClosed
        number = next(self._numbers)
        answered = self._asked[number] = asyncio.get_running_loop().create_future()
        self.tell(kind, number=number)
        try:
            async with asyncio.timeout(seconds):
                return await answered
        finally:
            del self._asked[number]

    def answer(self, question: Message, said: Any) -> None:
        self.tell(ANSWER, number=question["number"], said=said)

    async def messages(self) -> AsyncIterator[Message]:
        """What the other end tells and asks, until it is gone."""
        with suppress(ConnectionError):
            # A line without its end is the last of a process that was killed while it wrote.
            while (line := await self._reader.readline()).endswith(b"\n"):
                message = json.loads(line)
                if message["kind"] != ANSWER:
                    yield message
                elif (answered := self._asked.get(message["number"])) is not None and not answered.done():
                    answered.set_result(message["said"])
        self._is_closed = True
        for answered in self._asked.values():
            if not answered.done():
                answered.set_exception(ChannelClosed())

    async def close(self) -> None:
        """When what was told is on its way."""
        with suppress(ConnectionError):
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()
