"""Small helpers of the original SDK: files as base64, and sending until it works."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import Any, TypeVar

    Response = TypeVar("Response")

__all__ = ["from_file", "retry", "to_file"]


def to_file(data: Any, file_name: str | os.PathLike[str]) -> None:
    """Write base64 text, or the image or video in an object of that kind, as the bytes it stands for."""
    import base64

    text = next((value for name in ("image_b64", "video") if (value := getattr(data, name, None))), data)
    encoded = text.encode() if isinstance(text, str) else bytes(text)
    content = base64.b64decode(b"".join(encoded.split()), validate=True)
    with open(file_name, "wb") as opened:
        opened.write(content)


def from_file(file_name: str | os.PathLike[str]) -> str:
    """The content of a file as base64 text."""
    import base64

    with open(file_name, "rb") as opened:
        return base64.b64encode(opened.read()).decode()


def retry(
    fn: Callable[[], Response],
    retry_count: int = 5,
    interval: float = 1.0,
    exp_backoff: float = 2.0,
    jitter: float = 1.0,
    maximum_backoff: float = 30.0,
) -> Response:
    """Call `fn` until its answer's `status_code` is neither 429 nor 5xx, at most `retry_count` times; its last answer.

    Waits `interval` seconds, then `exp_backoff` times as long each time, up to `maximum_backoff`, plus up to `jitter`.
    """
    import random

    for attempt in range(retry_count - 1):
        answer = fn()
        status: int = answer.status_code  # type: ignore[attr-defined]  # httpx's, or anything like it
        if status != 429 and status < 500:
            return answer
        wait = min(interval * exp_backoff**attempt, maximum_backoff)
        time.sleep(wait + random.uniform(0, jitter))  # noqa: S311  # jitter, no secret
    return fn()
