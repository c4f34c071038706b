"""Which model answers for a name, and what is said where none does."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import pytest

from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue, Model
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import UnknownModel
from octoai.server.queue import FairQueue
from octoai.server.router import Deployment, Router


def deployment(model: Model, context_length: int = 8192) -> Deployment:
    return Deployment(model, ScriptedEngine(context_length=context_length), FairQueue(4, 4))


SHIPPED = Catalogue.load()
EMBEDDED = deployment(SHIPPED[EMBEDDED_MODEL_ID])
OWN = deployment(Model("Acme/Own-1", aliases=("own",), context_length=5))
ALONE = Router([EMBEDDED], SHIPPED)
STANDING_IN = Router([EMBEDDED, OWN], SHIPPED.with_models([OWN.model]), stand_in=EMBEDDED)


@pytest.mark.parametrize("name", ["Acme/Own-1", "acme/own-1", "own", "OWN"])
def test_a_model_is_found_by_id_and_alias_in_any_case(name: str) -> None:
    assert STANDING_IN.find(name) is OWN


@pytest.mark.parametrize(
    "name",
    ["meta-llama-3-8b-instruct", "META-LLAMA-3-8b-Instruct", "mixtral-8x7b-instruct-fp16", "llama-2-70b-chat-int4"],
)
def test_historical_ids_are_served_by_the_stand_in_and_only_by_one(name: str) -> None:
    assert STANDING_IN.find(name) is EMBEDDED
    with pytest.raises(UnknownModel):
        ALONE.find(name)


def test_embeddings_are_not_served_by_a_model_that_generates() -> None:
    with pytest.raises(UnknownModel):
        STANDING_IN.find("thenlper/gte-large")
    assert "thenlper/gte-large" not in [model.id for model, _ in STANDING_IN.served()]


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("llama-8b", "meta-llama-3-8b-instruct"),
        ("meta-llama-3-8b", "meta-llama-3-8b-instruct"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama-3-8b-instruct"),
        ("mixtral-8x7b", "mixtral-8x7b-instruct"),
        ("smollm", EMBEDDED_MODEL_ID),
        ("acme-own", "Acme/Own-1"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_ids(name: str, closest: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        STANDING_IN.find(name)
    assert closest in caught.value.message
    assert caught.value.code == "model_not_found"


def test_only_ids_that_would_work_are_proposed() -> None:
    with pytest.raises(UnknownModel) as caught:
        ALONE.find("meta-llama-3-8b")
    assert "meta-llama-3-8b-instruct" not in caught.value.message


def test_of_some_models_only_ids_of_theirs_are_proposed() -> None:
    for models, closest in ((("own", "smollm2"), {"Acme/Own-1", EMBEDDED_MODEL_ID}), (("gone",), set())):
        with pytest.raises(UnknownModel) as caught:
            STANDING_IN.find("meta-llama-3-8b-own", models)
        named = caught.value.message.partition("Closest: ")[2].rstrip(".").split(", ")
        assert set(filter(None, named)) == closest
    with pytest.raises(UnknownModel) as caught:
        STANDING_IN.find("meta-llama-3-8b-own")
    assert "meta-llama-3-8b-instruct" in caught.value.message


@pytest.mark.parametrize("name", ["gpt-4", "x", "???", "x" * 100_000, "\n\r\x00"], ids=lambda name: repr(name[:9]))
def test_a_name_like_none_is_pointed_to_the_list(name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        ALONE.find(name)
    assert len(caught.value.message) < 500
    assert "/v1/models" in caught.value.message or "Closest" in caught.value.message


def test_a_name_that_is_asked_for_again_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    class Counting(SequenceMatcher[str]):
        def __init__(self, junk: Any, wanted: str, known: str) -> None:
            compared.append(wanted)
            super().__init__(junk, wanted, known)

    router = Router([EMBEDDED, OWN], SHIPPED, stand_in=EMBEDDED)
    monkeypatch.setattr("octoai.server.catalogue.difflib.SequenceMatcher", Counting)
    said = set()
    for name in ("meta-llama-3-8b", "meta-llama-3-8b", "x" * 100_000, "x" * 100_000 + "y"):
        with pytest.raises(UnknownModel) as caught:
            router.find(name)
        said.add((caught.value.message, len(compared)))
    assert len(said) == 2


def test_the_names_of_a_token_are_looked_up_once() -> None:
    names = ["SmolLM2", "gone", "own", "mixtral-8x7b-instruct-fp16"]
    ids = STANDING_IN.ids(tuple(names))
    assert ids == {EMBEDDED_MODEL_ID, "gone", "Acme/Own-1", "mixtral-8x7b-instruct"}
    assert STANDING_IN.ids(tuple(names)) is ids


def test_what_is_served_is_listed_once_each() -> None:
    listed = [model.id for model, _ in STANDING_IN.served()]
    assert len(listed) == len(set(listed))
    assert {EMBEDDED_MODEL_ID, "Acme/Own-1", "meta-llama-3-8b-instruct"} <= set(listed)
    assert [model.id for model, _ in ALONE.served()] == [EMBEDDED_MODEL_ID]


def test_everything_listed_can_be_asked_for() -> None:
    for router in (ALONE, STANDING_IN):
        for model, by in router.served():
            for name in model.names:
                assert router.find(name) is by


def test_the_window_is_the_engines_own() -> None:
    assert OWN.context_length == 8192
    unsaid = Deployment(OWN.model, ScriptedEngine(), FairQueue(1, 1))
    unsaid.engine.context_length = None
    assert unsaid.context_length == 5
