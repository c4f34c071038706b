"""Every refusal there is: its status, type, code and headers, and the one body that serves every client.

    Refusal
    ├── BadRequest                 400  invalid_value                what cannot be honoured; `param` names it
    │   ├── MalformedBody          400  invalid_json
    │   ├── MalformedRequest       400  invalid_http                 it cannot be read as a request at all
    │   ├── UnsupportedParameter   400  unsupported_parameter        what this model's engine cannot honour
    │   └── ContextLengthExceeded  400  context_length_exceeded
    ├── Unauthenticated            401  invalid_api_key
    ├── OutOfCredit                402  insufficient_quota           prepaid credit or a hard budget is used up
    ├── Forbidden                  403  permission_denied            a scope that the token lacks, or a model
    ├── UnknownModel               404  model_not_found
    ├── NotFound                   404  not_found                    no account, token or request of that id
    ├── UnknownPath                404  unknown_url
    ├── MethodNotAllowed           405  method_not_allowed
    ├── TooSlow                    408  request_timeout
    ├── StateConflict              409  conflict                     an id that is taken, a request that still runs
    ├── KeyConflict                409  idempotency_key_conflict     it was used for another request
    ├── TooLarge                   413  body_too_large
    ├── EncodedBody                415  unsupported_content_encoding
    ├── InvalidBody                422  invalid_value                with FastAPI's `detail` list, as OctoAI documented
    ├── RateLimited                429  rate_limit_exceeded          with `retry-after`, if it is ever let through
    ├── HeadTooLarge               431  headers_too_large
    ├── InternalError              500                               our fault
    ├── EngineFailed               502  engine_failed                it broke off, or answered what it should not
    └── Unavailable                503  unavailable                  or why: `overloaded`, …; always with `retry-after`

Knows nothing of HTTP servers: `edge` turns a refusal into an answer, `streaming` into an event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class Refusal(Exception):
    """Why a request is not served. `message` is for the caller: no internals, no traceback."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The flat keys of the OctoAI API and, beside them, OpenAI's nested `error`."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"object": "error", **error, "validation_errors": None, "error": error}


class BadRequest(Refusal):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class MalformedBody(BadRequest):
    code = "invalid_json"


class MalformedRequest(BadRequest):
    code = "invalid_http"


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"


# Of what an engine cannot honour: what to do where leaving it out is no help.
_INSTEAD = {
    "continue_final_message": "leave it and add_generation_prompt out",
    "prompt": "send it as text",
    "tools": "ask for a response_format with a json_schema, or serve a model by another engine (engine_url)",
}


class NotHonoured(UnsupportedParameter):
    """What the engine of one model cannot do: others may."""

    def __init__(self, name: str, served: str, asked: str) -> None:
        who = f"`{served}`" if served == asked else f"`{served}`, which stands in for `{asked}`,"
        instead = _INSTEAD.get(name, "leave it out")
        super().__init__(f"{name}: {who} cannot honour this parameter; {instead}", param=name)


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, context_length: int, *, param: str, is_least: bool = False) -> None:
        """`is_least`: the prompt has so many tokens at least; nobody has counted on."""
        num = f"at least {prompt_tokens}" if is_least else f"{prompt_tokens}"
        super().__init__(  # it begins as OpenAI's does: that is how clients like LiteLLM know what is wrong
            f"This model's maximum context length is {context_length} tokens, but the prompt has {num} tokens. "
            "Shorten it: nothing is cut off silently.",
            param=param,
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class Unauthenticated(Refusal):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class OutOfCredit(Refusal):
    """No retry helps: money has to come first."""

    status = 402
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})


class Forbidden(Refusal):
    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class UnknownModel(Refusal):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, model: str, nearest: Sequence[str]) -> None:
        hint = f" Closest: {', '.join(nearest)}." if nearest else " GET /v1/models lists what is."
        super().__init__(f"The model `{model[:200]}` is not served here.{hint}", param="model")


class NotFound(Refusal):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class UnknownPath(Refusal):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowed(Refusal):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooSlow(Refusal):
    """The body did not come. It may be sent again at once."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class StateConflict(Refusal):
    """It cannot be done as things stand; the same again would meet the same."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, headers={"x-should-retry": "false"})


class KeyConflict(Refusal):
    status = 409
    type = "invalid_request_error"
    code = "idempotency_key_conflict"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})


class TooLarge(Refusal):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The request body is larger than {max_bytes} bytes, the most that is read.")


class EncodedBody(Refusal):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"

    def __init__(self, encoding: str) -> None:
        said = f"Content-Encoding: {encoding[:64]} is not read here; send the body as it is, without this header."
        super().__init__(said, param="content-encoding")


class HeadTooLarge(Refusal):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The request line and headers are larger than {max_bytes} bytes, the most that is read.")


class InvalidBody(Refusal):
    """The body is JSON but not what the endpoint takes. `detail` names wrong fields, a hundred at most, and of a list
    the first wrong value."""

    status = 422
    type = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, detail: Sequence[Mapping[str, Any]]) -> None:
        first = detail[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        super().__init__(f"{param or 'body'}: {first['msg']}", param=param)
        self.detail = list(detail)

    def body(self) -> dict[str, Any]:
        fields = {".".join(map(str, row["loc"][1:])) or "body": row["msg"] for row in self.detail}
        return {**super().body(), "validation_errors": fields, "detail": self.detail}


class RateLimited(Refusal):
    """`kind` is what there was too much of: "requests" or "tokens". `retry_after` (seconds) is when this very request
    would be let through; None where it never would, being larger than the limit itself."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str, retry_after: float | None) -> None:
        headers = {"x-should-retry": "false"}
        if retry_after is not None:
            milliseconds = max(1, math.ceil(retry_after * 1000))
            headers = {"retry-after": str(math.ceil(retry_after)), "retry-after-ms": str(milliseconds)}
        super().__init__(message, headers=headers)
        self.type = kind
        self.retry_after = retry_after


class InternalError(Refusal):
    type = "internal_error"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"Something went wrong here, not with your request. It is logged as {request_id}.")


class EngineFailed(Refusal):
    status = 502
    type = "server_error"
    code = "engine_failed"


class Unavailable(Refusal):
    """Not now: `retry_after` is in seconds, from what is known of the reason."""

    status = 503
    type = "server_error"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float, code: str | None = None) -> None:
        seconds = max(1, math.ceil(retry_after))
        super().__init__(message, headers={"retry-after": str(seconds)})
        self.retry_after = seconds
        self.code = code or type(self).code
