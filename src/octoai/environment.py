"""Where the service is, in the original SDK's words.

The addresses of `PRODUCTION` and `SECURE_LINK` died with the hosted service. Both names remain, and mean the
endpoint that is configured: `OCTOAI_BASE_URL`, else the credentials file, else the service on this machine.
"""

from __future__ import annotations

from octoai import _credentials

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

__all__ = ["OctoAIEnvironment"]


class OctoAIEnvironment:
    """The base URLs of a service. Only `text_gen` is used: `default` and `image_gen` are kept for old code."""

    PRODUCTION: ClassVar[OctoAIEnvironment]
    SECURE_LINK: ClassVar[OctoAIEnvironment]

    def __init__(self, *, default: str, image_gen: str, text_gen: str) -> None:
        self.default = default
        self.image_gen = image_gen
        self.text_gen = text_gen

    def __repr__(self) -> str:
        return f"OctoAIEnvironment(text_gen={self.text_gen!r})"


class _ConfiguredEnvironment(OctoAIEnvironment):
    """Asks for the configured endpoint whenever it is read."""

    def __init__(self) -> None:
        """Nothing to set: the attributes are looked up."""

    def __getattr__(self, name: str) -> str:
        if name not in ("default", "image_gen", "text_gen"):
            raise AttributeError(name)
        return _credentials.configured_endpoint()


OctoAIEnvironment.PRODUCTION = _ConfiguredEnvironment()
OctoAIEnvironment.SECURE_LINK = _ConfiguredEnvironment()
