"""What a client was made with. Values only: copied and pickled as they are, connections are not among them."""

from __future__ import annotations

from octoai import _credentials
from octoai._deadlines import Timeout
from octoai.environment import _ConfiguredEnvironment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from octoai.environment import OctoAIEnvironment


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
        # The constants stand for "as configured"; an environment of the user's own names its address.
        own = None if isinstance(environment, _ConfiguredEnvironment) else getattr(environment, "text_gen", None)
        if not own and not isinstance(environment, _ConfiguredEnvironment):
            kind = type(environment).__name__
            raise TypeError(f"environment must be an OctoAIEnvironment, with an address as text_gen, not {kind}")
        self.access = _credentials.resolve(base_url=base_url or own, token=api_key)
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
