"""A stream's bytes as what its events hold, and how a stream may end. Pure; who reads the bytes is not known here."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from octoai import _answers, _gather, sse
from octoai.errors import ApiError, ApiTimeoutError, ResponseError, StreamError, StreamInterrupted
from octoai.wire.record import RawResponse, Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")
_DONE = b"[DONE]"


class EventReader(Generic[T]):
    """The body of a stream, as what its events hold. `queue` fills up; `done` once the answer is complete.

    `decode` makes a value of an event's data. Errors leave `feed` after everything before them is in the queue.
    """

    def __init__(self, decode: Callable[[bytes], T]) -> None:
        self.queue: deque[T] = deque()
        self.events: list[bytes] = []
        self.usage: Any = None
        self.done = False
        self.started = False
        self._ended = False
        self._decode = decode
        self._sse = sse.EventDecoder()
        self._decompress: Callable[[bytes], bytes] | None = None
        self._open: set[int] = set()
        self._finished: set[int] = set()

    def accepts(self, headers: Mapping[str, str]) -> bool:
        """Before any event: whether this is a stream at all."""
        if headers.get("content-encoding"):
            self._decompress = _answers.Decompressor(headers).feed
        return _answers.content_type(headers) not in ("application/json", "text/html")

    def feed(self, block: bytes) -> bool:
        """Whether the block held content."""
        before = len(self.events)
        try:
            events = self._sse.feed(self._decompress(block) if self._decompress else block)
        except ValueError as error:
            raise ResponseError(message=f"the stream cannot be read: {error}") from error
        for event in events:
            if self._take(event):
                break
        return len(self.events) > before

    def end(self) -> None:
        """The body ended as bodies do. Raises unless the answer did, too."""
        rest = self._sse.rest()
        if rest is not None and not self.done:
            try:
                self._take(rest)
            except ResponseError:
                raise self.interrupted("within an event") from None
        self._ended = True
        if not self.is_complete:
            raise self.interrupted("with neither a finish_reason nor [DONE]")

    def describe(self, error: ApiError, raw: RawResponse | None, attempts: int) -> None:
        """Say in an error what is known of the stream it happened in."""
        error.attempts = max(error.attempts, attempts)
        if isinstance(error, ApiTimeoutError):
            error.partial = self.partial
        if raw is not None and error.status_code is None:
            error.headers = error.headers or dict(raw.headers)

    def interrupted(self, how: str) -> StreamInterrupted:
        return StreamInterrupted(partial=self.partial, message=f"the stream ended {how}", retryable=True)

    @property
    def partial(self) -> str:
        """The text of the first choice so far."""
        return _gather.text_of(self.events)

    @property
    def is_complete(self) -> bool:
        """`[DONE]` came, or every choice finished and the body ended."""
        return self.done or (self._ended and bool(self._finished) and self._open <= self._finished)

    def _take(self, event: sse.Event) -> bool:
        """Whether this was the last event that matters."""
        data, name = event
        if data[:1] != b"{":  # nearly every event is an object
            if data.strip() == _DONE:
                self.done = True
                return True
            if not data.strip():
                return False
        if b'"error"' in data or name == "error":
            self._refuse_error(data, name)
        value = self._decode(data)
        self.events.append(data)
        if self._note(value):
            self.queue.append(value)
        return False

    def _refuse_error(self, data: bytes, name: str) -> None:
        body = _answers.json_or_text(data)
        is_error = isinstance(body, dict) and (body.get("error") or body.get("object") == "error")
        if is_error or name == "error":
            error = StreamError(body=body, partial=self.partial)
            error.message = f"the service reported an error in the stream: {error.message or body}"
            raise error

    def _note(self, value: Any) -> bool:
        """Whether the user gets to see it."""
        return True


class ChunkReader(EventReader[R]):
    """A stream of typed chunks. One without choices only carries usage, which is kept; it is not shown, because every
    published loop reads `choices[0]`."""

    def __init__(self, model: type[R]) -> None:
        super().__init__(self._validated)
        self._model = model
        self._validate = model.model_validate_json

    def _validated(self, data: bytes) -> R:
        try:
            return self._validate(data)
        except ValidationError as error:
            message = f"an event of the stream is not a {self._model.__name__}: {_answers.first_fault(error)}"
            raise ResponseError(body=data.decode(errors="replace"), message=message) from error

    def _note(self, value: Any) -> bool:
        if value.usage is not None:
            self.usage = value.usage
        choices = value.choices
        for choice in choices:
            self._open.add(choice.index)
            if choice.finish_reason is not None:
                self._finished.add(choice.index)
        if not self.started:
            self.started = any(_has_content(choice) for choice in choices)
        return bool(choices)


class JsonReader(EventReader[Any]):
    """A stream of whatever JSON an endpoint sends, each event through the user's own function.

    Such a stream may end without `[DONE]`, unless its events are chunks of a completion, which say when they end."""

    def __init__(self, map_fn: Callable[[Any], Any] | None = None) -> None:
        super().__init__(self._parsed)
        self._map = map_fn
        self.started = True

    def end(self) -> None:
        if self._open:
            super().end()

    def _parsed(self, data: bytes) -> Any:
        try:
            value = json.loads(data)
        except ValueError as error:
            body = data.decode(errors="replace")
            raise ResponseError(body=body, message=f"an event of the stream is not JSON: {error}") from error
        if isinstance(value, dict) and isinstance(value.get("choices"), list):
            for choice in value["choices"]:
                if isinstance(choice, dict):
                    index = choice["index"] if isinstance(choice.get("index"), int) else 0
                    self._open.add(index)
                    if choice.get("finish_reason") is not None:
                        self._finished.add(index)
        return value if self._map is None else self._map(value)


def text_of_chunk(chunk: Any) -> str:
    """The text for the first choice in a chunk of either kind."""
    for choice in chunk.choices:
        if choice.index == 0:
            delta = getattr(choice, "delta", None)
            return (choice.text if delta is None else delta.content) or ""
    return ""


def _has_content(choice: Any) -> bool:
    if choice.finish_reason is not None:
        return True
    delta = getattr(choice, "delta", None)
    return bool(choice.text) if delta is None else any(value for name, value in delta if name != "role")
