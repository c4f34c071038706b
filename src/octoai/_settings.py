"""What a client was made with. Values only: copied and pickled as they are, connections are not among them."""

from __future__ import annotations

from octoai import _credentials
from octoai._deadlines import Timeout
from octoai.environment import OctoAIEnvironment, _ConfiguredEnvironment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class Settings:
    """Checked when the client is made, so that a mistake shows there and not in the first call."""

    __slots__ = ("access", "default_headers", "httpx_client", "max_retries", "timeout", "transport")

    def __init__(
        self,
        *,
        environment: OctoAIEnvironment,
        api_key: Any,
        timeout: Any,
        httpx_client: Any,
        base_url: str | None,
        max_retries: int,
        default_headers: Mapping[str, Any] | None,
        transport: Any,
    ) -> None:
        if api_key is not None and not isinstance(api_key, str) and not callable(api_key):
            raise TypeError(f"api_key must be a string or a callable, not {type(api_key).__name__}")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise TypeError(f"max_retries must be a whole number, 0 or more, not {max_retries!r}")
        if not isinstance(environment, OctoAIEnvironment):
            raise TypeError(f"environment must be an OctoAIEnvironment, not {type(environment).__name__}")
        # The constants stand for "as configured"; an environment of the user's own names its address.
        if not base_url and not isinstance(environment, _ConfiguredEnvironment):
            base_url = environment.text_gen
            if not base_url:
                raise TypeError("environment.text_gen must be the address of a service where base_url gives none")
        self.access = _credentials.resolve(base_url=base_url, token=api_key)
        self.timeout = Timeout.of(timeout)
        self.max_retries = max_retries
        self.default_headers = dict(default_headers or {})
        self.httpx_client = httpx_client
        self.transport = transport


def checked_client(httpx_client: Any, *, is_async: bool) -> Any:
    """The user's own HTTP client, if it is of the right kind."""
    kind = type(httpx_client)
    if hasattr(kind, "send") and hasattr(kind, "aclose") != is_async:
        ours, right = ("AsyncOctoAI", "AsyncClient") if is_async else ("OctoAI", "Client")
        raise TypeError(f"httpx_client: {ours} takes an httpx.{right}, not {kind.__name__}")
    return httpx_client
