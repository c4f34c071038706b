"""The base classes of the original SDK's clients. Here a client has no base: these are the clients themselves."""

from octoai.client import AsyncOctoAI as AsyncBaseOctoAI
from octoai.client import OctoAI as BaseOctoAI

__all__ = ["AsyncBaseOctoAI", "BaseOctoAI"]
