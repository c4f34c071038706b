"""In front of a real vLLM: the service answers what vLLM answers, and what vLLM refuses is refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from octoai.client import OctoAI
from octoai.server.engines.base import Finished, Generation
from octoai.server.engines.openai.engine import OpenAIEngine
from octoai.text_gen import ChatMessage
from tests.asking import CHAT, Client, Raw, is_ready
from tests.compat import vllm_env
from tests.conftest import CACHE
from tests.running import Serve
from tests.server.llamas import PROMPTS
from tests.talking import until

# The first test also builds the environment: minutes.
pytestmark = [pytest.mark.slow, pytest.mark.compat, pytest.mark.model, pytest.mark.timeout(1800)]

START_SECONDS = 300
WINDOW = 2048
STEP_TOKENS = 128  # vLLM looks for what has left, and counts, between its steps
SMOL = {**CHAT, "model": "smol"}  # as vLLM knows it
COMPLETION = {"model": CHAT["model"], "prompt": "Hello my", "max_tokens": 6, "temperature": 0}


class Vllm:
    """`vllm serve` as a process of its own; `url` and `token` are as a client of it needs them."""

    token = "upstream-secret"

    def __init__(self, command: Path, weights: Path, place: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = place / "vllm.log"
        self._environ = {
            **os.environ,
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "VLLM_API_KEY": self.token,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # float32: on a processor without instructions for bfloat16, a prompt of 2,000 tokens takes a minute in that.
        self._arguments = [
            *(str(command), "serve", str(weights), "--served-model-name", "smol"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(WINDOW)),
            *("--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization", "0.4"),
            *("--max-num-batched-tokens", str(STEP_TOKENS), "--max-num-seqs", "64"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details"),
        ]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments, env=self._environ, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return Client(self).send("/v1/models")[0] == 200  # type: ignore[arg-type]
            except OSError:
                return False

        until(answers, START_SECONDS)

    def kill(self) -> None:
        """With its children: the session is its own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def vllm(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    try:
        command = vllm_env.vllm(CACHE)
    except vllm_env.CannotBuild as error:
        pytest.skip(f"no vLLM here: {error}")
    running = Vllm(command, vllm_env.weights(CACHE, embedded_model), tmp_path_factory.mktemp("vllm"))
    try:
        running.wait()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def service(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    place = tmp_path_factory.mktemp("before-vllm")
    (place / "octoai.toml").write_text(
        f"""
        [[models]]
        id = "{CHAT["model"]}"
        engine_url = "{vllm.url}/v1"
        upstream_model = "smol"
        engine_key_env = "UPSTREAM_KEY"
        dialect = "vllm"
        """
    )
    running = Serve(place, "--config", "octoai.toml", environ={"UPSTREAM_KEY": vllm.token})
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(service: Serve) -> Client:
    return Client(service)


@pytest.fixture
def upstream(vllm: Vllm) -> Client:
    """vLLM itself, asked without us."""
    return Client(vllm)  # type: ignore[arg-type]


def said(answer: Any) -> Any:
    """What an answer says, in either's form."""
    choices = [(choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"]]
    usage = answer["usage"]
    return choices, usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]


RANDOM = {"temperature": 1.5, "seed": 3}
LOOPING = {"temperature": 0, "max_tokens": 48}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"temperature": 1.9, "seed": 5}),
        (RANDOM, {"top_p": 0.1}),
        (RANDOM, {"top_k": 1}),
        (RANDOM, {"min_p": 0.5}),
        (RANDOM, {"seed": 4}),
        (RANDOM, {"n": 3}),
        (LOOPING, {"frequency_penalty": 2.0}),
        (LOOPING, {"presence_penalty": 2.0}),
        (LOOPING, {"repetition_penalty": 1.8}),
        (LOOPING, {"stop": ["city"]}),
        (LOOPING, {"logit_bias": {"57": 100}}),
    ],
    ids="+".join,
)
def test_every_sampling_parameter_is_honoured(client: Client, upstream: Client, base: Any, change: Any) -> None:
    ours = said(client.chat(**{**base, **change}))
    assert ours == said(upstream.ask("/v1/chat/completions", {**SMOL, **base, **change}))
    assert ours[0] != said(client.chat(**base))[0]


def test_several_greedy_choices_which_vllm_refuses_are_made(client: Client) -> None:
    one, two = client.chat(), client.chat(n=2)
    assert [choice["message"]["content"] for choice in two["choices"]] == [one["choices"][0]["message"]["content"]] * 2
    assert two["usage"]["completion_tokens"] == 2 * one["usage"]["completion_tokens"]
    assert two["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_ignore_eos_and_min_tokens_go_on(client: Client) -> None:
    params = {"messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 60}
    short = client.chat(**params)
    assert short["choices"][0]["finish_reason"] == "stop"
    assert client.chat(**params, ignore_eos=True)["usage"]["completion_tokens"] == 60
    least = short["usage"]["completion_tokens"] + 5
    assert client.chat(**params, min_tokens=least)["usage"]["completion_tokens"] >= least


@pytest.mark.parametrize("n", [1, 3])
def test_a_streams_usage_is_vllms_and_its_running_count_stays_inside(client: Client, upstream: Client, n: int) -> None:
    params = {**RANDOM, "n": n, "stream_options": {"include_usage": True}}
    chunks = client.stream(**params)
    whole = said(upstream.ask("/v1/chat/completions", {**SMOL, **RANDOM, "n": n}))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == whole[1:]
    texts = ["".join(c["delta"]["content"] for k in chunks for c in k["choices"] if c["index"] == i) for i in range(n)]
    assert texts == [text for text, _ in whole[0]]
    keys = {key for chunk in chunks for key in (*chunk, *chunk["choices"][0], *chunk["choices"][0]["delta"])}
    assert keys == {
        *("id", "object", "created", "model", "choices", "usage"),
        *("index", "delta", "logprobs", "finish_reason", "role", "content"),
    }


def test_cached_tokens_are_reported(client: Client) -> None:
    long = [{"role": "user", "content": f"{time.time()} " + "word " * 500}]
    first, again = (client.chat(messages=long)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2))
    assert first < 100 < again


@pytest.mark.parametrize("content", ["Write a blog about Seattle", "Repeat after me: 🦄🐙"])
def test_logprobs_are_vllms_also_where_a_character_spans_tokens(client: Client, upstream: Client, content: str) -> None:
    params = {"messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": 2}
    ours = client.chat(**params)["choices"][0]["logprobs"]["content"]
    assert ours == upstream.ask("/v1/chat/completions", {**SMOL, **params})["choices"][0]["logprobs"]["content"]
    assert len(ours) == CHAT["max_tokens"]
    streamed = [chunk["choices"][0]["logprobs"] or {"content": []} for chunk in client.stream(**params)]
    assert [token for logprobs in streamed for token in logprobs["content"]] == ours


def test_completions_are_vllms_with_their_logprobs(client: Client, upstream: Client) -> None:
    for change in ({}, {"prompt": [19556, 957]}, {"logprobs": 2}, {"prompt": ["Hello", "Bye"]}):
        ours = client.ask("/v1/completions", {**COMPLETION, **change})
        theirs = upstream.ask("/v1/completions", {**COMPLETION, **change, "model": "smol"})
        for one, other in zip(ours["choices"], theirs["choices"], strict=True):
            assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
            assert other["logprobs"] is None or other["logprobs"].items() <= one["logprobs"].items()
        assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]
        assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_is_followed(client: Client, kind: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Seattle", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"schema": schema} if kind == "json_object" else {"json_schema": {"name": "weather", "schema": schema}}
    answer = client.chat(response_format={"type": kind, **form}, max_tokens=120)
    assert json.loads(answer["choices"][0]["message"]["content"])["city"] in ("Seattle", "Rome")


def test_a_prefilled_answer_is_continued(client: Client) -> None:
    question = {"role": "user", "content": "Describe a person as JSON."}
    prefill = {"role": "assistant", "content": '{"name": "'}
    before = client.chat(messages=[question])["usage"]["prompt_tokens"]
    answer = client.chat(messages=[question, prefill])
    text = answer["choices"][0]["message"]["content"]
    # The prompt ends inside the message: it is longer by the prefill's tokens, without a turn's end and a new turn.
    assert 1 <= answer["usage"]["prompt_tokens"] - before <= 6
    assert '"' in text
    assert not text.lstrip().startswith("{")
    assert client.chat(messages=[question, {**prefill, "content": [{"type": "text", "text": '{"name": "'}]}])
    assert client.chat(messages=[question, {**prefill, "content": ""}])["usage"]["prompt_tokens"] == before
    anew = client.chat(messages=[question, prefill], continue_final_message=False)["usage"]["prompt_tokens"]
    assert anew > answer["usage"]["prompt_tokens"]


def test_a_prompt_is_counted_beforehand_as_vllm_counts_it_afterwards(vllm: Vllm) -> None:
    async def main() -> None:
        engine = OpenAIEngine(f"{vllm.url}/v1", model="smol", dialect="vllm", key=vllm.token)
        try:
            for name, prompt in PROMPTS.items():
                if name in ("no text", "long"):  # vLLM takes no empty prompt, and this one's window is smaller
                    continue
                asked = Generation(max_tokens=1, **prompt)
                events = [event async for batch in engine.generate(asked) for event in batch]
                assert isinstance(events[-1], Finished)
                assert (name, await engine.count_tokens(asked)) == (name, events[-1].usage.prompt_tokens)
        finally:
            await engine.close()

    asyncio.run(main())


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,  # without it vLLM makes the call, with arguments that need not follow the schema
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_forced_tool_call_is_made(client: Client, choice: Any) -> None:
    params = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 100}
    (call,) = client.chat(**params)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    deltas = [chunk["choices"][0]["delta"].get("tool_calls") or [{}] for chunk in client.stream(**params)]
    pieces = [delta[0].get("function", {}).get("arguments") or "" for delta in deltas]
    assert "".join(pieces) == call["function"]["arguments"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"logit_bias": {"4000000": 5}}, "logit_bias"),
        ("chat/completions", {"response_format": {"type": "json_object", "schema": {"type": "no"}}}, "response_format"),
        ("chat/completions", {"tools": [WEATHER], "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            "messages",
        ),
        ("completions", {"prompt": [4000000]}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else None,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_vllm_refuses_is_refused_by_name(client: Client, path: str, body: Any, param: str, stream: bool) -> None:
    base = CHAT if path == "chat/completions" else COMPLETION
    status, answer = client.refused({**base, **body, "stream": stream}, f"/v1/{path}")
    assert (status, answer["param"]) == (400, param), answer


def test_a_prompt_that_fits_is_answered_to_the_windows_end(client: Client) -> None:
    """Also where prompt and `max_tokens` together do not fit, and where `max_tokens` alone does not."""
    fits = {"model": CHAT["model"], "prompt": [957] * (WINDOW - 40), "temperature": 0, "ignore_eos": True}
    for more in ({}, {"max_tokens": 100}, {"max_tokens": 5000}):
        answer = client.ask("/v1/completions", {**fits, **more})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == WINDOW


@pytest.mark.parametrize(("excess", "counted"), [(0, "2048 tokens"), (1, "2049 tokens"), (7000, "9048 tokens")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(
    client: Client, excess: int, counted: str, stream: bool
) -> None:
    body = {**COMPLETION, "prompt": [957] * (WINDOW + excess), "stream": stream}
    status, answer = client.refused(body, "/v1/completions")
    assert (status, answer["code"], answer["param"]) == (400, "context_length_exceeded", "prompt")
    assert re.search(rf"context length is 2048 tokens, but the prompt has (at least )?{counted}", answer["message"])


def test_of_a_text_too_long_vllm_counts_only_to_its_window(client: Client) -> None:
    status, answer = client.refused({**CHAT, "messages": [{"role": "user", "content": "word " * 9000}]})
    assert (status, answer["code"]) == (400, "context_length_exceeded")
    assert "at least 2049 tokens" in answer["message"]


def test_emoji_and_cjk_arrive_whole_in_every_event(client: Client) -> None:
    asked = [{"role": "user", "content": "Repeat after me: 😀😃😄 🦄🐙 你好世界"}]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in client.stream(messages=asked, max_tokens=40))
    assert any(ord(character) > 0x1F000 for character in text)
    assert "�" not in text.rstrip("�")  # the last character may have been cut by max_tokens
    assert text.encode("utf-8")


def num_in_vllm(upstream: Client) -> float:
    rows = upstream.send("/metrics")[2].decode().splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows if row.startswith(names))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("words", [5, 1500], ids=["decoding", "prefill"])
def test_a_client_that_leaves_frees_vllm_within_a_second(
    client: Client, upstream: Client, stream: bool, words: int
) -> None:
    began = time.monotonic()
    client.ask("/v1/completions", {**COMPLETION, "prompt": [957] * STEP_TOKENS, "max_tokens": 1})
    step_seconds = time.monotonic() - began
    long = [{"role": "user", "content": f"{time.time()} " + "word " * words}]
    until(lambda: num_in_vllm(upstream) == 0, 5)
    request = Raw(client, {**CHAT, "messages": long, "max_tokens": 1500, "ignore_eos": True, "stream": stream})
    until(lambda: num_in_vllm(upstream) == 1, 5 + step_seconds)
    time.sleep(0.5)
    assert num_in_vllm(upstream) == 1
    request.socket.close()
    until(lambda: num_in_vllm(upstream) == 0, 1 + step_seconds)


def test_the_openai_client(service: Serve) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.token, max_retries=0) as client:
        answer = client.chat.completions.create(**CHAT)
        with client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == answer.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == 12
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model=CHAT["model"], prompt=[957] * 3000)
        assert raised.value.code == "context_length_exceeded"


def test_our_own_client(service: Serve) -> None:
    params: Any = {**CHAT, "messages": [ChatMessage(role="user", content="Write a blog about Seattle")]}
    with OctoAI(api_key=service.token, base_url=service.url) as client:
        answer = client.text_gen.create_chat_completion(**params)
        chunks = list(client.text_gen.create_chat_completion_stream(**params))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == answer.choices[0].message.content
    assert answer.usage.completion_tokens == 12


def test_when_vllm_is_killed_streams_break_and_service_returns_with_it(client: Client, vllm: Vllm) -> None:
    long = {**CHAT, "max_tokens": 1500, "ignore_eos": True}
    stream, whole = Raw(client, {**long, "stream": True}), Raw(client, long)
    stream.read_until(b'"content":"S')
    vllm.kill()
    answer = stream.read_to_the_end()
    assert json.loads(answer.rstrip().rsplit(b"data: ", 1)[1])["error"]["code"] == "engine_failed"
    assert b"[DONE]" not in answer
    assert not answer.endswith(b"0\r\n\r\n"), "the body must be cut, not ended"
    assert whole.read_to_the_end().startswith(b"HTTP/1.1 502 ")
    until(lambda: not is_ready(client), 6)
    status, headers, _ = client.send("/v1/chat/completions", CHAT)
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    vllm.start()
    until(lambda: is_ready(client), START_SECONDS)
    assert client.chat()["usage"]["completion_tokens"] == 12
