"""What each of several processes gets of what the settings give the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octoai.server.settings import BadSettings, Settings
from octoai.server.workers.shares import check, share

ELSEWHERE = {"id": "far", "engine_url": "http://127.0.0.1:9/v1"}


def settings(workers: int, *models: dict[str, Any], **more: Any) -> Settings:
    return Settings.model_validate(
        {"data_dir": Path("d"), "cache_dir": Path("c"), "workers": workers, "models": [*models], **more}
    )


@pytest.mark.parametrize(("slots", "workers"), [(4, 2), (7, 3), (None, 3), (3, 3), (256, 7)])
def test_together_they_have_the_slots_there_are_and_each_has_one(slots: int | None, workers: int) -> None:
    whole = settings(workers, ELSEWHERE | ({} if slots is None else {"num_slots": slots}))
    check(whole)
    shares = [share(whole, number).models[0].num_slots or 0 for number in range(workers)]
    assert sum(shares) == (slots or 256)
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1


def test_what_may_wait_is_divided_and_where_any_may_one_may_at_each() -> None:
    whole = settings(3, ELSEWHERE, max_waiting=256, max_waiting_tokens=2)
    shares = [share(whole, number) for number in range(3)]
    assert sum(each.max_waiting for each in shares) == 256
    assert [each.max_waiting_tokens for each in shares] == [1, 1, 1]
    none = settings(3, ELSEWHERE, max_waiting=0)
    assert [share(none, number).max_waiting for number in range(3)] == [0, 0, 0]


def test_all_else_is_the_same() -> None:
    whole = settings(2, ELSEWHERE, drain_seconds=7)
    changed = {"models", "max_waiting", "max_waiting_tokens"}
    assert share(whole, 1).model_dump(exclude=changed) == whole.model_dump(exclude=changed)


def test_the_settings_survive_the_way_to_a_worker() -> None:
    whole = settings(2, ELSEWHERE | {"engine_key_env": "KEY", "aliases": ["f"]}, database="postgresql://u:p@h/d")
    assert Settings.model_validate(share(whole, 0).model_dump(mode="json")) == share(whole, 0)


def test_an_engine_of_ours_cannot_be_shared() -> None:
    with pytest.raises(BadSettings, match="'mine', which runs inside one: give the model an engine_url, or set"):
        check(settings(2, ELSEWHERE, {"id": "mine", "path": "mine.gguf"}))
    check(settings(1, {"id": "mine", "path": "mine.gguf"}))


def test_fewer_slots_than_processes_cannot_be_shared() -> None:
    with pytest.raises(BadSettings, match="3 processes cannot share 2 slots of 'far': each needs one"):
        check(settings(3, ELSEWHERE | {"num_slots": 2}))
