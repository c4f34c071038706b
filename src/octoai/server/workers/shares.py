"""What each of several processes gets of what the settings give the service: together no more than that."""

from __future__ import annotations

from octoai.server.settings import NUM_SLOTS_ELSEWHERE, BadSettings, ModelSettings, Settings


def check(settings: Settings) -> None:
    """Raises BadSettings where several processes cannot serve what is asked for."""
    num = settings.workers
    for model in settings.models if num > 1 else ():
        if model.engine_url is None:
            raise BadSettings(
                f"workers: {num} processes cannot share the engine of {model.id!r}, which runs inside one: "
                "give the model an engine_url, or set workers = 1"
            )
        if _num_slots(model) < num:
            raise BadSettings(
                f"workers: {num} processes cannot share {_num_slots(model)} slots of {model.id!r}: each needs one"
            )


def share(settings: Settings, number: int) -> Settings:
    """Of process `number`, counted from 0: its slots of every model, and what may wait for them."""
    num = settings.workers
    models = [
        model.model_copy(update={"num_slots": _part(_num_slots(model), number, num)}) for model in settings.models
    ]
    bounds = {
        name: min(bound, max(1, _part(bound, number, num)))  # where any may wait, one may at each
        for name in ("max_waiting", "max_waiting_tokens")
        for bound in [getattr(settings, name)]
    }
    return settings.model_copy(update={"models": models, **bounds})


def _num_slots(model: ModelSettings) -> int:
    return model.num_slots or NUM_SLOTS_ELSEWHERE


def _part(whole: int, number: int, num: int) -> int:
    return whole // num + (number < whole % num)
