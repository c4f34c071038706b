"""Texts with very many special tokens, which take llama.cpp the square of their number."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from octoai.server.engines.base import Generation
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.header import Vocabulary, vocabulary
from octoai.server.engines.llama.options import LlamaOptions
from octoai.server.engines.llama.special import MAX_WITHOUT_PIECES, PIECE_CHARS, SpecialTokens
from octoai.server.errors import BadRequest, ContextLengthExceeded

MANY = 1_000_000


def known(*special: str, kind: str = "gpt2", has_end: bool = False) -> SpecialTokens:
    tokens = ["a", "b", *special]
    return SpecialTokens(Vocabulary(kind, tokens, [1, 1, *[3] * len(special)], has_end))


def test_a_long_text_with_few_is_nothing_to_look_at() -> None:
    chat = known("<s>", "</s>", "[INST]", "[/INST]")
    assert not chat.is_slow("A long text about nothing. " * 300_000)
    assert not chat.is_slow("<s>[INST]a[/INST]b</s>" * 100)
    assert chat.is_slow("<s>a" * 20_000)
    assert not SpecialTokens(None).is_slow("<s>a" * 20_000)


def test_pieces_are_the_text_and_none_is_slow() -> None:
    chat = known("<s>", "</s>", "<s>x")
    text = "a" * 100_000 + "</s>a" * 50_000 + "b" * 1_000_000 + "</s>" * 1000
    pieces = chat.pieces(text, MANY)
    assert pieces is not None
    assert "".join(pieces) == text
    assert all(len(piece) <= PIECE_CHARS or piece.count("</s>") <= 1 for piece in pieces)
    assert all(piece.startswith("</s>") for piece in pieces[1:])


@pytest.mark.parametrize("special", [("<s>", "<s><s>"), ("<s>", ">a"), ("<s>", "a<"), ("<s>", "s")], ids=repr)
def test_it_is_not_cut_where_another_special_token_may_be(special: tuple[str, ...]) -> None:
    text = "<s>a" * 10_000
    assert known(*special).pieces(text, MANY) == [text]


@pytest.mark.parametrize("changes", [{"kind": "bert"}, {"has_end": True}])
def test_it_is_not_cut_where_a_text_is_not_the_sum_of_its_pieces(changes: dict[str, object]) -> None:
    text = "<s>a" * 10_000
    assert known("<s>", **changes).pieces(text, MANY) == [text]  # type: ignore[arg-type]


def test_more_than_a_context_has_tokens_are_not_counted_to_the_end() -> None:
    assert known("<s>").pieces("<s>" * 1000, 999) is None
    assert known("<s>").pieces("<s>" * 1000, 1000) is not None


def test_what_is_too_slow_in_one_piece_is_told_by_its_tokens() -> None:
    chat = known("<s>", "[s]", "</s>")  # tokens 2 to 4
    num_chars = 10_000_000
    most = MAX_WITHOUT_PIECES // num_chars // 2  # two are looked for between those, themselves among them
    assert chat.is_too_slow([0] * 10 + [3] * (most + 1), num_chars)
    assert chat.is_too_slow([0] * 10 + [4] * (most + 1), num_chars)
    assert not chat.is_too_slow([0] * 10_000 + [3] * (most - 10), num_chars)


def test_what_is_looked_for_before_does_not_count() -> None:
    lines = known(*[f"<unused{number}>" for number in range(6000)], "\n", " ")
    source = [0, 0, 6002] * 10_000
    assert not lines.is_too_slow(source, 500_000)
    assert lines.is_too_slow([2 + number % 3000 for number in range(10_000)], 500_000)


def test_a_vocabulary_of_thousands_takes_no_time() -> None:
    lines = known(*[f"<unused{number}>" for number in range(6000)], "\n", "\n\n", "  ", "   ")
    text = "".join(f"<unused{number}>  a\n" for number in range(6000)) * 2
    began = time.process_time()
    pieces = lines.pieces(text, MANY)
    assert time.process_time() - began < 2
    assert pieces is not None and len(pieces) > 5 and "".join(pieces) == text
    assert all(piece.startswith("<unused") for piece in pieces)


def test_what_ends_an_answer_is_special_whatever_its_type() -> None:
    typed_as_text = SpecialTokens(Vocabulary("gpt2", ["a", "</s>"], [1, 1], False, {1, None}))
    assert typed_as_text.pieces("</s>a" * 1000, 999) is None


def test_a_file_without_a_vocabulary_has_none(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert vocabulary(tmp_path / "x.gguf") is None
    assert vocabulary(tmp_path / "missing.gguf") is None


async def tokens_of(engine: LlamaEngine, text: str) -> Sequence[int]:
    assert engine._reading is not None
    return await engine._reading._control.tokens(Generation(max_tokens=1, text=text))


@pytest.mark.model
def test_pieces_come_to_the_tokens_of_the_whole(embedded_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_model = vocabulary(embedded_model)
    assert of_model is not None
    special = [text for text, kind in zip(of_model.tokens, of_model.types, strict=True) if kind == 3]
    assert "<|im_end|>" in special
    words = [*special, " ", "\n", "  a", "sea ", "é", "<|", "im_end|>", "日本", "x" * 300]
    texts = ["".join(random.Random(seed).choices(words, k=400)) for seed in range(20)]

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=2048, num_slots=1))
        await engine.start()
        try:
            whole = [await tokens_of(engine, text) for text in texts]
            monkeypatch.setattr("octoai.server.engines.llama.special.MAX_LOOKED_THROUGH", 0)
            monkeypatch.setattr("octoai.server.engines.llama.special.PIECE_CHARS", 50)
            in_pieces = [await tokens_of(engine, text) for text in texts]
        finally:
            await engine.close()
        assert in_pieces == whole

    asyncio.run(main())


@pytest.mark.model
def test_an_empty_prompt_is_refused_where_no_token_begins_a_text(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_model = vocabulary(embedded_model)
    assert of_model is not None
    assert (of_model.begin, of_model.tokens[1]) == (1, "<|im_start|>")
    monkeypatch.setattr("octoai.server.engines.llama.engine.vocabulary", lambda _: replace(of_model, begin=None))

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        try:
            for ask in (engine.count_tokens, lambda prompt: anext(engine.generate(prompt))):
                with pytest.raises(BadRequest, match="prompt: must not be empty") as refused:
                    await ask(Generation(max_tokens=1, text=""))
                assert refused.value.param == "prompt"
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.model
@pytest.mark.parametrize("is_chat", [True, False])
def test_special_tokens_without_end_are_refused_at_once(embedded_model: Path, is_chat: bool) -> None:
    text = "<|im_end|>a" * 200_000
    prompt = Generation(max_tokens=1, messages=[{"role": "user", "content": text}] if is_chat else None)
    prompt.text = None if is_chat else text

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=2048, num_slots=1))
        await engine.start()
        try:
            for ask in (engine.count_tokens(prompt), anext(engine.generate(prompt))):
                began = time.monotonic()
                with pytest.raises(ContextLengthExceeded) as refused:
                    await ask
                assert "the prompt has at least 2049 tokens" in refused.value.message
                assert refused.value.param == ("messages" if is_chat else "prompt")
                assert time.monotonic() - began < 5
        finally:
            await engine.close()

    asyncio.run(main())
