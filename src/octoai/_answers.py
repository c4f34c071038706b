"""What came back, as objects and errors. Pure: bytes in, values out; who reads the bytes is not known here."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from octoai import _retry
from octoai.errors import ApiError, ResponseError, status_class
from octoai.wire import lenient
from octoai.wire.record import Answer, RawResponse, Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")


def status_error(raw: RawResponse, *, advice: str | None, now: float) -> ApiError:
    """The error that an answer with a status of 300 or more is. `advice` goes behind what the service said. `now`: the
    time of day, for dates in headers."""
    body = json_or_text(raw.body)
    error = status_class(raw.status_code)(
        status_code=raw.status_code,
        body=body,
        headers=raw.headers,
        retryable=_retry.is_retryable(raw.status_code, raw.headers),
        retry_after=_retry.retry_after(raw.headers, now),
    )
    if advice is not None:
        said = (error.message or "the service wants a token that it knows").rstrip(".")
        error.message = f"{said}. {advice}"
    elif 300 <= raw.status_code < 400:
        error.message = f"the service redirects to {raw.headers.get('location')}, which is not followed"
    elif type(error) is not ApiError:
        error.message = error.message or f"the service answered {raw.status_code}"
    return error


def parsed_json(raw: RawResponse) -> Any:
    try:
        return json.loads(raw.body)
    except ValueError as error:
        raise _not_understood(raw, f"the answer is not JSON: {error}") from error


def record(model: type[R], raw: RawResponse) -> R:
    """The whole answer as the model, with the HTTP answer attached where it remembers one."""
    try:
        answer = model.model_validate_json(raw.body)
    except ValidationError as error:
        near = nearly(model, raw.body)
        if near is None or not getattr(near, "choices", None):
            fault = ApiError(body=json_or_text(raw.body)).message or first_fault(error)
            raise _not_understood(raw, f"the answer is not a {model.__name__}: {fault}") from error
        answer = near
    if isinstance(answer, Answer):
        answer.attach(raw, request_id(raw.headers))
    return answer


def nearly(model: type[R], body: bytes, *, in_stream: bool = False) -> R | None:
    """What is wrong only in details, as the model; None where it is nothing of the kind. In a stream, usage may come
    without choices."""
    if "choices" not in model.model_fields:
        return None
    try:
        value = json.loads(body)
        if in_stream and isinstance(value, dict) and isinstance(value.get("usage"), dict):
            value["choices"] = [] if value.get("choices") is None else value["choices"]
        return lenient.read(model, value)
    except (ValueError, RecursionError):
        return None


def no_stream(raw: RawResponse) -> ResponseError:
    """The error that a whole answer in place of a stream is."""
    said = ApiError(body=json_or_text(raw.body)).message
    tail = f": {said}" if said else ""
    return _not_understood(raw, f"the answer is {content_type(raw.headers)}, not an event stream{tail}")


def response_url(raw: RawResponse) -> str | None:
    """Where the result of an asynchronous inference is; None while there is none. Raises if there never will be."""
    state = parsed_json(raw)
    status = state.get("status") if isinstance(state, dict) else None
    if status is None or status in ("failed", "error", "cancelled", "canceled", "expired"):
        message = f"the inference will not complete: its status is {status!r}"
        raise ResponseError(status_code=raw.status_code, body=state, headers=raw.headers, message=message)
    if status != "completed":
        return None
    url = state.get("response_url")
    if not url or not isinstance(url, str):
        raise _not_understood(raw, "the inference is completed, but its response_url, where the result is, is missing")
    return url


def request_id(headers: Mapping[str, str]) -> str | None:
    return headers.get("x-request-id") or headers.get("x-user-request-id")


class Decompressor:
    """For a service that compresses although it was asked not to."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        coding = headers.get("content-encoding", "").strip().lower()
        self._compresses = coding in ("gzip", "deflate", "x-gzip")
        self._zlib: Any = None
        self._start = b""

    def feed(self, block: bytes) -> bytes:
        if not self._compresses:
            return block
        parts: list[bytes] = []
        try:
            while block:
                if self._zlib is None:
                    block, self._start = self._start + block, b""
                    if len(block) < len(_GZIP):
                        self._start = block
                        break
                    self._zlib = zlib.decompressobj(_window_bits(block))
                parts.append(self._zlib.decompress(block))
                block = self._zlib.unused_data.lstrip(b"\0")
                if not block.startswith(_GZIP[:1]):
                    break
                self._zlib = None  # another member follows
        except zlib.error as error:
            raise ValueError(f"its compression is damaged: {error}") from error
        return b"".join(parts)

    @property
    def is_cut(self) -> bool:
        """At the end of the body: whether there should have been more of it."""
        return bool(self._start) or (self._zlib is not None and not self._zlib.eof)

    def end(self) -> None:
        if self.is_cut:
            raise ValueError("its compression is not complete")


_GZIP = b"\x1f\x8b"


def _window_bits(start: bytes) -> int:
    """What zlib is to expect: gzip or zlib, as it finds, or bare deflate, which some services mean by that name."""
    has_head = start.startswith(_GZIP) or (start[0] & 15 == 8 and (start[0] * 256 + start[1]) % 31 == 0)
    return 47 if has_head else -15


def json_or_text(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace")


def content_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _not_understood(raw: RawResponse, message: str) -> ResponseError:
    return ResponseError(status_code=raw.status_code, body=json_or_text(raw.body), headers=raw.headers, message=message)


def first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, fault["loc"]))
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])
