"""What our server knows of a client and ASGI does not say: whether it has left, told by a call (ASGI tells who waits in
`receive`, which takes a task for every request that does something else meanwhile), whether all it has to say is here,
and whether it keeps up with what it is told."""

from __future__ import annotations

from collections.abc import Callable

# Where a request's `scope["state"]` has its `Presence`, when the server is ours.
KEY = "octoai.presence"


class Presence:
    """Of the client of one connection, for the one request that is being answered on it."""

    def __init__(
        self, *, is_behind: Callable[[], bool] = lambda: True, has_body: Callable[[], bool] = lambda: False
    ) -> None:
        self.has_left = False
        # Whether the request's body has arrived, so that nothing of it has to be waited for.
        self.has_body = has_body
        # Whether what is sent now has to wait until the client has read more of what was sent before.
        self.is_behind = is_behind
        self.on_left: Callable[[], None] | None = None  # called once, in the loop

    def leave(self) -> None:
        self.has_left = True
        on_left, self.on_left = self.on_left, None
        if on_left is not None:
            on_left()
