"""What the original SDK's generated code was built on, as far as its users named it.

`ApiError` and `RequestOptions` are in daily use; the rest is kept for old code and works on its own.
"""

from __future__ import annotations

from octoai.core.datetime_utils import serialize_datetime
from octoai.core.file import File, convert_file_dict_to_httpx_tuples
from octoai.core.jsonable_encoder import jsonable_encoder
from octoai.core.pydantic_utilities import deep_union_pydantic_dicts
from octoai.core.query_encoder import encode_query
from octoai.core.remove_none_from_dict import remove_none_from_dict
from octoai.errors import ApiError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import pydantic.v1 as pydantic_v1

    from octoai.core.client_wrapper import AsyncClientWrapper, BaseClientWrapper, SyncClientWrapper
    from octoai.core.http_client import AsyncHttpClient, HttpClient
    from octoai.core.request_options import RequestOptions

__all__ = [
    "ApiError",
    "AsyncClientWrapper",
    "AsyncHttpClient",
    "BaseClientWrapper",
    "File",
    "HttpClient",
    "RequestOptions",
    "SyncClientWrapper",
    "convert_file_dict_to_httpx_tuples",
    "deep_union_pydantic_dicts",
    "encode_query",
    "jsonable_encoder",
    "pydantic_v1",
    "remove_none_from_dict",
    "serialize_datetime",
]

_HOMES = {
    "AsyncClientWrapper": "octoai.core.client_wrapper",
    "AsyncHttpClient": "octoai.core.http_client",
    "BaseClientWrapper": "octoai.core.client_wrapper",
    "HttpClient": "octoai.core.http_client",
    "RequestOptions": "octoai.core.request_options",
    "SyncClientWrapper": "octoai.core.client_wrapper",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "pydantic_v1":
        return import_module("pydantic.v1")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
