"""Every error that leaves the SDK.

    ApiError
    ├── BadRequestError             400
    ├── AuthenticationError         401
    ├── InsufficientQuotaError      402
    ├── PermissionDeniedError       403
    ├── NotFoundError               404
    ├── ConflictError               409
    ├── UnprocessableEntityError    422
    ├── RateLimitError              429
    ├── ServerError                 every 5xx
    │   └── InternalServerError     500
    ├── ApiConnectionError          no answer: refused, reset, unknown host, not HTTP
    ├── ApiTimeoutError             a deadline passed; `deadline` says which
    ├── StreamInterrupted           a stream was cut off; `partial` is the text until then
    ├── StreamError                 the service reported an error inside a stream
    ├── ResponseError               an answer that could not be understood
    └── ConfigurationError          nothing was sent: a bad address or credentials file, or a dead host

Other statuses are plain `ApiError`s. Mistakes in a call itself (a misspelt parameter) stay `TypeError`s.
Knows nothing of HTTP libraries.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = [
    "ApiConnectionError",
    "ApiError",
    "ApiTimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "ConfigurationError",
    "ConflictError",
    "InternalServerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "ResponseError",
    "ServerError",
    "StreamError",
    "StreamInterrupted",
    "UnprocessableEntityError",
]


class ApiError(Exception):
    """The base of them all, and any answer whose status has no class of its own.

    `status_code` and `body` are the answer's: `body` is parsed JSON, or text where it is not JSON; both are None
    where there was no answer. `message`, `type`, `code` and `param` are what the service said in the body.
    `retryable`: the same request may succeed later. `retry_after`: seconds, where the service named a time.
    `attempts`: how often the request was sent. `request_id`: what to quote when reporting a problem.
    """

    def __init__(
        self,
        *,
        status_code: int | None = None,
        body: Any = None,
        message: str | None = None,
        headers: Mapping[str, str] | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
    ) -> None:
        said = _said(body)
        super().__init__()
        self.status_code = status_code
        self.body = body
        self.message = message or said["message"]
        self.type = said["type"]
        self.code = said["code"]
        self.param = said["param"]
        self.headers: dict[str, str] = {name.lower(): value for name, value in (headers or {}).items()}
        self.retryable = retryable
        self.retry_after = retry_after
        self.attempts = 1

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id") or self.headers.get("x-user-request-id")

    def __str__(self) -> str:
        """For a plain `ApiError` of an answer, exactly what the original SDK showed."""
        facts = f"status_code: {self.status_code}, body: {self.body}"
        if self.status_code is None and self.body is None and self.message:
            return self.message
        if type(self) is ApiError or not self.message:
            return facts
        return f"{self.message} ({facts})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.__dict__)


class BadRequestError(ApiError):
    """400: the service refuses this request as it is; `param` names the parameter where it said one."""


class AuthenticationError(ApiError):
    """401: no token, or one the service does not know."""


class InsufficientQuotaError(ApiError):
    """402: credit, or a month's budget, does not cover this request. No retry helps."""


class PermissionDeniedError(ApiError):
    """403: the token is known, and this is not for it."""


class NotFoundError(ApiError):
    """404: no such model, or no such address."""


class ConflictError(ApiError):
    """409."""


class UnprocessableEntityError(ApiError):
    """422: wrong fields in the request. `body` is an `octoai.text_gen.HttpValidationError` where it has that form."""

    def __init__(self, body: Any = None, *, status_code: int = 422, **facts: Any) -> None:
        super().__init__(status_code=status_code, body=body, **facts)
        if isinstance(body, dict) and isinstance(body.get("detail"), list):
            self.body = _as_record("HttpValidationError", body)


class RateLimitError(ApiError):
    """429: too many requests or tokens; `retry_after` is the service's own estimate in seconds."""


class ServerError(ApiError):
    """5xx: the service failed, or is overloaded."""


class InternalServerError(ServerError):
    """500. `body` is an `octoai.text_gen.ErrorResponse` where it has that form."""

    def __init__(self, body: Any = None, *, status_code: int = 500, **facts: Any) -> None:
        super().__init__(status_code=status_code, body=body, **facts)
        if isinstance(body, dict):
            self.body = _as_record("ErrorResponse", body)


class ApiConnectionError(ApiError):
    """The request got no answer, or not a whole one."""


class ApiTimeoutError(ApiError):
    """`deadline` is the one of `octoai.Timeout` that passed; `seconds` what it was; `partial` the text until then."""

    def __init__(
        self, *, deadline: str = "read", seconds: float | None = None, partial: str = "", **facts: Any
    ) -> None:
        super().__init__(**facts)
        self.deadline = deadline
        self.seconds = seconds
        self.partial = partial


class StreamInterrupted(ApiError):
    """The stream ended before its answer did. `partial`: the text (of the first choice) until then."""

    def __init__(self, *, partial: str = "", **facts: Any) -> None:
        super().__init__(**facts)
        self.partial = partial


class StreamError(ApiError):
    """The service reported an error inside a stream: `body` is that event. `partial`: the text until then."""

    def __init__(self, *, partial: str = "", **facts: Any) -> None:
        super().__init__(**facts)
        self.partial = partial


class ResponseError(ApiError):
    """The answer is not what the API says it is: not JSON, without choices, not an event stream. `partial`: the text
    of a stream until then."""

    def __init__(self, *, partial: str = "", **facts: Any) -> None:
        super().__init__(**facts)
        self.partial = partial


class ConfigurationError(ApiError):
    """Nothing was sent, because it is not clear where to or with what."""


def status_class(status: int) -> type[ApiError]:
    """The class of error that an answer with this status is."""
    if status < 400:
        return ResponseError
    return _BY_STATUS.get(status) or (ServerError if status >= 500 else ApiError)


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: InsufficientQuotaError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: UnprocessableEntityError,
    429: RateLimitError,
    500: InternalServerError,
}


def _said(body: Any) -> dict[str, Any]:
    """What the body says of the error: flat, as OctoAI, or under "error", as OpenAI; or FastAPI's "detail"."""
    found: dict[str, Any] = {"message": None, "type": None, "code": None, "param": None}
    if not isinstance(body, dict):
        return found
    nested = body.get("error")
    for source in (body, nested if isinstance(nested, dict) else {}):
        found.update({key: source[key] for key in found if source.get(key) is not None})
    if found["message"] is None:
        found["message"] = nested if isinstance(nested, str) else _detail(body.get("detail"))
    elif not isinstance(found["message"], str):
        found["message"] = str(found["message"])
    return found


def _detail(detail: Any) -> str | None:
    if isinstance(detail, str):
        return detail
    if not isinstance(detail, list):
        return None
    faults = [fault for fault in detail if isinstance(fault, dict)]
    return "; ".join(f"{'.'.join(map(str, fault.get('loc') or ()))}: {fault.get('msg')}" for fault in faults) or None


def _as_record(name: str, body: dict[str, Any]) -> Any:
    """The body as the named type on the wire; unchanged where it has another form."""
    from pydantic import ValidationError

    from octoai.wire import answers

    try:
        return getattr(answers, name).model_validate(body)
    except ValidationError:
        return body


def _restored(cls: type[ApiError], state: dict[str, Any]) -> ApiError:
    """An unpickled error: constructors differ, attributes do not."""
    error = cls.__new__(cls)
    error.__dict__.update(state)
    return error
