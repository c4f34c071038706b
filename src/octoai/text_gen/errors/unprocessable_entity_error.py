"""Historical place of `UnprocessableEntityError`."""

from octoai.errors import UnprocessableEntityError

__all__ = ["UnprocessableEntityError"]
