"""Whether a client is still there, told by a call: ASGI tells who waits in `receive`, which takes a task for every
request that does something else meanwhile."""

from __future__ import annotations

from collections.abc import Callable

# Where a request's `scope["state"]` has its `Presence`, when the server is ours.
KEY = "octoai.presence"


class Presence:
    """Of the client of one connection, for the one request that is being answered on it."""

    def __init__(self) -> None:
        self.has_left = False
        self.on_left: Callable[[], None] | None = None  # called once, in the loop

    def leave(self) -> None:
        self.has_left = True
        on_left, self.on_left = self.on_left, None
        if on_left is not None:
            on_left()
