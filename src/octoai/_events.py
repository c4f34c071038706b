"""A stream's bytes as what its events hold, and how a stream may end. Pure; who reads the bytes is not known here."""

from __future__ import annotations

import enum
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

from pydantic import ValidationError

from octoai import _answers, _gather, sse
from octoai.errors import ApiError, ApiTimeoutError, ResponseError, StreamError, StreamInterrupted
from octoai.wire.record import RawResponse, Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")
CLOSED = "early: it was closed before all of it was read"
_DONE = b"[DONE]"
_OF_CHOICES = frozenset({"delta", "finish_reason", "message", "text"})  # other endpoints' choices are something else
_OF_ERRORS = frozenset({"code", "detail", "error", "message", "object", "reason", "status", "type"})
_LF = ord("\n")  # `in` takes several times as long to find bytes in bytes


class Nothing(enum.Enum):
    """What `take` gives when there is no value; None may be one."""

    NOTHING = "nothing"


NOTHING: Final = Nothing.NOTHING


class EventReader(Generic[T]):
    """The body of a stream, as what its events hold: bytes in by `feed`, values out by `take`.

    An event is decoded when its turn comes: hundreds of objects made at once and kept cost about twice as much as
    the same ones made and forgotten one after the other. `done` once the answer is complete; `moved` when a value was
    decoded, until whoever minds the deadlines has seen it.
    """

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.done = False
        self.started = False
        self.moved = False
        self._waiting: deque[bytes] = deque()
        self._ready: deque[T] = deque()
        self._failure: Exception | None = None
        self._usage: Any = None
        self._ended = False
        self._foreign = False
        self._sse = sse.EventDecoder()
        self._compression: _answers.Decompressor | None = None
        self._open: set[int] = set()
        self._finished: set[int] = set()

    def accepts(self, headers: Mapping[str, str]) -> bool:
        """Before any event: whether this is a stream at all."""
        if headers.get("content-encoding"):
            self._compression = _answers.Decompressor(headers)
        return _answers.content_type(headers) not in ("application/json", "text/html")

    def feed(self, block: bytes) -> bool:
        """Whether the block completed an event."""
        try:
            texts = self._sse.split(self._compression.feed(block) if self._compression else block)
        except ValueError as error:
            raise ResponseError(message=f"the stream cannot be read: {error}") from error
        self._waiting.extend(texts)
        return bool(texts)

    def take(self) -> T | Nothing:
        """The next value of those that have come. Raises what its event means, if that is an error."""
        if self._ready:
            return self._ready.popleft()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        waiting = self._waiting
        while waiting:
            text = waiting.popleft()
            # Nearly every event is a single line with an object, and not even the word is in it.
            if text.startswith(b"data: {") and _LF not in text and text.find(b'"error"') < 0:
                value = self._value(text[6:])
            else:
                value = self._value_of_unusual(self._parsed(text))
            if value is not NOTHING:
                return value
        return NOTHING

    def end(self) -> bool:
        """The body ended as bodies do. Whether nothing is left to take; what is left ends with an error, unless the
        answer is complete."""
        rest = None if self.done else self._parsed(self._sse.rest())
        if rest is not None:
            try:
                value = self._value_of_unusual(rest)
            except ResponseError:
                self._failure = self.interrupted("within an event")
                return False
            if value is not NOTHING:
                self._ready.append(value)
        self._ended = True
        self._failure = self._missing()
        return self._failure is None and not self._ready

    def has_unread(self) -> bool:
        """Whether anything that has come was not taken, or something is still to come."""
        self._look_ahead()
        return bool(self._ready) or not self.done

    def drop(self) -> None:
        """Forget what was not taken."""
        self._waiting.clear()
        self._ready.clear()

    def describe(self, error: ApiError, raw: RawResponse | None, attempts: int) -> None:
        """Say in an error what is known of the stream it happened in."""
        error.attempts = max(error.attempts, attempts)
        if isinstance(error, ApiTimeoutError | ResponseError):
            error.partial = self.partial
        if raw is not None and error.status_code is None:
            error.headers = error.headers or dict(raw.headers)

    def interrupted(self, how: str) -> StreamInterrupted:
        return StreamInterrupted(partial=self.partial, message=f"the stream ended {how}", retryable=True)

    @property
    def usage(self) -> Any:
        """The last that was said of it in what has come, taken or not."""
        self._look_ahead()
        return self._usage

    @property
    def partial(self) -> str:
        """The text of the first choice so far."""
        return _gather.text_of(self.events)

    @property
    def is_complete(self) -> bool:
        """`[DONE]` came, or every choice finished and the body ended."""
        return self.done or (self._ended and bool(self._finished) and self._open <= self._finished)

    def _missing(self) -> ApiError | None:
        """At the end of the body: what the answer lacks, as an error."""
        return None if self.is_complete else self.interrupted("with neither a finish_reason nor [DONE]")

    def _look_ahead(self) -> None:
        """Decode all that has come. An error in it keeps its place."""
        if not self._waiting:
            return
        ready: deque[T] = deque()
        try:
            while (value := self.take()) is not NOTHING:
                ready.append(value)
        except Exception as error:  # noqa: BLE001  # also the user's function's: it is raised at its turn
            self._failure = error
            self._waiting.clear()
        self._ready = ready

    def _parsed(self, text: bytes) -> sse.Event | None:
        event = sse.parsed(text)
        if event is None:
            self._foreign = self._foreign or sse.is_foreign(text)
        return event

    def _value_of_unusual(self, event: sse.Event | None) -> T | Nothing:
        """An event of any shape: a comment, the end, an error, or data after all."""
        data = b"" if event is None else event.data
        if data.strip() == _DONE:
            self.done = True
            self._waiting.clear()
            return NOTHING
        if event is None or not data.strip():
            return NOTHING
        if b'"error"' in data or event.name == "error":
            self._refuse_error(data, event.name)
        return self._value(data)

    def _refuse_error(self, data: bytes, name: str) -> None:
        body = _answers.json_or_text(data)
        if name == "error" or (isinstance(body, dict) and self._is_error(body)):
            error = StreamError(body=body, partial=self.partial)
            error.message = f"the service reported an error in the stream: {error.message or body}"
            raise error

    def _is_error(self, body: dict[str, Any]) -> bool:
        return bool(body.get("error")) or body.get("object") == "error"

    def _value(self, data: bytes) -> T | Nothing:
        """What the user gets of an event's data, if anything. What it says of the stream is noted."""
        raise NotImplementedError


class ChunkReader(EventReader[R]):
    """A stream of typed chunks. One without choices only carries usage, which is kept; it is not shown, because every
    published loop reads `choices[0]`."""

    def __init__(self, model: type[R]) -> None:
        super().__init__()
        self._model = model
        model.model_rebuild()  # makes its validator at the first use
        self._validate = model.__pydantic_validator__.validate_json

    def _value(self, data: bytes) -> R | Nothing:
        try:
            chunk: Any = self._validate(data)
        except ValidationError as error:
            chunk = _answers.nearly(self._model, data, in_stream=True)
            if chunk is None:
                message = f"an event of the stream is not a {self._model.__name__}: {_answers.first_fault(error)}"
                raise ResponseError(body=data.decode(errors="replace"), message=message) from error
        self.events.append(data)
        self.moved = True
        if chunk.usage is not None:
            self._usage = chunk.usage
        choices = chunk.choices
        for choice in choices:
            self._open.add(choice.index)
            if choice.finish_reason is not None:
                self._finished.add(choice.index)
        if not self.started:
            self.started = any(_has_content(choice) for choice in choices)
        return chunk if choices else NOTHING


class JsonReader(EventReader[Any]):
    """A stream of whatever JSON an endpoint sends, each event through the user's own function.

    Such a stream may end without `[DONE]`, unless its events are chunks of a completion, which say when they end."""

    def __init__(self, map_fn: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self._map = map_fn
        self._has_events = False
        self.started = True

    def _is_error(self, body: dict[str, Any]) -> bool:
        """Other endpoints have errors that are numbers or lists, and rows that are marked as wrong."""
        error = body.get("error")
        if error is True:
            return bool(body.get("message")) or body.keys() <= _OF_ERRORS
        is_status = isinstance(error, int) and error >= 400 and bool(body.get("message"))
        says = is_status or isinstance(error, dict | str) or body.get("object") == "error"
        return says and super()._is_error(body)

    def has_unread(self) -> bool:
        """Without calling the user's function for what nobody has asked for."""
        function, self._map = self._map, None
        try:
            return super().has_unread()
        finally:
            self._map = function

    def _missing(self) -> ApiError | None:
        if self._open or (self._compression is not None and self._compression.is_cut):
            return super()._missing()
        if self._has_events or self.done or not self._foreign:
            return None
        return ResponseError(message="the answer is not an event stream: it holds lines of other kinds, and no event")

    def _value(self, data: bytes) -> Any:
        try:
            value = json.loads(data)
        except ValueError as error:
            body = data.decode(errors="replace")
            raise ResponseError(body=body, message=f"an event of the stream is not JSON: {error}") from error
        has_choices = isinstance(value, dict) and isinstance(value.get("choices"), list)
        if has_choices:
            for choice in value["choices"]:
                if isinstance(choice, dict) and not _OF_CHOICES.isdisjoint(choice):
                    index = _gather.index_of(choice)
                    self._open.add(index)
                    if choice.get("finish_reason") is not None:
                        self._finished.add(index)
        value = value if self._map is None else self._map(value)
        if has_choices:  # of others there is no text, and they may be large
            self.events.append(data)
        self._has_events = True
        self.moved = True
        return value


def text_of_chunk(chunk: Any) -> str:
    """The text for the first choice in a chunk of either kind."""
    for choice in chunk.choices:
        if choice.index == 0:
            delta = getattr(choice, "delta", None)
            text = choice.text if delta is None else delta.content
            return text if isinstance(text, str) else ""
    return ""


def _has_content(choice: Any) -> bool:
    if choice.finish_reason is not None:
        return True
    delta = getattr(choice, "delta", None)
    return bool(choice.text) if delta is None else any(value for name, value in delta if name != "role")
