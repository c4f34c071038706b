"""Historical place of `InternalServerError`."""

from octoai.errors import InternalServerError

__all__ = ["InternalServerError"]
