"""The outermost layer: an id on every answer, every refusal in the one error shape and in the log, and nothing internal
to a client."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octoai.server.accounts import Caller
from octoai.server.api.streaming import BrokenOff, SlowReader
from octoai.server.api.text_gen import limit_headers, raw
from octoai.server.errors import (
    BadRequest,
    InternalError,
    InvalidBody,
    MethodNotAllowed,
    Refusal,
    Unavailable,
    UnknownPath,
)
from octoai.server.http.incoming import VERSION_HEADER, ClientLeft, Headers, Incoming
from octoai.server.ids import new_request_id
from octoai.server.logs import Bounded
from octoai.server.service import Service
from octoai.server.store.database import StoreAway

log = logging.getLogger("octoai.http")
refusal_log = logging.getLogger("octoai.refusal")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LISTED = "GET /openapi.json lists what there is."
# What clients ask for by default that OpenAI has, and what they can be told to ask for here.
_INSTEAD = {
    "/v1/responses": "Use chat completions: POST /v1/chat/completions (`client.chat.completions`, `openai.chat(…)`).",
    "/v1/engines/": "Name the model in the body: POST /v1/completions, or /v1/chat/completions.",
    "/v1/embeddings": "Only text is generated here.",
}
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"})

Endpoint = Callable[[Incoming, Service], Awaitable[None]]


class Edge:
    """What is posted to a path in `posts` goes to its endpoint directly (`answer`); everything else through the routes,
    as an ASGI application. What is inside those finds the service and the request's id in `request.state`."""

    def __init__(self, routes: ASGIApp, service: Service, posts: Mapping[str, Endpoint]) -> None:
        self.routes = routes
        self.posts = posts
        self.posts_by_url = {path.encode(): path for path in posts}
        self.service = service
        self._refusal_log = Bounded(refusal_log)

    async def answer(self, incoming: Incoming) -> None:
        endpoint = self.posts[incoming.head.path]
        given = _sane(incoming.head.header(b"x-request-id"))
        incoming.request_id, incoming.is_given_id = given or new_request_id(), given is not None
        try:
            await endpoint(incoming, self.service)
        except SlowReader:
            incoming.give_up()
        except (BrokenOff, ClientLeft):
            pass  # without the end of its body, the answer makes the server close the connection
        except asyncio.CancelledError:  # we end before its answer has begun: its client is told so, not cut off
            await self._answer_refusal(self.service.shutting_down, incoming)
            raise
        except Exception as error:  # noqa: BLE001  # each is answered, and those that are our fault are logged
            await self._answer_refusal(self._refusal_of(error, incoming.request_id), incoming)
        finally:
            seconds = time.perf_counter() - incoming.began
            self.service.metrics.count_http(endpoint.__name__, "POST", incoming.status, seconds)

    async def _answer_refusal(self, refusal: Refusal, incoming: Incoming) -> None:
        if incoming.status is not None:
            return  # too late for another answer; the connection is cut
        headers, body = self._refused(refusal)
        if incoming.limit_headers is None or incoming.has_joined:  # it did not become a job, which has its own line
            self._log(refusal, incoming.request_id, incoming.caller, "POST", incoming.head.path)
        if incoming.head.expects_continue and incoming.more_body:  # the next request could be read as this one's body
            incoming.keep_alive = False
        if incoming.limit_headers is None and not _says_limits(headers):
            incoming.limit_headers = await limit_headers(self.service, incoming.caller)
        incoming.begin(refusal.status, headers)
        incoming.end(body)

    def refuse_unread(self, refusal: Refusal, request_id: str) -> bytes:
        """The body of the answer to what cannot be read as a request."""
        self._log(refusal, request_id, None, None, None)
        return self._refused(refusal)[1]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.routes(scope, receive, send)
            return
        scope["app"] = self  # makes the router raise what it does not find, instead of answering itself
        request_id = _given_id(scope["headers"]) or new_request_id()
        scope.setdefault("state", {}).update(request_id=request_id, service=self.service)
        answer = _Answer(scope, send, self.service)
        try:
            await self.routes(scope, receive, answer.send)
        except ClientDisconnect:
            pass
        except HTTPException as error:
            await self._refuse(_refusal_of_routes(error, scope), answer, scope)
        except asyncio.CancelledError:  # as above; uvicorn, which has cancelled it, would log it if it went on
            await self._refuse(self.service.shutting_down, answer, scope)
        except Exception as error:  # noqa: BLE001  # as above
            await self._refuse(self._refusal_of(error, request_id), answer, scope)
        finally:
            self._count(scope, answer)

    async def _refuse(self, refusal: Refusal, answer: _Answer, scope: Scope) -> None:
        if answer.status is not None:
            return  # too late for another answer; the connection is cut
        self._log(refusal, answer.request_id, scope["state"].get("caller"), scope["method"][:20], scope["path"][:200])
        headers, body = self._refused(refusal)
        await answer.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await answer.send({"type": "http.response.body", "body": body})

    def _refusal_of(self, error: Exception, request_id: str) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, StoreAway):  # a full disk may be why, which somebody else has to see to
            away = Unavailable("The database does not answer.", retry_after=5, code="database_away")
            return self.service.refusal or away
        log.error("request %s failed", request_id, exc_info=error)
        return InternalError(request_id)

    def _refused(self, refusal: Refusal) -> tuple[Headers, bytes]:
        self.service.metrics.refusals.labels(refusal.code or refusal.type).inc()
        body = orjson.dumps(refusal.body())
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
        return raw(headers), body

    def _log(
        self, refusal: Refusal, request_id: str, caller: Caller | None, method: str | None, path: str | None
    ) -> None:
        """Why a client is not served, in the words of a request's own line. What is said of a body may repeat it."""
        account = None if caller is None else caller.account.id
        self._refusal_log.info(
            "refused",
            {"error": refusal.code or refusal.type, "account": account},
            lambda: {
                "request_id": request_id,
                "token": None if caller is None else caller.token.id,
                "method": method,
                "path": path,
                "status": refusal.status,
                "param": None if refusal.param is None else refusal.param[:200],
                "reason": None if isinstance(refusal, BadRequest | InvalidBody) else refusal.message,
            },
        )

    def _count(self, scope: MutableMapping[str, Any], answer: _Answer) -> None:
        handler = getattr(scope.get("endpoint"), "__name__", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.service.metrics.count_http(handler, method, answer.status, time.perf_counter() - answer.began)


class _Answer:
    """What has been sent so far, with the headers that every answer has."""

    def __init__(self, scope: Scope, send: Send, service: Service) -> None:
        self._send = send
        self._state = scope["state"]
        self._service = service
        self.status: int | None = None
        self.began = time.perf_counter()

    @property
    def request_id(self) -> str:
        return str(self._state["request_id"])

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            elapsed = str(int((time.perf_counter() - self.began) * 1000)).encode()
            message["headers"] = [
                *headers,
                *await self._limits(headers),
                (b"x-request-id", self.request_id.encode()),
                (b"openai-processing-ms", elapsed),
                VERSION_HEADER,
            ]
        await self._send(message)

    async def _limits(self, headers: Headers) -> Headers:
        return () if _says_limits(headers) else await limit_headers(self._service, self._state.get("caller"))


def _says_limits(headers: Headers) -> bool:
    """A refusal for a limit says itself how the caller stands."""
    return any(name.startswith(b"x-ratelimit-") for name, _ in headers)


def _given_id(headers: Headers) -> str | None:
    return next((_sane(value.decode("latin-1")) for name, value in headers if name == b"x-request-id"), None)


def _sane(request_id: str | None) -> str | None:
    """The client's own id where it is a sane one: what is echoed must not carry a header or a log line of its own."""
    return request_id if request_id is not None and _SANE_ID.fullmatch(request_id) else None


def _refusal_of_routes(error: HTTPException, scope: Scope) -> Refusal:
    path = scope["path"][:200]
    if error.status_code == 405:
        return MethodNotAllowed(f"{scope['method'][:20]} is not offered at {path}", headers=dict(error.headers or {}))
    if error.status_code == 404:
        instead = next((said for begin, said in _INSTEAD.items() if path.startswith(begin)), _LISTED)
        return UnknownPath(f"There is nothing at {path}. {instead}")
    refusal = Refusal(str(error.detail))
    refusal.status = error.status_code
    return refusal
