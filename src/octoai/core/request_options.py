"""What one call may do differently from its client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, Union

from octoai._deadlines import Timeout


class RequestOptions(TypedDict, total=False):
    """All optional. `timeout_in_seconds` may also be an `octoai.Timeout`; a header that is None is left out; body
    parameters are added to the request's, and win over them."""

    timeout_in_seconds: Union[float, Timeout]
    max_retries: int
    additional_headers: Mapping[str, Any]
    additional_query_parameters: Mapping[str, Any]
    additional_body_parameters: Mapping[str, Any]
