"""Several choices, or prompts, in one request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from octoai.server.engines import base
from octoai.server.engines.base import Generation
from octoai.server.engines.scripted import ScriptedEngine, Step
from octoai.server.errors import EngineFailed
from tests.running import Start
from tests.talking import LONG, ask, chat, events, is_idle, until


def test_choices_and_prompts_make_one_answer(in_process: Start) -> None:
    service = in_process(ScriptedEngine(lambda generation: (str(generation.text), " and", 0.01, " on"), num_slots=2))
    status, _, text = ask(service, "/v1/completions", {"model": "smollm2", "prompt": ["a b", "c"], "n": 2})
    assert status == 200
    whole = json.loads(text)
    said = ["a b and on", "a b and on", "c and on", "c and on"]
    assert [choice["text"] for choice in whole["choices"]] == said
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["usage"]["prompt_tokens"] == 3
    _, _, text = ask(
        service, "/v1/completions", {"model": "smollm2", "prompt": ["a b", "c"], "n": 2, "stream": True, "echo": True}
    )
    streamed = [""] * 4
    for chunk in events(text):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == ["a b" + said[0], "a b" + said[1], "c" + said[2], "c" + said[3]]


def test_three_streamed_choices_open_and_close_once_each(in_process: Start) -> None:
    service = in_process(ScriptedEngine(("a", 0.01, "b"), num_slots=1))
    _, _, text = chat(service, n=3, stream=True, seed=5)
    read = [chunk["choices"][0] for chunk in events(text)]
    assert sorted(choice["index"] for choice in read if "role" in choice["delta"]) == [0, 1, 2]
    assert sorted(choice["index"] for choice in read if choice["finish_reason"]) == [0, 1, 2]
    assert sorted(generation.seed for generation in service.engine.seen) == [5, 6, 7]
    until(lambda: is_idle(service))


def test_seeds_of_choices_stay_within_64_bits(in_process: Start) -> None:
    service = in_process(ScriptedEngine())
    assert chat(service, n=3, seed=2**63 - 2)[0] == 200
    assert sorted(generation.seed for generation in service.engine.seen) == [-(2**63), 2**63 - 2, 2**63 - 1]


def test_what_the_tools_of_a_request_come_to_is_found_out_once_for_all_its_choices(
    in_process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    num_json = base._num_json
    monkeypatch.setattr(base, "_num_json", lambda value: measured.append(value) or num_json(value))
    service = in_process(ScriptedEngine())
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert chat(service, n=8, tools=[tool])[0] == 200
    assert len(service.engine.seen) == 8
    assert len({generation.num_prompt_bytes for generation in service.engine.seen}) == 1
    assert [value for value in measured if value] == [(tool,)]


def test_one_failing_choice_ends_them_all(in_process: Start) -> None:
    def script(generation: Generation) -> Sequence[Step]:
        return ("x", 0.05, EngineFailed("it broke")) if generation.seed == 2 else LONG

    service = in_process(ScriptedEngine(script))
    status, _, answer = chat(service, n=3, seed=1)
    assert (status, answer["code"]) == (502, "engine_failed")
    until(lambda: is_idle(service))


def test_a_request_with_more_choices_than_places_in_the_queue_is_served(in_process: Start) -> None:
    service = in_process(ScriptedEngine(num_slots=2), max_waiting=1)
    status, _, answer = chat(service, n=9)
    assert status == 200
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello, world!"] * 9
