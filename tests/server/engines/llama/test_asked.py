"""What an engine is asked of a prompt that is known: its tokens, where that makes no other difference."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from octoai.server.engines.base import Event, Finished, Generation, Usage
from octoai.server.engines.llama.burst import MAX_SECONDS
from octoai.server.engines.llama.control import Control, Refused
from octoai.server.engines.llama.prefixes import Prefixes
from octoai.server.engines.llama.reading import MIN_SHARED_TOKENS, Reading
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.server.errors import BadRequest, ContextLengthExceeded
from tests.server.llamas import answered, running

PLAIN = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
THINKING = PLAIN + "{% if enable_thinking %}<think>{% endif %}"
CHAT = Generation(max_tokens=4, messages=[{"role": "user", "content": "Hi"}])


class Told:
    """A child that tells what it was told to."""

    context_length = 100

    def __init__(
        self, template: str | None, tokens: Sequence[int] | None = (1, 2, 3), *, is_slow: bool = False
    ) -> None:
        self._template, self._tokens, self._is_slow = template, tokens, is_slow
        self.asked: list[Generation] = []
        self.num_templates = 0

    async def tokens(self, _generation: Generation) -> Sequence[int]:
        if self._tokens is None:
            raise Refused("a role is wrong")
        return self._tokens

    def check_at_once(self, _tokens: Sequence[int], _generation: Generation) -> None:
        if self._is_slow:
            raise BadRequest("too many special tokens")

    async def template(self) -> str:
        self.num_templates += 1
        if self._template is None:
            raise Refused("404")
        return self._template

    async def generate(self, generation: Generation, *_: object) -> AsyncGenerator[Sequence[Event]]:
        self.asked.append(generation)
        yield [Finished({0: "stop"}, Usage())]


def asked(told: Told, *generations: Generation) -> list[Generation]:
    async def main() -> None:
        http, control = cast(OpenAIEngine, told), cast(Control, told)
        reading = Reading(http, control, Prefixes(Path(), "", 0), 2)
        for generation in generations:
            async for _ in reading.generate(generation, None, None):
                pass

    asyncio.run(main())
    return told.asked


def test_a_chat_whose_answer_is_only_text_is_asked_for_with_its_tokens() -> None:
    told = Told(PLAIN)
    for each in asked(told, CHAT, CHAT):
        assert (each.messages, each.text, each.tokens) == (None, None, (1, 2, 3))
        assert each.slot in (0, 1)
    assert told.num_templates == 1


@pytest.mark.parametrize("template", [THINKING, PLAIN + "<|channel|>final", PLAIN + "</Assistant>", None])
def test_a_chat_whose_answer_the_engine_takes_apart_stays_one(template: str | None) -> None:
    (each,) = asked(Told(template), CHAT)
    assert (each.messages, each.tokens) == (CHAT.messages, None)


def test_a_template_that_was_not_told_is_asked_for_again() -> None:
    told = Told(None)
    asked(told, CHAT, CHAT)
    assert told.num_templates == 2


@pytest.mark.parametrize("changes", [{"logprobs": 2}, {"schema": {"type": "object"}}])
def test_what_is_said_otherwise_of_a_chat_is_asked_for_as_one(changes: dict[str, Any]) -> None:
    generation = Generation(max_tokens=4, messages=CHAT.messages, **changes)
    (each,) = asked(Told(PLAIN), generation)
    assert each.messages == CHAT.messages


def test_a_prompt_that_is_not_known_is_the_engines_to_refuse() -> None:
    (each,) = asked(Told(PLAIN, None), CHAT)
    assert each.messages == CHAT.messages


@pytest.mark.parametrize(("prompt", "param"), [(CHAT, "messages"), (Generation(max_tokens=1, text="Hi"), "prompt")])
def test_a_prompt_that_is_known_not_to_fit_is_not_shown_to_the_engine(prompt: Generation, param: str) -> None:
    told = Told(PLAIN, range(100))
    with pytest.raises(ContextLengthExceeded, match="is 100 tokens, but the prompt has 100 tokens") as refused:
        asked(told, prompt)
    assert (told.asked, refused.value.param) == ([], param)
    assert len(asked(Told(PLAIN, range(99)), prompt)) == 1


def test_a_prompt_that_takes_too_long_at_once_is_refused_where_it_cannot_be_asked_for_in_pieces() -> None:
    told = Told(THINKING, is_slow=True)
    with pytest.raises(BadRequest, match="too many special tokens"):
        asked(told, CHAT)
    assert told.asked == []
    assert len(asked(Told(PLAIN, is_slow=True), CHAT)) == 1


@pytest.mark.model
def test_a_prompt_is_counted_without_the_schema_of_its_answer(embedded_model: Path, tmp_path: Path) -> None:
    """Of which the engine would make a grammar to do so, before anybody has looked at the caller's credit."""

    async def main() -> None:
        async with running(embedded_model, tmp_path, num_slots=1) as engine:
            refusable = Generation(max_tokens=4, messages=CHAT.messages, schema={"type": "no-such-type"})
            assert await engine.count_tokens(refusable) == await engine.count_tokens(CHAT)

    asyncio.run(main())


@pytest.mark.model
def test_an_answer_is_the_same_either_way(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real engine: system messages, turns, a beginning that is to be continued, white space, stop words."""
    talks: list[list[dict[str, str]]] = [
        [{"role": "user", "content": "  Name three colours.\n"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
        [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2,"}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Write <|im_end|> twice."},
        ],
    ]
    wishes = [
        Generation(max_tokens=24, messages=talk, seed=number, temperature=0.7, stop=["blue", "\n\n"])
        for number, talk in enumerate(talks)
    ]

    async def answers(place: Path) -> list[tuple[str, Usage]]:
        async with running(embedded_model, place, num_slots=1) as engine:
            return [await answered(engine, wish) for wish in wishes]

    async def never(_reading: Reading) -> bool:
        return False

    with_tokens = asyncio.run(answers(tmp_path / "tokens"))
    monkeypatch.setattr(Reading, "_has_plain_answers", never)
    assert asyncio.run(answers(tmp_path / "chats")) == with_tokens


@pytest.mark.parametrize(("num_tokens", "waits"), [(MIN_SHARED_TOKENS, True), (MIN_SHARED_TOKENS + 1, False)])
def test_what_is_short_waits_for_those_that_come_with_it(num_tokens: int, waits: bool) -> None:
    class Slow(Told):
        """Tells of the second prompt late."""

        context_length = 1000
        has_told_late = False

        async def tokens(self, generation: Generation) -> Sequence[int]:
            if generation.text == "late":
                await asyncio.sleep(MAX_SECONDS / 2)
                self.has_told_late = True
            return range(num_tokens)

    told = Slow(PLAIN)

    async def main() -> None:
        reading = Reading(cast(OpenAIEngine, told), cast(Control, told), Prefixes(Path(), "", 0), 2)

        async def answer(text: str) -> None:
            async for _ in reading.generate(Generation(max_tokens=1, text=text), None, None):
                pass

        late = asyncio.create_task(answer("late"))
        await asyncio.sleep(0)
        await answer("soon")
        assert told.has_told_late is waits
        await late

    asyncio.run(main())
