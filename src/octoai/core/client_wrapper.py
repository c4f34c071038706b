"""A token, an environment and an HTTP client together, as the original SDK handed them around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octoai.core.http_client import AsyncHttpClient, HttpClient
from octoai.environment import OctoAIEnvironment
from octoai.version import __version__

__all__ = ["AsyncClientWrapper", "BaseClientWrapper", "SyncClientWrapper"]


class BaseClientWrapper:
    def __init__(
        self,
        *,
        api_key: str | Callable[[], str | None] | None = None,
        environment: OctoAIEnvironment = OctoAIEnvironment.PRODUCTION,
        timeout: float | None = None,
    ) -> None:
        self._api_key = api_key
        self._environment = environment
        self._timeout = timeout

    def get_headers(self) -> dict[str, str]:
        headers = {
            "X-Fern-Language": "Python",
            "X-Fern-SDK-Name": "octoai",
            "X-Fern-SDK-Version": __version__,
        }
        api_key = self._get_api_key()
        return {**headers, "Authorization": f"Bearer {api_key}"} if api_key else headers

    def get_environment(self) -> OctoAIEnvironment:
        return self._environment

    def get_timeout(self) -> float | None:
        return self._timeout

    def _get_api_key(self) -> str | None:
        """Asked each time: tokens change."""
        return self._api_key() if callable(self._api_key) else self._api_key


class SyncClientWrapper(BaseClientWrapper):
    def __init__(self, *, httpx_client: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.httpx_client = HttpClient(httpx_client=httpx_client)


class AsyncClientWrapper(BaseClientWrapper):
    def __init__(self, *, httpx_client: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.httpx_client = AsyncHttpClient(httpx_client=httpx_client)
