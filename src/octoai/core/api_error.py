"""Historical place of `ApiError`."""

from octoai.errors import ApiError

__all__ = ["ApiError"]
