"""The HTTP endpoints of text generation: decode, hand on, encode. No decisions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from octoai.server import params
from octoai.server.accounts import Caller
from octoai.server.catalogue import Model
from octoai.server.encoding import ChatEncoder, CompletionEncoder
from octoai.server.errors import TooLarge, TooSlow, UnknownModel
from octoai.server.idempotency import Key, Recording
from octoai.server.metrics import CONTENT_TYPE
from octoai.server.params import TextRequest
from octoai.server.pricing import price_json
from octoai.server.router import Deployment
from octoai.server.service import Service
from octoai.server.streaming import EventStream, Replay, WholeAnswer

MAX_BODY_BYTES = 10_000_000
BODY_SECONDS = 120.0
_STARTED = int(time.time())


async def chat_completions(request: Request) -> ASGIApp:
    return await _generate(request, params.chat, ChatEncoder)


async def completions(request: Request) -> ASGIApp:
    return await _generate(request, params.completion, CompletionEncoder)


async def _generate(
    request: Request, decode: Callable[[bytes], TextRequest], encoder: type[ChatEncoder | CompletionEncoder]
) -> ASGIApp:
    service: Service = request.state.service
    caller = await caller_of(request)
    body = await body_of(request)
    wanted = decode(body)
    if request.headers.get("x-request-id") == request.state.request_id:
        request.state.request_id = await service.unique_id(request.state.request_id)
    key = request.headers.get("idempotency-key")
    job = await service.admit(
        caller, wanted, request.state.request_id, None if key is None else Key.of(key, request.url.path, body)
    )
    if isinstance(job, Recording):
        return Replay(job)
    request.state.standings = job.standings
    served = job.deployment.model.id
    answer = EventStream if wanted.stream else WholeAnswer
    return answer(job, encoder(wanted, fingerprint=f"octoai-{served}"), {"x-octoai-served-model": served})


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
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def body_of(request: Request) -> bytes:
    """The whole body, never more than the limit of it in memory. It is read as JSON whatever its type says."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise TooLarge(MAX_BODY_BYTES)
    blocks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for block in request.stream():
                size += len(block)
                if size > MAX_BODY_BYTES:
                    raise TooLarge(MAX_BODY_BYTES)
                blocks.append(block)
    except TimeoutError:
        raise TooSlow(f"The request body did not arrive within {BODY_SECONDS:.0f} s.") from None
    return b"".join(blocks)


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
