"""The two errors of text generation that the original SDK had, at their historical place."""

from octoai.errors import InternalServerError, UnprocessableEntityError

__all__ = ["InternalServerError", "UnprocessableEntityError"]
