"""Whether a client is still there, told by a call, and whether it keeps up: ASGI tells the one who waits in `receive`,
which takes a task for every request that does something else meanwhile, and the other not at all."""

from __future__ import annotations

from collections.abc import Callable

# Where a request's `scope["state"]` has its `Presence`, when the server is ours.
KEY = "octoai.presence"


class Presence:
    """Of the client of one connection, for the one request that is being answered on it."""

    def __init__(self, is_behind: Callable[[], bool] = lambda: True) -> None:
        self.has_left = False
        # Whether what is sent now has to wait until the client has read more of what was sent before.
        self.is_behind = is_behind
        self.on_left: Callable[[], None] | None = None  # called once, in the loop

    def leave(self) -> None:
        self.has_left = True
        on_left, self.on_left = self.on_left, None
        if on_left is not None:
            on_left()
