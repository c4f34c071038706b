"""Files to upload, in the forms that httpx accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any, Optional, Union

__all__ = ["File", "convert_file_dict_to_httpx_tuples"]


_Content = Union[IO[bytes], bytes, str]
File = Union[
    _Content,
    tuple[Optional[str], _Content],
    tuple[Optional[str], _Content, Optional[str]],
    tuple[Optional[str], _Content, Optional[str], Mapping[str, str]],
]


def convert_file_dict_to_httpx_tuples(d: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """One pair for each file, also where a key has a list of them."""
    return [(key, one) for key, value in d.items() for one in (value if isinstance(value, list) else [value])]
