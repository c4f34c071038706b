"""`OctoAI` and `AsyncOctoAI`: what users make. Light to make: everything else is imported at the first call.

The two have the same methods. What a call does is in `_sync` and `_async`."""

from __future__ import annotations

from octoai._deadlines import DEFAULT_TIMEOUT, Timeout
from octoai._settings import Settings, checked_client
from octoai.environment import OctoAIEnvironment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from functools import cached_property
    from types import TracebackType
    from typing import Any, Self, TypeVar

    from octoai._async import AsyncJsonStream, AsyncTextGenClient
    from octoai._async import Shell as AsyncShell
    from octoai._sync import JsonStream, Shell, TextGenClient
    from octoai._transport import AsyncTransport, Transport
    from octoai.wire.inference import InferenceFuture

    _C = TypeVar("_C")
else:

    class cached_property:
        """As in `functools`, which takes half as long to import as all of this. Users may set what it makes."""

        def __init__(self, make: Callable[[Any], Any]) -> None:
            self._make = make
            self.__doc__ = make.__doc__

        def __get__(self, client: object | None, _: type) -> Any:
            return self if client is None else vars(client).setdefault(self._make.__name__, self._make(client))


__all__ = ["AsyncOctoAI", "DEFAULT_HEALTH_CHECK_TIMEOUT_SECONDS", "InferenceFuture", "OctoAI"]

DEFAULT_HEALTH_CHECK_TIMEOUT_SECONDS = 900.0
# What the original's module had besides, because it imported it.
_HISTORICAL = {
    "AsyncBaseOctoAI": "octoai.base_client",
    "AsyncTextGenClient": "octoai.text_gen.client",
    "BaseOctoAI": "octoai.base_client",
    "TextGenClient": "octoai.text_gen.client",
    "retry": "octoai.util",
}


def __getattr__(name: str) -> Any:
    if name == "InferenceFuture":
        from octoai.wire.inference import InferenceFuture

        return InferenceFuture
    if name in _HISTORICAL:
        from importlib import import_module

        return getattr(import_module(_HISTORICAL[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class OctoAI:
    """A client of the service. Every argument is optional:

    - `api_key`: the token, or a callable that is asked for it at every request. Otherwise `OCTOAI_TOKEN` (or
      `OCTOAI_API_TOKEN`, `OCTOAI_API_KEY`) as it is now, otherwise the credentials file, whose token is only ever
      sent to the endpoint in the same file.
    - `base_url`: the service, with or without `/v1`. Otherwise an `environment` of your own, `OCTOAI_BASE_URL` (or
      `OCTOAI_API_BASE`), the credentials file, `http://127.0.0.1:8000`.
    - `timeout`: an `octoai.Timeout`; a number of seconds `t`: connect within `min(t, 10)`, no single wait longer than
      `t`; None: wait for ever. By default a slow first token has ten minutes, a connection ten seconds.
    - `max_retries`: how often a request is sent again before its first byte of an answer, after connection errors,
      408, 409, 429 and 5xx.
    - `default_headers`: sent with every request; None as a value leaves a header out.
    - `httpx_client`: your own `httpx.Client` or `httpx2.Client`. You close it. Such a client's patience is fixed for a
      whole request: total silence in mid-stream ends after the shorter of `read` and `first_token`, not after `idle`,
      the wait for a head that drips not at `total`, and no wait by closing the stream. So it is behind a proxy.
    - `transport`: for tests, anything with `send` and `close` as in `octoai._transport.Transport`.
    - `follow_redirects`: ignored, as old code may pass it. Redirects are followed where that is safe.
    """

    def __init__(  # noqa: PLR0913  # each is one that users name
        self,
        *,
        environment: OctoAIEnvironment = OctoAIEnvironment.PRODUCTION,
        api_key: str | Callable[[], str | None] | None = None,
        timeout: float | Timeout | None = DEFAULT_TIMEOUT,
        httpx_client: Any = None,
        base_url: str | None = None,
        max_retries: int = 2,
        default_headers: Mapping[str, Any] | None = None,
        transport: Transport | None = None,
        follow_redirects: bool | None = None,
    ) -> None:
        self._settings = Settings(
            environment=environment,
            api_key=api_key,
            timeout=timeout,
            httpx_client=checked_client(httpx_client, is_async=False),
            base_url=base_url,
            max_retries=max_retries,
            default_headers=default_headers,
            transport=transport,
        )

    @property
    def base_url(self) -> str:
        """The service this client talks to, without `/v1`."""
        return self._settings.access.base_url

    @cached_property
    def text_gen(self) -> TextGenClient:
        from octoai._sync import TextGenClient

        return TextGenClient(self._shell)

    def infer(self, endpoint_url: str, inputs: Any) -> Any:
        """POST `inputs` as JSON to any endpoint; its answer's JSON."""
        return self._shell.infer(endpoint_url, inputs)

    def infer_stream(self, endpoint_url: str, inputs: Any, map_fn: Callable[[Any], Any] | None = None) -> JsonStream:
        """POST `inputs` and iterate over the events of the answer. `inputs` must ask for a stream itself."""
        return self._shell.infer_stream(endpoint_url, inputs, map_fn)

    def infer_async(self, endpoint_url: str, inputs: Any) -> InferenceFuture:
        """Start an inference on the service and come back for its result later."""
        return self._shell.infer_async(endpoint_url, inputs)

    def is_future_ready(self, future: InferenceFuture) -> bool:
        """Whether its result can be fetched. Raises if the inference failed."""
        return self._shell.response_url(future) is not None

    def get_future_result(self, future: InferenceFuture) -> Any:
        """The JSON it resulted in; None while it is not ready."""
        return self._shell.future_result(future)

    def health_check(self, endpoint_url: str, timeout: float = DEFAULT_HEALTH_CHECK_TIMEOUT_SECONDS) -> int:
        """Ask every second until the answer is no 5xx or `timeout` seconds are over. Its status, if below 400."""
        return self._shell.health_check(endpoint_url, timeout)

    def close(self) -> None:
        """Close the kept connections. The client opens new ones if it is used again."""
        shell: Shell | None = self.__dict__.get("_open_shell")
        if shell is not None:
            shell.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _shell(self) -> Shell:
        shell: Shell | None = self.__dict__.get("_open_shell")
        if shell is None:
            from octoai._sync import Shell

            shell = self.__dict__.setdefault("_open_shell", Shell(self._settings))
        return shell

    def __repr__(self) -> str:
        return _shown(self, self._settings)

    def __getstate__(self) -> dict[str, Any]:
        return _without_connections(self)

    def __copy__(self) -> Self:
        return _copied(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return _copied(self)


class AsyncOctoAI:
    """As `OctoAI`, for `asyncio`; the arguments mean the same. A callable `api_key` may be a coroutine function, and
    `httpx_client` is an `httpx.AsyncClient` or `httpx2.AsyncClient`. One client may serve several event loops."""

    def __init__(  # noqa: PLR0913  # each is one that users name
        self,
        *,
        environment: OctoAIEnvironment = OctoAIEnvironment.PRODUCTION,
        api_key: str | Callable[[], str | Awaitable[str | None] | None] | None = None,
        timeout: float | Timeout | None = DEFAULT_TIMEOUT,
        httpx_client: Any = None,
        base_url: str | None = None,
        max_retries: int = 2,
        default_headers: Mapping[str, Any] | None = None,
        transport: AsyncTransport | None = None,
        follow_redirects: bool | None = None,
    ) -> None:
        self._settings = Settings(
            environment=environment,
            api_key=api_key,
            timeout=timeout,
            httpx_client=checked_client(httpx_client, is_async=True),
            base_url=base_url,
            max_retries=max_retries,
            default_headers=default_headers,
            transport=transport,
        )

    @property
    def base_url(self) -> str:
        """The service this client talks to, without `/v1`."""
        return self._settings.access.base_url

    @cached_property
    def text_gen(self) -> AsyncTextGenClient:
        from octoai._async import AsyncTextGenClient

        return AsyncTextGenClient(self._shell)

    async def infer(self, endpoint_url: str, inputs: Any) -> Any:
        """POST `inputs` as JSON to any endpoint; its answer's JSON."""
        return await self._shell.infer(endpoint_url, inputs)

    def infer_stream(
        self, endpoint_url: str, inputs: Any, map_fn: Callable[[Any], Any] | None = None
    ) -> AsyncJsonStream:
        """POST `inputs` and iterate (`async for`) over the events of the answer. `inputs` must ask for a stream."""
        return self._shell.infer_stream(endpoint_url, inputs, map_fn)

    async def infer_async(self, endpoint_url: str, inputs: Any) -> InferenceFuture:
        """Start an inference on the service and come back for its result later."""
        return await self._shell.infer_async(endpoint_url, inputs)

    async def is_future_ready(self, future: InferenceFuture) -> bool:
        """Whether its result can be fetched. Raises if the inference failed."""
        return await self._shell.response_url(future) is not None

    async def get_future_result(self, future: InferenceFuture) -> Any:
        """The JSON it resulted in; None while it is not ready."""
        return await self._shell.future_result(future)

    async def health_check(self, endpoint_url: str, timeout: float = DEFAULT_HEALTH_CHECK_TIMEOUT_SECONDS) -> int:
        """Ask every second until the answer is no 5xx or `timeout` seconds are over. Its status, if below 400."""
        return await self._shell.health_check(endpoint_url, timeout)

    async def close(self) -> None:
        """Close the connections of the running event loop. The client opens new ones if it is used again."""
        shell: AsyncShell | None = self.__dict__.get("_open_shell")
        if shell is not None:
            await shell.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _shell(self) -> AsyncShell:
        shell: AsyncShell | None = self.__dict__.get("_open_shell")
        if shell is None:
            from octoai._async import Shell

            shell = self.__dict__.setdefault("_open_shell", Shell(self._settings))
        return shell

    def __repr__(self) -> str:
        return _shown(self, self._settings)

    def __getstate__(self) -> dict[str, Any]:
        return _without_connections(self)

    def __copy__(self) -> Self:
        return _copied(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return _copied(self)


def _shown(client: object, settings: Settings) -> str:
    token = "set" if settings.access.token else "none"
    return f"{type(client).__name__}(base_url={settings.access.base_url!r}, token={token})"


def _without_connections(client: object) -> dict[str, Any]:
    state = dict(vars(client))
    shell = state.pop("_open_shell", None)
    if shell is not None and getattr(state.get("text_gen"), "_shell", None) is shell:  # no stand-in of a user's
        del state["text_gen"]
    return state


def _copied(client: _C) -> _C:
    """The same settings, connections of its own. A user's own HTTP client and callables are shared."""
    copy = type(client).__new__(type(client))
    copy.__dict__.update(_without_connections(client))
    return copy
