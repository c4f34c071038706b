"""The outermost layer: an id on every answer, every refusal in the one error shape, nothing internal to a client."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, MutableMapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octoai.server.errors import InternalError, MethodNotAllowed, Refusal, Unavailable, UnknownPath, new_request_id
from octoai.server.service import Service
from octoai.server.store.database import StoreAway, StoreError
from octoai.server.streaming import BrokenOff, SlowReader

log = logging.getLogger("octoai.http")

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"})
VERSION_HEADER = (b"openai-version", b"2020-10-01")


class Edge:
    """Wraps the routes. What is inside finds the service and the request's id in `request.state`; `is_given_id`: the
    client chose it. What is posted to a path in `posts` goes there directly, without a look at the routes."""

    def __init__(self, routes: ASGIApp, service: Service, posts: Mapping[str, ASGIApp]) -> None:
        self.routes = routes
        self.posts = posts
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.routes(scope, receive, send)
            return
        scope["app"] = self  # makes the router raise what it does not find, instead of answering itself
        given = _given_id(scope)
        scope.setdefault("state", {}).update(
            request_id=given or new_request_id(), is_given_id=given is not None, service=self.service
        )
        answer = _Answer(scope, send, self.service)
        endpoint = self.posts.get(scope["path"]) if scope["method"] == "POST" else None
        try:
            if endpoint is not None:
                scope["endpoint"] = endpoint
                await endpoint(scope, receive, answer.send)
            else:
                await self.routes(scope, receive, answer.send)
        except (BrokenOff, SlowReader, ClientDisconnect):
            pass  # without the end of its body, the answer makes the server close the connection
        except Refusal as refusal:
            await self._refuse(refusal, answer)
        except StoreAway:
            await self._refuse(
                Unavailable("The database does not answer.", retry_after=5, code="database_away"), answer
            )
        except HTTPException as error:
            await self._refuse(_refusal_of(error, scope), answer)
        except Exception:
            log.exception("request %s failed", answer.request_id)
            await self._refuse(InternalError(answer.request_id), answer)
        finally:
            self._count(scope, answer)

    async def _refuse(self, refusal: Refusal, answer: _Answer) -> None:
        if answer.status is not None:
            return  # too late for another answer; the connection is cut
        self.service.metrics.refusals.labels(refusal.code or refusal.type).inc()
        body = orjson.dumps(refusal.body())
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await answer.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await answer.send({"type": "http.response.body", "body": body})

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

    async def _limits(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """How the caller stands with its limits, where it has any: as it was told when the request was admitted, by a
        refusal for itself, or as it is now."""
        caller = self._state.get("caller")
        if caller is None or not caller.is_limited or any(name.startswith(b"x-ratelimit-") for name, _ in headers):
            return []
        standings = self._state.get("standings")
        if standings is None:
            try:
                standings = await self._service.standings(caller)
            except StoreError:
                return []
        return [(name.encode(), value.encode()) for name, value in standings.headers().items()]


def _given_id(scope: Scope) -> str | None:
    """The client's own id where it is a sane one: what is echoed must not carry a header or a log line of its own."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return None


def _refusal_of(error: HTTPException, scope: Scope) -> Refusal:
    path = scope["path"][:200]
    if error.status_code == 405:
        return MethodNotAllowed(f"{scope['method'][:20]} is not offered at {path}", headers=dict(error.headers or {}))
    if error.status_code == 404:
        return UnknownPath(f"There is nothing at {path}. GET /openapi.json lists what there is.")
    refusal = Refusal(str(error.detail))
    refusal.status = error.status_code
    return refusal
