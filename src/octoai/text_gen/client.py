"""The clients of text generation, at their historical place. They come as `client.text_gen`."""

from octoai._async import AsyncTextGenClient
from octoai._calls import OMIT
from octoai._sync import TextGenClient

__all__ = ["AsyncTextGenClient", "OMIT", "TextGenClient"]
