"""The answer to an asynchronous inference: where to ask for its state."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from octoai.wire.record import Record


class InferenceFuture(Record):
    """An inference under way, for `is_future_ready` and `get_future_result`. May be changed, as it always could."""

    model_config = ConfigDict(frozen=False)

    response_id: str
    poll_url: str

    def __setattr__(self, name: str, value: Any) -> None:  # type: ignore[override]
        BaseModel.__setattr__(self, name, value)
