"""Pages of another origin: what a browser wants to be told before one of theirs may ask here (CORS, of the Fetch
standard). Their tokens come as a header, not as a cookie, so a page has only those that it was given."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

_ASKED = b"access-control-request-method"
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, PATCH, DELETE",
    "access-control-allow-headers": "authorization, *",  # the star alone is all but this one
    "access-control-max-age": "7200",
}


def headers(allowed_origin: str | None) -> Sequence[tuple[str, str]]:
    """Of every answer, also of a refusal: without them its page cannot read why."""
    if allowed_origin is None:
        return []
    return [("access-control-allow-origin", allowed_origin), ("access-control-expose-headers", "*")]


class Preflights:
    """Answers for all paths what a browser asks before it sends a page's request; passes everything else on."""

    def __init__(self, routes: ASGIApp) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        if is_http and scope["method"] == "OPTIONS" and any(name == _ASKED for name, _ in scope["headers"]):
            await Response(status_code=204, headers=_PREFLIGHT)(scope, receive, send)
        else:
            await self._routes(scope, receive, send)
