"""A user's `httpx` client in the wrapping the original SDK had: `.httpx_client` is the client itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from octoai.core.remove_none_from_dict import remove_none_from_dict

__all__ = ["AsyncHttpClient", "HttpClient"]


# The original's numbers, for code that names them. What is done now is in `octoai._retry`.
INITIAL_RETRY_DELAY_SECONDS = 0.5
MAX_RETRY_DELAY_SECONDS = 10
MAX_RETRY_DELAY_SECONDS_FROM_HEADER = 30


def _arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("headers"):
        kwargs["headers"] = remove_none_from_dict(kwargs["headers"])
    return kwargs


class HttpClient:
    def __init__(self, *, httpx_client: Any) -> None:
        self.httpx_client = httpx_client

    def request(self, method: str, url: str, **kwargs: Any) -> Any:
        return self.httpx_client.request(method, url, **_arguments(kwargs))

    @contextmanager
    def stream(self, method: str, url: str, **kwargs: Any) -> Iterator[Any]:
        with self.httpx_client.stream(method, url, **_arguments(kwargs)) as response:
            yield response


class AsyncHttpClient:
    def __init__(self, *, httpx_client: Any) -> None:
        self.httpx_client = httpx_client

    async def request(self, method: str, url: str, **kwargs: Any) -> Any:
        return await self.httpx_client.request(method, url, **_arguments(kwargs))

    @asynccontextmanager
    async def stream(self, method: str, url: str, **kwargs: Any) -> AsyncIterator[Any]:
        async with self.httpx_client.stream(method, url, **_arguments(kwargs)) as response:
            yield response
