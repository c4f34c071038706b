"""The HTTP endpoints of text generation: decode, hand on, encode. No decisions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from octoai.server import params
from octoai.server.accounts import Caller
from octoai.server.catalogue import Model
from octoai.server.encoding import ChatEncoder, CompletionEncoder
from octoai.server.errors import TooLarge, TooSlow, UnknownModel
from octoai.server.idempotency import Key, Recording
from octoai.server.metrics import CONTENT_TYPE
from octoai.server.params import TextRequest
from octoai.server.presence import KEY as PRESENCE
from octoai.server.presence import Presence
from octoai.server.pricing import price_json
from octoai.server.router import Deployment
from octoai.server.service import Service
from octoai.server.streaming import EventStream, Replay, WholeAnswer

MAX_BODY_BYTES = 10_000_000
BODY_SECONDS = 120.0
_STARTED = int(time.time())


class Generating:
    """An endpoint that generates text, as an ASGI application: it is called more often than all others together."""

    def __init__(
        self, name: str, decode: Callable[[bytes], TextRequest], encoder: type[ChatEncoder | CompletionEncoder]
    ) -> None:
        self.__name__ = name
        self._decode = decode
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        service: Service = state["service"]
        caller = state["caller"] = await service.authenticate(header(scope, b"authorization"))
        body = await body_of(scope, receive)
        request = self._decode(body)
        if state["is_given_id"]:
            state["request_id"] = await service.unique_id(state["request_id"])
        key = header(scope, b"idempotency-key")
        job = await service.admit(
            caller, request, state["request_id"], None if key is None else Key.of(key, scope["path"], body)
        )
        if isinstance(job, Recording):
            await Replay(job)(scope, receive, send)
            return
        state["standings"] = job.standings
        answer = EventStream if request.stream else WholeAnswer
        await answer(job, self._encoder(request, fingerprint=f"octoai-{job.deployment.model.id}"))(scope, receive, send)


chat_completions = Generating("chat_completions", params.chat, ChatEncoder)
completions = Generating("completions", params.completion, CompletionEncoder)


async def caller_of(request: Request) -> Caller:
    """Who is asking. From here on every answer carries its rate limits, where it has any."""
    service: Service = request.state.service
    request.state.caller = caller = await service.authenticate(request.headers.get("authorization"))
    return caller


async def models(request: Request) -> Response:
    service: Service = request.state.service
    await caller_of(request)
    listed = [_model_json(service, model, deployment) for model, deployment in service.router.served()]
    return JSONResponse({"object": "list", "data": listed})


async def model(request: Request) -> Response:
    service: Service = request.state.service
    await caller_of(request)
    name = request.path_params["model"]
    deployment = service.router.find(name)
    known = (
        deployment.model
        if name.lower() in map(str.lower, deployment.model.names)
        else service.router.catalogue.find(name)
    )
    if known is None:
        raise UnknownModel(name, ())
    return JSONResponse(_model_json(service, known, deployment))


async def live(_: Request) -> Response:
    """The process answers; nothing is said of engines."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether a request would be served now: 503 while an engine is away or the service is stopping."""
    service: Service = request.state.service
    engines = {each.model.id: "ready" if each.engine.is_ready else "not ready" for each in service.router.deployments}
    status = "draining" if service.is_draining else "ready" if service.is_ready else "not ready"
    code = 200 if service.is_ready else 503
    return JSONResponse({"status": status, "engines": engines}, code, {} if code == 200 else {"retry-after": "2"})


async def metrics(request: Request) -> Response:
    service: Service = request.state.service
    return Response(await service.metrics.text(), media_type=CONTENT_TYPE)


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that name, which is given in lower case."""
    for each, value in scope["headers"]:
        if each == name:
            return str(value.decode("latin-1"))
    return None


async def body_of(scope: Scope, receive: Receive) -> bytes:
    """The whole body, never more than the limit of it in memory. It is read as JSON whatever its type says."""
    declared = header(scope, b"content-length") or ""
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise TooLarge(MAX_BODY_BYTES)
    presence: Presence | None = scope["state"].get(PRESENCE)
    if presence is not None and presence.has_body():
        return await _received(receive)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _received(receive)
    except TimeoutError:
        raise TooSlow(f"The request body did not arrive within {BODY_SECONDS:.0f} s.") from None


async def _received(receive: Receive) -> bytes:
    blocks, size, has_more = [], 0, True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        has_more = message.get("more_body", False)
        blocks.append(message.get("body", b""))
        size += len(blocks[-1])
        if size > MAX_BODY_BYTES:
            raise TooLarge(MAX_BODY_BYTES)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _model_json(service: Service, model: Model, deployment: Deployment) -> dict[str, object]:
    served_by = deployment.model
    return {
        "id": model.id,
        "object": "model",
        "created": _STARTED,
        "owned_by": "octoai",
        "context_length": deployment.context_length,
        "served_by": served_by.id,
        "is_stand_in": served_by.id != model.id,
        "aliases": list(model.aliases),
        "licence": model.licence,
        "price": price_json(service, model, served_by),
        "ready": deployment.engine.is_ready,
    }
