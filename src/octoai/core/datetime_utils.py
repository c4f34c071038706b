"""Points in time as text."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import datetime

__all__ = ["serialize_datetime"]


def serialize_datetime(v: datetime.datetime) -> str:
    """ISO 8601, UTC written as "Z". A time without a zone is taken as local time."""
    zoned = v if v.tzinfo is not None else v.astimezone()
    text = zoned.isoformat()
    return text.removesuffix("+00:00") + "Z" if zoned.tzname() == "UTC" and text.endswith("+00:00") else text
