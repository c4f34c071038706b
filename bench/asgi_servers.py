"""The servers and frameworks that `asgi.py` measures: the same routes in each, a process of its own per candidate."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
NUM_EVENTS = 64
EVENT = b"data: " + b"e" * 212 + b"\n\n"  # 220 bytes
DONE = b"data: [DONE]\n\n"
ASK = b'{"prompt":"' + b"q" * 487 + b'"}'  # 500 bytes
ANSWER = b'{"text":"' + b"a" * 589 + b'"}'  # 600 bytes
LAST_CHUNK = b"0\r\n\r\n"
SEEN = ["nothing yet"]  # what a server saw of the last client that went away; asked for at /seen


@dataclass(frozen=True)
class Candidate:
    needs: tuple[str, ...]
    serve: Callable[[str, int], None]
    app: str


# ---- the routes, as raw ASGI: shared by every ASGI candidate ----


async def body_of(receive: Any) -> bytes:
    parts = []
    while (message := await receive()).get("more_body"):
        parts.append(message["body"])
    return b"".join([*parts, message.get("body", b"")])


async def start(send: Any, kind: bytes, length: int | None = None) -> None:
    headers = [(b"content-type", kind)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def chunk(send: Any, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def plain(receive: Any, send: Any) -> None:
    json.loads(await body_of(receive))
    await start(send, b"application/json", len(ANSWER))
    await chunk(send, ANSWER, more=False)


async def seen(receive: Any, send: Any) -> None:
    answer = SEEN[-1].encode()
    await start(send, b"text/plain", len(answer))
    await chunk(send, answer, more=False)


async def stream(receive: Any, send: Any) -> None:
    """One event per send and per turn of the loop, as tokens come; watches for the client leaving."""
    await body_of(receive)
    watch = asyncio.ensure_future(receive())
    await start(send, b"text/event-stream")
    for _ in range(NUM_EVENTS):
        await chunk(send, EVENT)
        await asyncio.sleep(0)
    await chunk(send, b"", more=False)
    watch.cancel()


async def watching(receive: Any, send: Any) -> None:
    """A slow answer whose handler also listens for the disconnect."""
    await body_of(receive)
    began = time.monotonic()
    told = asyncio.ensure_future(receive())
    try:
        done, _ = await asyncio.wait({told}, timeout=0.8)
        SEEN.append(f"told after {time.monotonic() - began:.2f} s" if done else "not told")
    except asyncio.CancelledError:
        SEEN.append(f"cancelled after {time.monotonic() - began:.2f} s")
        raise
    await start(send, b"text/plain", 0)
    await chunk(send, b"", more=False)


async def unwatching(receive: Any, send: Any) -> None:
    await body_of(receive)
    try:
        await asyncio.sleep(0.8)
        SEEN.append("ran to its end")
    except asyncio.CancelledError:
        SEEN.append("cancelled")
        raise
    await start(send, b"text/plain", 0)
    await chunk(send, b"", more=False)


async def cut_by_raising(receive: Any, send: Any) -> None:
    await cut_by_returning(receive, send)
    raise ConnectionAbortedError("the engine died")


async def cut_by_returning(receive: Any, send: Any) -> None:
    await body_of(receive)
    await start(send, b"text/event-stream")
    await chunk(send, EVENT)
    await asyncio.sleep(0.05)


async def done_in_one_send(receive: Any, send: Any) -> None:
    await cut_by_returning(receive, send)
    await chunk(send, DONE, more=False)


async def done_in_two_sends(receive: Any, send: Any) -> None:
    await cut_by_returning(receive, send)
    await chunk(send, DONE)
    await chunk(send, b"", more=False)


ROUTES = {
    "/plain": plain,
    "/stream": stream,
    "/seen": seen,
    "/watching": watching,
    "/unwatching": unwatching,
    "/cut-raising": cut_by_raising,
    "/cut-returning": cut_by_returning,
    "/done-one": done_in_one_send,
    "/done-two": done_in_two_sends,
}


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application on one route (Starlette takes an object with `__call__` as such)."""

    answer: Callable[[Any, Any], Any]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(receive, send)


def raw() -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await ROUTES[scope["path"]](receive, send)

    return app


def starlette(plain: Any = None, stream: Any = None) -> Any:
    """Starlette's routing with its Request and Response, and an own response for the stream; or as given."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        json.loads(await request.body())
        return Response(ANSWER, media_type="application/json")

    routes = [Route("/plain", plain or answer, methods=["POST"])]
    if stream:
        routes.append(Route("/stream", stream, methods=["POST"]))
    return Starlette(routes=routes + [Route(path, Endpoint(each)) for path, each in ROUTES.items()])


def starlette_streaming_response() -> Any:
    from starlette.requests import Request
    from starlette.responses import StreamingResponse

    async def events() -> AsyncIterator[bytes]:
        for _ in range(NUM_EVENTS):
            yield EVENT
            await asyncio.sleep(0)

    async def answer(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(events(), media_type="text/event-stream")

    return starlette(stream=answer)


def starlette_raw_endpoints() -> Any:
    """Starlette finds the route; the hot endpoint is an ASGI application, without Request and Response."""
    return starlette(plain=Endpoint(plain))


# ---- the servers ----


@dataclass
class Cork:
    """A transport that holds a response head until its first body bytes: uvicorn writes each by itself."""

    transport: Any
    loop: asyncio.AbstractEventLoop
    head: bytes = b""

    def write(self, data: bytes) -> None:
        if self.head:
            data, self.head = self.head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self.head = data
            self.loop.call_soon(self.flush)  # a head whose body is not there yet leaves all the same
            return
        self.transport.write(data)

    def flush(self) -> None:
        if self.head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self.transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


def corked_protocol() -> Any:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Corked(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(Cork(transport, self.loop))

    return Corked


def serve_uvicorn(app: str, port: int, http: Any = "httptools") -> None:
    import uvicorn

    uvicorn.run(globals()[app](), host=HOST, port=port, loop="uvloop", http=http, ws="none", access_log=False)


def serve_uvicorn_corked(app: str, port: int) -> None:
    serve_uvicorn(app, port, http=corked_protocol())


def serve_granian(app: str, port: int) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops

    Granian(
        target=f"asgi_servers:{app}",
        factory=True,
        address=HOST,
        port=port,
        interface=Interfaces.ASGINL,
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        workers=1,
    ).serve()


def serve_hypercorn(app: str, port: int) -> None:
    import uvloop
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"{HOST}:{port}"]
    uvloop.run(serve(globals()[app](), config))


async def aiohttp_chunks(request: Any, *chunks: bytes) -> Any:
    from aiohttp import web

    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    for data in chunks:
        await response.write(data)
        await asyncio.sleep(0)
    return response


async def aiohttp_slow(request: Any) -> Any:
    from aiohttp import web

    await request.read()
    began = time.monotonic()
    try:
        await asyncio.sleep(0.8)
        SEEN.append("ran to its end")
    except asyncio.CancelledError:
        SEEN.append(f"cancelled after {time.monotonic() - began:.2f} s")
        raise
    return web.Response()


async def aiohttp_answer(request: Any) -> Any:
    """Every route of `ROUTES`, in aiohttp's own manner; `/cut-raising` closes the transport."""
    from aiohttp import web

    path = request.path
    if path == "/plain":
        json.loads(await request.read())
        return web.Response(body=ANSWER, content_type="application/json")
    if path == "/seen":
        return web.Response(text=SEEN[-1])
    if path in ("/watching", "/unwatching"):
        return await aiohttp_slow(request)
    await request.read()
    if path == "/stream":
        return await aiohttp_chunks(request, *[EVENT] * NUM_EVENTS)
    response = await aiohttp_chunks(request, EVENT)
    await asyncio.sleep(0.05)
    if path == "/cut-raising":
        request.transport.close()
    elif path == "/done-one":
        await response.write_eof(DONE)
    elif path == "/done-two":
        await response.write(DONE)
        await response.write_eof()
    return response


def serve_aiohttp(app: str, port: int) -> None:
    import uvloop
    from aiohttp import web

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    application = web.Application()
    application.router.add_route("*", "/{path}", aiohttp_answer)
    web.run_app(application, host=HOST, port=port, access_log=None, print=None, handler_cancellation=True)


UVICORN = ("uvicorn", "httptools", "uvloop", "starlette")
CANDIDATES = {
    "uvicorn+starlette": Candidate(UVICORN, serve_uvicorn, "starlette"),
    "… StreamingResponse": Candidate(UVICORN, serve_uvicorn, "starlette_streaming_response"),
    "… raw endpoints": Candidate(UVICORN, serve_uvicorn, "starlette_raw_endpoints"),
    "… raw endpoints, corked": Candidate(UVICORN, serve_uvicorn_corked, "starlette_raw_endpoints"),
    "uvicorn+raw ASGI": Candidate(UVICORN[:3], serve_uvicorn, "raw"),
    "granian+starlette": Candidate(("granian", "uvloop", "starlette"), serve_granian, "starlette"),
    "granian+raw ASGI": Candidate(("granian", "uvloop"), serve_granian, "raw"),
    "aiohttp.web": Candidate(("aiohttp", "uvloop"), serve_aiohttp, ""),
    "hypercorn+starlette": Candidate(("hypercorn", "uvloop", "starlette"), serve_hypercorn, "starlette"),
}
