"""The supervisor of the child, by itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import uvloop
from gguf.scripts import gguf_new_metadata

from octoai.server.engines.base import Delta, Finished, Generation
from octoai.server.engines.llama import engine as llama
from octoai.server.engines.llama import loading
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.held import HeldFiles
from octoai.server.engines.llama.kernels import NO_KERNELS
from octoai.server.engines.llama.options import LlamaOptions, LlamaTuning, environment
from octoai.server.engines.llama.prefixes import parts
from octoai.server.engines.llama.socket_place import SocketPlace
from octoai.server.errors import ContextLengthExceeded, EngineFailed, Refusal
from tests.server.singly import singly

pytestmark = pytest.mark.model

HELLO = Generation(max_tokens=3, messages=[{"role": "user", "content": "Hi"}])


async def until(engine: LlamaEngine, is_ready: bool, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while engine.is_ready != is_ready:
            await asyncio.sleep(0.02)


def test_an_engine_that_cannot_be_started_again_now_is_tried_until_it_can(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))  # short: a socket's path is
    monkeypatch.setattr(tempfile, "tempdir", str(place))

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        try:
            process = engine._process
            assert process is not None
            shutil.rmtree(place)
            os.kill(process.pid, signal.SIGKILL)
            await until(engine, False, 5)
            await asyncio.sleep(1)  # tries in vain meanwhile
            assert not engine.is_ready
            os.mkdir(place)
            await until(engine, True, 30)
            events = [event async for batch in engine.generate(HELLO) for event in batch]
            assert any(isinstance(event, Delta) for event in events)
        finally:
            await engine.close()

    try:
        asyncio.run(main())
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        pytest.param(RuntimeError("can't start new thread"), "can't start new thread", marks=pytest.mark.slow),
        pytest.param(MemoryError(), "MemoryError()", marks=pytest.mark.slow),
        (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
    ],
)
def test_a_start_that_fails_for_whatever_reason_leaves_no_child_and_is_tried_again(
    embedded_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    said: str,
) -> None:
    """What fails here fails when the child listens already."""
    read, children, failing = llama.SpecialTokens, [], [error, error]

    async def child(environ: Any, made: Any = llama._child) -> asyncio.subprocess.Process:
        children.append(await made(environ))
        return children[-1]

    def failing_first(words: Any) -> Any:
        if failing:
            raise failing.pop()
        return read(words)

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        try:
            monkeypatch.setattr(llama, "_child", child)
            monkeypatch.setattr(llama, "SpecialTokens", failing_first)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(engine, False, 5)
            await until(engine, True, 60)
            assert await told(engine)
            assert [each.returncode for each in children] == [-9, -9, None]
            assert engine.num_restarts == 3
        finally:
            await engine.close()

    asyncio.run(main())
    assert sum(message.startswith("engine of m: ") and said in message for message in caplog.messages) == 2


def test_a_first_start_without_a_thread_is_one_line_and_leaves_no_child(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(llama, "SpecialTokens", failing)

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        with pytest.raises(EngineFailed, match=r"^could not load .*: can't start new thread$"):
            await engine.start()
        assert engine.pid is None

    asyncio.run(main())


def test_an_engine_runs_no_file_of_the_directory_that_the_service_is_started_in(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('somebody else’s code')")
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        try:
            await engine.start()
        finally:
            await engine.close()

    asyncio.run(main())


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.reasoning_content %}<think>\n"
    "{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_what_a_model_thinks_goes_on_as_that(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp takes it out of the text of an answer, and counts it."""
    weights = tmp_path / "thinking.gguf"
    monkeypatch.setattr(sys, "argv", ["", str(embedded_model), str(weights), "--chat-template", THINKING, "--force"])
    gguf_new_metadata.main()
    chat = replace(HELLO, max_tokens=12, temperature=0.0, ignore_eos=True)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"

    async def main() -> tuple[list[Delta], Finished, str]:
        engine = LlamaEngine(weights, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        try:
            *events, finished = [*singly([event async for batch in engine.generate(chat) for event in batch])]
            same = [
                event async for batch in engine.generate(replace(chat, messages=None, text=prompt)) for event in batch
            ]
        finally:
            await engine.close()
        assert isinstance(finished, Finished)
        text = "".join(event.text for event in singly(same) if isinstance(event, Delta))
        return [event for event in events if isinstance(event, Delta)], finished, text

    try:
        deltas, finished, text = asyncio.run(main())
    finally:
        weights.unlink()
    assert "".join(delta.reasoning for delta in deltas).strip() == text.strip() != ""
    assert not any(delta.text for delta in deltas)
    assert deltas[-1].completion_tokens == finished.usage.completion_tokens == finished.usage.reasoning_tokens == 12


@pytest.mark.parametrize("is_unified", [False, True])
def test_a_context_is_as_long_as_was_said_though_the_engine_rounds_it_up(
    embedded_model: Path, is_unified: bool
) -> None:
    whole = Generation(max_tokens=400, text="Hi" * 20, ignore_eos=True)

    async def main() -> None:
        options = LlamaOptions(context_length=100, num_slots=2, tuning=LlamaTuning(is_unified=is_unified))
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        try:
            assert engine.context_length == 100
            *_, finished = [event async for batch in engine.generate(whole) for event in batch]
            assert isinstance(finished, Finished)
            assert finished.usage.prompt_tokens + finished.usage.completion_tokens == 100
            assert finished.reasons == {0: "length"}
            with pytest.raises(ContextLengthExceeded, match="is 100 tokens"):
                await anext(engine.generate(replace(whole, text="Hi" * 100)))
        finally:
            await engine.close()

    asyncio.run(main())


def without_tokenizer(path: Path) -> Path:
    """A model of one layer that llama.cpp loads, and knows no text for."""
    writer, width = gguf.GGUFWriter(path, "llama"), 32
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(100)
    writer.add_tensor("token_embd.weight", np.ones((100, width), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_without_a_tokenizer_is_refused_when_it_starts(tmp_path: Path) -> None:
    weights = without_tokenizer(tmp_path / "m.gguf")

    async def main() -> None:
        engine = LlamaEngine(weights, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        try:
            with pytest.raises(EngineFailed, match=r"m\.gguf has no tokenizer"):
                await engine.start()
            assert engine.pid is None
        finally:
            await engine.close()

    asyncio.run(main())


async def told(engine: LlamaEngine) -> int:
    """Tokens of an answer."""
    events = [event async for batch in engine.generate(HELLO) for event in batch]
    (finished,) = [event for event in events if isinstance(event, Finished)]
    return finished.usage.completion_tokens


def test_it_changes_when_nothing_runs_and_who_comes_meanwhile_waits(embedded_model: Path) -> None:
    before = LlamaOptions(context_length=512, num_slots=1)
    after = replace(before, num_slots=2, tuning=LlamaTuning(flash_attention="off"))

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=before)
        await engine.start()
        try:
            pid = engine.pid
            running = engine.generate(replace(HELLO, max_tokens=40, ignore_eos=True))
            await anext(running)
            changing = asyncio.create_task(engine.change(embedded_model, after))
            await asyncio.sleep(0.05)
            assert engine.pid == pid
            assert [event async for batch in running for event in batch][-1].usage.completion_tokens == 40
            while engine.pid == pid:
                await asyncio.sleep(0)
            waiting = [asyncio.create_task(told(engine)) for _ in range(3)]
            counting = asyncio.create_task(engine.count_tokens(HELLO))
            assert engine.is_ready
            await changing
            assert all(await asyncio.gather(*waiting))
            assert await counting
            assert (engine.is_ready, engine.num_slots, engine.options) == (True, 2, after)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)  # it is watched as before
            await until(engine, False, 5)
            await until(engine, True, 30)
            assert engine.num_restarts == 1
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_change_that_nobody_asks_for_any_more_ends_for_those_who_wait_for_it(
    embedded_model: Path, is_closed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the service is to end, and drains: only the end of that ends a change."""
    options = LlamaOptions(context_length=512, num_slots=1)

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        try:
            pid = engine.pid
            changing = asyncio.create_task(engine.change(embedded_model, options))
            while engine.pid in (pid, None):
                await asyncio.sleep(0)
            process, waiting = engine._process, asyncio.create_task(told(engine))
            await asyncio.sleep(0)
            changing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await changing
            if is_closed:
                await engine.close()
                with pytest.raises(Refusal, match="The engine is starting again"):
                    await waiting
                assert process is not None
                assert (process.returncode, engine.pid, engine.is_ready) == (-9, None, False)
                assert not engine._place.directory.exists()
                assert "did not start" not in caplog.text
            else:
                assert await waiting
                assert (engine._process, engine.num_restarts) == (process, 0)
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.model
def test_who_stands_in_line_behind_slow_readers_waits_for_those(embedded_model: Path) -> None:
    async def main() -> None:
        options = LlamaOptions(context_length=512, num_slots=2, stall_seconds=1)
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        try:
            readers = [engine.generate(Generation(max_tokens=20, text="Hello", ignore_eos=True)) for _ in range(2)]
            for reader in readers:
                await anext(reader)
            behind = asyncio.create_task(anext(engine.generate(Generation(max_tokens=1, text="Hi"))))
            await asyncio.sleep(3)
            assert not behind.done()
            for reader in readers:
                assert [batch async for batch in reader]
            assert await asyncio.wait_for(behind, 20)
            assert engine.num_restarts == 0
        finally:
            await engine.close()

    asyncio.run(main())


def test_an_engine_that_waits_for_who_reads_its_answer_is_no_engine_that_hangs(embedded_model: Path) -> None:
    long = replace(HELLO, max_tokens=100, ignore_eos=True)

    async def main() -> None:
        options = LlamaOptions(context_length=512, num_slots=2, stall_seconds=1.0)
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        try:
            slow = engine.generate(long)
            await anext(slow)
            await asyncio.sleep(2.5)
            assert engine.num_restarts == 0
            assert [event async for batch in slow for event in batch][-1].usage.completion_tokens == 100

            slow = engine.generate(long)
            await anext(slow)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)  # now it hangs, and somebody waits for it
            with pytest.raises(Refusal):
                async with asyncio.timeout(10):
                    await told(engine)
            await slow.aclose()
            await until(engine, True, 60)
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.slow
def test_an_engine_that_was_stopped_together_with_the_service_does_not_hang(embedded_model: Path) -> None:
    async def main() -> None:
        options = LlamaOptions(context_length=512, num_slots=1, stall_seconds=2.0)
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        try:
            pid = engine.pid
            assert pid is not None
            telling = asyncio.create_task(told(engine))
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            time.sleep(3.0)  # noqa: ASYNC251  # as where we are all stopped: nobody looks
            asyncio.get_running_loop().call_later(0.7, os.kill, pid, signal.SIGCONT)  # after a look, and in time
            assert await telling
            assert (engine.pid, engine.num_restarts) == (pid, 0)
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("what", ["socket", pytest.param("directory", marks=pytest.mark.slow)])
def test_an_engine_that_has_lost_its_socket_is_started_again(
    embedded_model: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        try:
            if what == "socket":
                os.unlink(engine._place.socket)
            else:
                shutil.rmtree(engine._place.directory)
            await until(engine, False, 5)
            await until(engine, True, 60)
            assert await told(engine)
        finally:
            await engine.close()

    asyncio.run(main())
    assert "has lost its socket" in caplog.text


def test_a_place_too_deep_for_a_socket_is_said_and_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    room = 107 - len("/octoai-sock-12345678/e.sock")  # of what a socket's path may be
    short, deep = (Path(tempfile.mkdtemp()) for _ in range(2))
    try:
        for place, length in ((short, room), (deep, room + 1)):
            (inner := place / ("d" * (length - len(str(place)) - 1))).mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(inner))
            if place == deep:
                with pytest.raises(OSError, match=f"no socket can be in {inner}: set a shorter TMPDIR"):
                    SocketPlace()
                assert not list(inner.iterdir())
            else:
                made = SocketPlace()
                with socket.socket(socket.AF_UNIX) as bound:
                    bound.bind(made.socket)
                made.remove()
    finally:
        shutil.rmtree(short)
        shutil.rmtree(deep)


@pytest.mark.slow
def test_who_comes_and_leaves_gives_an_engine_that_hangs_no_more_time(embedded_model: Path) -> None:
    async def main() -> None:
        options = LlamaOptions(context_length=512, num_slots=4, stall_seconds=1.0)
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        asking: list[asyncio.Task[Any]] = []

        async def ask() -> None:
            with suppress(TimeoutError, Refusal):
                async with asyncio.timeout(0.9):
                    await told(engine)

        try:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)
            async with asyncio.timeout(8):
                while engine.num_restarts == 0:
                    asking.append(asyncio.create_task(ask()))
                    await asyncio.sleep(0.3)
            await until(engine, True, 60)
        finally:
            await asyncio.gather(*asking)
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "num_words", [pytest.param(2, id="short"), pytest.param(400_000, id="long", marks=pytest.mark.slow)]
)
def test_prompts_that_are_counted_give_an_engine_that_hangs_no_more_time(num_words: int, embedded_model: Path) -> None:
    """Short ones one after another, or a long one that has been counted."""
    prompt = Generation(max_tokens=1, text="word " * num_words)

    async def main() -> None:
        options = LlamaOptions(context_length=512, num_slots=2, stall_seconds=1.0)
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        counting: list[asyncio.Task[int | None]] = []
        try:
            assert await engine.count_tokens(prompt) == num_words + 1
            assert engine.num_restarts == 0
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)
            waiting = asyncio.create_task(told(engine))
            async with asyncio.timeout(8):
                while not waiting.done():
                    await asyncio.sleep(0.3)
                    if num_words == 2:
                        counting.append(asyncio.create_task(engine.count_tokens(prompt)))
            with pytest.raises(Refusal):
                await waiting
            await until(engine, True, 60)
        finally:
            for task in counting:
                task.cancel()
            await asyncio.gather(*counting, return_exceptions=True)
            await engine.close()

    asyncio.run(main())


def test_the_slot_of_an_answer_is_free_before_its_end_is_read(embedded_model: Path) -> None:
    async def main() -> None:
        options = LlamaOptions(context_length=512, num_slots=1)
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        try:
            slow = engine.generate(HELLO)
            while not isinstance((await anext(slow))[-1], Finished):
                pass
            async with asyncio.timeout(10):
                assert await told(engine)
            assert [batch async for batch in slow] == []
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_replaced", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_engine_is_started_again_with_the_files_it_had(
    embedded_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_replaced: bool
) -> None:
    """A newer profile takes their place in the cache; what is there by now, nobody has checked."""
    weights = tmp_path / "made.gguf"
    shutil.copy(embedded_model, weights)

    async def main() -> str:
        engine = LlamaEngine(weights, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        try:
            if is_replaced:
                (tmp_path / "other.gguf").write_bytes(b"GGUF of somebody else")
                (tmp_path / "other.gguf").replace(weights)
            else:
                weights.unlink()
            await asyncio.sleep(1.5)  # it is looked at each second, also while nobody asks
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(engine, False, 5)
            await until(engine, True, 30)
            assert await told(engine)
            return str(engine._place.directory)
        finally:
            await engine.close()

    directory = asyncio.run(main())
    assert not Path(directory).exists()
    assert f"{weights} is not what it was when it was loaded, or gone" in caplog.text
    assert not [each for each in os.listdir("/proc/self/fd") if str(weights) in link(each)]


def link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def test_what_is_replaced_while_it_loads_is_held_as_it_was_when_that_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes minutes; after a crash it is the same again, not what was put there for the next start."""
    (weights := tmp_path / "weights").write_text("first")
    (links := tmp_path / "links").mkdir()

    async def spawn(_: LlamaEngine) -> None:
        (tmp_path / "other").write_text("other")
        (tmp_path / "other").replace(weights)

    async def main() -> None:
        engine = LlamaEngine(weights, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        assert engine.files.path(weights, links).read_text() == "first"
        await engine.close()

    monkeypatch.setattr(LlamaEngine, "_spawn", spawn)
    asyncio.run(main())


def test_files_that_are_held_can_be_read_as_they_were_and_others_are_let_go(tmp_path: Path) -> None:
    first, second, links = tmp_path / "first", tmp_path / "second", tmp_path / "links"
    links.mkdir()
    first.write_text("one")
    second.write_text("two")
    files = HeldFiles()
    files.hold(first, None, tmp_path / "missing")
    files.hold(first, second)
    assert files.path(first, links) == first
    first.unlink()
    (tmp_path / "other").write_text("of somebody else")
    (tmp_path / "other").replace(second)
    assert [files.path(path, links).read_text() for path in (first, second)] == ["one", "two"]
    files.hold()
    assert files.path(second, links) == second
    assert not (links / "second").exists()


@pytest.mark.parametrize("text", ["other", "longer than before"])
def test_a_file_that_is_overwritten_is_said_to_be_unchecked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """As `cp` and `curl -o` do: what is held open changes too."""
    (weights := tmp_path / "weights").write_text("first")
    os.utime(weights, ns=(1, 1))
    files = HeldFiles()
    files.hold(weights)
    assert files.path(weights, tmp_path) == weights
    assert not caplog.messages
    weights.write_text(text)
    assert files.path(weights, tmp_path) == weights
    assert caplog.messages == [
        f"{weights} was overwritten since it was loaded: it is used as it is now, unchecked until the next start"
    ]
    files.hold()


def test_a_model_in_several_files_is_held_whole_and_found_by_their_names(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_text("one")
    second.write_text("two")
    (links := tmp_path / "links").mkdir()
    files = HeldFiles()
    files.hold(first)
    second.unlink()
    assert [part.read_text() for part in parts(files.path(first, links))] == ["one", "two"]
    files.hold()


@pytest.mark.parametrize("damage", [pytest.param("missing", marks=pytest.mark.slow), "no model"])
def test_what_cannot_be_changed_to_changes_nothing(embedded_model: Path, tmp_path: Path, damage: str) -> None:
    weights = tmp_path / "other.gguf"
    if damage == "no model":
        weights.write_bytes(b"nothing")
    before = LlamaOptions(context_length=512, num_slots=1)

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=before)
        await engine.start()
        try:
            changing = asyncio.create_task(engine.change(weights, replace(before, num_slots=2)))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(told(engine))
            with pytest.raises(EngineFailed, match=r"could not change to .*other\.gguf"):
                await changing
            assert await waiting
            assert await told(engine)
            assert (engine.weights, engine.options, engine.num_slots) == (embedded_model, before, 1)
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("spin_count", [None, 0, 300])
def test_a_child_starts_in_the_services_own_loop_however_its_threads_wait(spin_count: int | None) -> None:
    async def main() -> None:
        environ = environment(LlamaTuning(spin_count=spin_count))
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", "", env=environ)
        assert await child.wait() == 0

    uvloop.run(main())


@pytest.mark.parametrize("damage", ["missing", "no library", "a library of something else", "for others to write"])
def test_where_kernels_do_not_load_those_of_the_wheel_answer(
    embedded_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    kernels = tmp_path / "kernels.so"
    if damage == "no library":
        kernels.write_bytes(b"nothing")
    elif damage == "a library of something else":
        shutil.copy(next(Path(sys.base_prefix).rglob("_json.cpython*.so")), kernels)
    elif damage == "for others to write":  # as when another's directory was put in the place of the one looked at
        kernels.write_bytes(b"somebody else's code")
        kernels.chmod(0o666)

    async def main() -> None:
        tuning = LlamaTuning(kernels=kernels, is_unified=True)
        options = LlamaOptions(context_length=512, num_slots=1, tuning=tuning)
        engine = LlamaEngine(embedded_model, model="m", options=options)
        await engine.start()
        try:
            assert engine.options.tuning == LlamaTuning()  # the wheel's attention is slower over one cache for all
            events = [event async for batch in engine.generate(HELLO) for event in batch]
            assert any(isinstance(event, Delta) for event in events)
        finally:
            await engine.close()

    asyncio.run(main())
    why = "loaded: others can write it" if damage == "for others to write" else "a library of kernels"
    assert f"{kernels} is not {why}" in caplog.text, caplog.messages
    assert "trying the kernels of llama.cpp's wheel" in caplog.text


def test_kernels_that_do_not_run_any_more_are_those_of_the_wheel_after_a_crash(
    embedded_model: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        await engine.start()
        try:
            kernels = tmp_path / "kernels.so"
            wished = replace(engine.options, tuning=LlamaTuning(kernels=kernels, is_unified=True))
            engine._use(engine.weights, wished)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(engine, False, 5)
            await until(engine, True, 30)
            assert engine.options.tuning == LlamaTuning()
            assert engine._wished == wished  # at the next start they are tried again
        finally:
            await engine.close()

    asyncio.run(main())


STAND_IN = """
import os, signal, sys
sys.stdin.readline()
print("no memory" if {status} else "", file=sys.stderr)
os.kill(os.getpid(), -{status}) if {status} < 0 else sys.exit({status})
"""


@pytest.mark.parametrize(
    ("status", "is_for_kernels"),
    [(-signal.SIGKILL, False), (1, False), (NO_KERNELS, True), (-signal.SIGILL, True)],
)
def test_kernels_are_given_up_only_where_it_is_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int, is_for_kernels: bool
) -> None:
    """And not where there was no memory for a moment."""
    (tmp_path / "model.gguf").write_bytes(b"nothing")

    async def child(_environ: object) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        program = STAND_IN.format(status=int(status))
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program), stdin=pipe, stdout=pipe, stderr=pipe
        )

    monkeypatch.setattr(llama, "_child", child)
    tuning = LlamaTuning(kernels=tmp_path / "kernels.so", is_unified=True)

    async def main() -> None:
        engine = LlamaEngine(tmp_path / "model.gguf", model="m", options=LlamaOptions(512, tuning=tuning))
        with pytest.raises(EngineFailed) as failed:
            await engine.start()
        assert f"(exit status {int(status)}): no memory" in failed.value.message
        assert engine.options.tuning == tuning

    asyncio.run(main())
    assert ("trying the kernels of llama.cpp's wheel" in caplog.text) is is_for_kernels


async def stand_in(program: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdin=pipe, stdout=pipe, stderr=pipe)


def test_a_child_that_hangs_while_it_loads_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    monkeypatch.setattr(loading, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(loading, "STILL_SECONDS", 0.5)
    monkeypatch.setattr(llama, "_child", lambda _: stand_in("import time; time.sleep(600)"))

    async def main() -> None:
        engine = LlamaEngine(tmp_path / "model.gguf", model="m", options=LlamaOptions(context_length=512))
        async with asyncio.timeout(20):
            with pytest.raises(EngineFailed, match=r"could not load .*model\.gguf \(exit status -9\)"):
                await engine.start()
        assert engine.pid is None

    asyncio.run(main())
    assert "did nothing for" in caplog.text


BUSY = """
import time
began = time.monotonic()
while time.monotonic() < began + 2.5:
    {does}
print("listening", flush=True)
"""


@pytest.mark.parametrize("does", ["pass", "open('/proc/self/cmdline').read(); time.sleep(0.05)"])
def test_a_child_that_does_something_has_all_the_time_it_takes_to_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, does: str
) -> None:
    monkeypatch.setattr(loading, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(loading, "STILL_SECONDS", 1.0)
    monkeypatch.setattr(loading, "SAY_SECONDS", 1.0)

    async def main() -> bytes:
        process = await stand_in(BUSY.format(does=does))
        line = await loading.first_line(process, "m")
        assert await process.wait() == 0
        return line

    assert asyncio.run(main()) == b"listening\n"
    said = [each for each in caplog.messages if "has been loading for" in each]
    assert 1 <= len(said) <= 3


def test_a_child_that_cannot_be_made_leaves_no_directory(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def child(_environ: object) -> asyncio.subprocess.Process:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(llama, "_child", child)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        engine = LlamaEngine(embedded_model, model="m", options=LlamaOptions(context_length=512, num_slots=1))
        with pytest.raises(EngineFailed, match="Too many open files"):
            await engine.start()

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


RUNNING = """
import asyncio, sys
from pathlib import Path
from octoai.server.engines.llama.engine import LlamaEngine
from octoai.server.engines.llama.options import LlamaOptions
async def main():
    engine = LlamaEngine(Path(sys.argv[1]), model="m", options=LlamaOptions(context_length=512, num_slots=1))
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_child_of_a_service_that_is_killed_leaves_no_directory_and_does_not_live_on(embedded_model: Path) -> None:
    place = Path(tempfile.mkdtemp())  # short: a socket's path is
    environ = {**os.environ, "TMPDIR": str(place)}
    try:
        with subprocess.Popen(
            [sys.executable, "-c", RUNNING, str(embedded_model)], stdout=subprocess.PIPE, text=True, env=environ
        ) as service:
            assert service.stdout is not None
            pid = service.stdout.readline().strip()
            assert len(list(place.iterdir())) == 1
            service.kill()
        until_true(lambda: not Path(f"/proc/{pid}/cwd").exists() and not list(place.iterdir()))
    finally:
        shutil.rmtree(place)


MAKING = """
import sys, time
from octoai.server.engines.llama.socket_place import SocketPlace
place = SocketPlace()
open(place.socket, "w").close()
print(place.directory, flush=True)
sys.stdin.read()
"""


def test_directories_of_those_who_were_killed_with_their_children_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pipe, environ = subprocess.PIPE, {**os.environ, "TMPDIR": str(tmp_path)}
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKING], stdin=pipe, stdout=pipe, text=True, env=environ)
        for _ in range(4)
    ]
    left, filled, young, held = (Path(str(each.stdout and each.stdout.readline().strip())) for each in makers)
    for each in makers[:3]:
        each.kill()
    for each in makers[:3]:
        each.communicate()
    other, elsewhere, linked = tmp_path / "octoai-1", tmp_path / "elsewhere", tmp_path / "octoai-sock-link"
    other.mkdir()
    elsewhere.mkdir()
    (elsewhere / "e.sock").touch()
    linked.symlink_to(elsewhere)
    (filled / "of somebody").touch()
    (left / "model.gguf").symlink_to(elsewhere / "e.sock")  # as of files that an engine had, but not in their place
    for each in (left, filled, held, other, elsewhere):
        os.utime(each, (0, 0))
    try:
        place = SocketPlace()
        assert sorted(tmp_path.iterdir()) == sorted([filled, young, held, other, elsewhere, linked, place.directory])
        assert (held / "e.sock").exists()
        assert (elsewhere / "e.sock").exists()
        place.remove()
        assert not place.directory.exists()
    finally:
        makers[3].communicate("")


def until_true(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_not_even_those_of_the_wheel_run_the_kernels_are_tried_again(tmp_path: Path) -> None:
    options = LlamaOptions(context_length=512, tuning=LlamaTuning(kernels=tmp_path / "kernels.so", is_unified=True))

    async def main() -> None:
        (tmp_path / "model.gguf").write_bytes(b"nothing")
        engine = LlamaEngine(tmp_path / "model.gguf", model="m", options=options)
        with pytest.raises(EngineFailed, match="could not load"):
            await engine.start()
        assert engine.options == options
        await engine.close()

    asyncio.run(main())
