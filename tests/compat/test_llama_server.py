"""In front of llama.cpp's own HTTP server over TCP, as somebody else's `llama-server` would be, with its key."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from octoai.client import OctoAI
from octoai.text_gen import ChatMessage
from tests.asking import CHAT, Client, Raw, is_ready
from tests.running import Serve
from tests.talking import until

pytestmark = [pytest.mark.compat, pytest.mark.model]

WINDOW = 256
NUM_SLOTS = 2
SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, port, key, slots, context = sys.argv[1:]
params.hostnames, params.port, params.api_keys, params.model_alias = ["127.0.0.1"], int(port), [key], {"smol"}
params.n_parallel, params.n_ctx = int(slots), int(slots) * int(context)
params.n_batch = params.n_ubatch = 64
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # two wait for each other
params.endpoint_metrics, params.ui, params.ctx_shift, params.verbosity = True, False, False, 1
server = xllamacpp.Server(params)
time.sleep(3600)
"""


class LlamaServer:
    """`url` and `token` are as a client of it needs them."""

    token = "upstream-secret"

    def __init__(self, weights: Path, place: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.weights = weights
        self.log = place / "llama-server.log"
        self.start()

    def start(self) -> None:
        arguments = [str(self.weights), str(self.port), self.token, str(NUM_SLOTS), str(WINDOW)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", SERVER, *arguments], stdout=log, stderr=log)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return Client(self).send("/v1/models")[0] == 200  # type: ignore[arg-type]
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def llama(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    running = LlamaServer(embedded_model, tmp_path_factory.mktemp("llama-server"))
    until(running.answers, 30)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def service(llama: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    place = tmp_path_factory.mktemp("before-llama-server")
    (place / "octoai.toml").write_text(
        f"""
        [[models]]
        id = "{CHAT["model"]}"
        engine_url = "{llama.url}/v1"
        upstream_model = "smol"
        engine_key_env = "UPSTREAM_KEY"
        dialect = "llama.cpp"
        num_slots = {NUM_SLOTS}
        """
    )
    running = Serve(place, "--config", "octoai.toml", environ={"UPSTREAM_KEY": llama.token})
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(service: Serve) -> Client:
    return Client(service)


@pytest.fixture
def upstream(llama: LlamaServer) -> Client:
    """llama.cpp itself, asked without us."""
    return Client(llama)  # type: ignore[arg-type]


# What the service says at its defaults: the server's own are others.
DEFAULTS = {"top_k": 0, "top_p": 1, "min_p": 0, "repeat_last_n": 2048}
RANDOM = {"temperature": 1.5, "seed": 3}
LOOPING = {"temperature": 0, "max_tokens": 40}


@pytest.mark.parametrize(
    ("base", "change", "theirs"),
    [
        (RANDOM, {"top_p": 0.1}, {}),
        (RANDOM, {"top_k": 1}, {}),
        (RANDOM, {"min_p": 0.5}, {}),
        (RANDOM, {"seed": 4}, {}),
        (LOOPING, {"frequency_penalty": 2.0}, {}),
        (LOOPING, {"presence_penalty": 2.0}, {}),
        (LOOPING, {"repetition_penalty": 1.8}, {"repeat_penalty": 1.8}),
        (LOOPING, {"stop": ["city"]}, {}),
        (LOOPING, {"logit_bias": {"57": 100}}, {}),
    ],
    ids="+".join,
)
def test_every_sampling_parameter_is_honoured(
    client: Client, upstream: Client, base: Any, change: Any, theirs: Any
) -> None:
    def said(answer: Any) -> Any:
        (choice,) = answer["choices"]
        usage = answer["usage"]
        return choice["message"]["content"], choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"]

    ours = said(client.chat(**{**base, **change}))
    body = {**CHAT, **DEFAULTS, "model": "smol", **base, **change, **theirs}
    assert ours == said(upstream.ask("/v1/chat/completions", body))
    assert ours[0] != said(client.chat(**base))[0]


def test_choices_streams_and_logprobs_are_counted(client: Client) -> None:
    params = {**RANDOM, "ignore_eos": True, "n": 3, "logprobs": True, "top_logprobs": 2}
    whole = client.chat(**params)
    chunks = client.stream(**params, stream_options={"include_usage": True})
    counts = ("prompt_tokens", "completion_tokens")
    assert [chunks[-1]["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
    assert whole["usage"]["completion_tokens"] == 3 * CHAT["max_tokens"]
    for choice in whole["choices"]:
        streamed = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"]["content"] for c in streamed) == choice["message"]["content"]
        assert len(choice["logprobs"]["content"]) == CHAT["max_tokens"]
    assert all("timings" not in chunk and "prompt_progress" not in chunk for chunk in chunks)


def test_ignore_eos_schema_prefill_and_characters(client: Client) -> None:
    hi = [{"role": "user", "content": "Say hi"}]
    assert client.chat(messages=hi, max_tokens=60, ignore_eos=True)["usage"]["completion_tokens"] == 60
    schema = {"type": "object", "properties": {"city": {"enum": ["Seattle", "Rome"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    answer = client.chat(response_format=form, max_tokens=80)
    assert json.loads(answer["choices"][0]["message"]["content"])["city"] in ("Seattle", "Rome")
    prefilled = [*CHAT["messages"], {"role": "assistant", "content": "Rain again. Seattle"}]
    extra = client.chat(messages=prefilled)["usage"]["prompt_tokens"] - client.chat()["usage"]["prompt_tokens"]
    assert 1 <= extra <= 6, "the prompt ends inside the message"
    asked = [{"role": "user", "content": "Repeat after me: 😀😃😄 你好世界"}]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in client.stream(messages=asked, max_tokens=30))
    assert any(ord(character) > 0x1F000 for character in text)
    assert "�" not in text


def test_what_cannot_be_honoured_is_refused_by_name(client: Client) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    wrong = {"type": "json_object", "schema": {"type": "no-such-type"}}
    for change, param in (({"tools": tools}, "tools"), ({"response_format": wrong}, "response_format")):
        status, answer = client.refused({**CHAT, **change})
        assert (status, answer["param"]) == (400, param)


def test_the_window(client: Client) -> None:
    fits = {"model": CHAT["model"], "prompt": [957] * (WINDOW - 30), "temperature": 0, "ignore_eos": True}
    for more in ({}, {"max_tokens": 5000}):
        answer = client.ask("/v1/completions", {**fits, **more})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert WINDOW - 1 <= answer["usage"]["total_tokens"] <= WINDOW
    for stream in (False, True):
        status, answer = client.refused({**fits, "prompt": [957] * 700, "stream": stream}, "/v1/completions")
        assert (status, answer["code"]) == (400, "context_length_exceeded")
        assert f"context length is {WINDOW} tokens" in answer["message"]
        assert "700 tokens" in answer["message"]


def num_running(upstream: Client) -> float:
    rows = upstream.send("/metrics")[2].decode().splitlines()
    return sum(float(row.split()[1]) for row in rows if row.startswith("llamacpp:requests_"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_slot_within_a_second(client: Client, upstream: Client, stream: bool) -> None:
    until(lambda: num_running(upstream) == 0, 5)
    request = Raw(client, {**CHAT, "max_tokens": 1500, "ignore_eos": True, "stream": stream})
    until(lambda: num_running(upstream) == 1, 5)
    time.sleep(0.3)
    request.socket.close()
    until(lambda: num_running(upstream) == 0, 1)


def test_the_openai_client_and_our_own(service: Serve) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.token, max_retries=0) as client:
        text = client.chat.completions.create(**CHAT).choices[0].message.content
        with client.chat.completions.create(**CHAT, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content for chunk in stream) == text
    params: Any = {**CHAT, "messages": [ChatMessage(**message) for message in CHAT["messages"]]}
    with OctoAI(api_key=service.token, base_url=service.url) as ours:
        chunks = list(ours.text_gen.create_chat_completion_stream(**params))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text


@pytest.mark.slow
def test_when_the_server_is_killed_streams_break_and_service_returns_with_it(
    client: Client, llama: LlamaServer
) -> None:
    stream = Raw(client, {**CHAT, "max_tokens": 1500, "ignore_eos": True, "stream": True})
    stream.read_until(b'"content":"S')
    llama.kill()
    answer = stream.read_to_the_end()
    assert json.loads(answer.rstrip().rsplit(b"data: ", 1)[1])["error"]["code"] == "engine_failed"
    assert b"[DONE]" not in answer
    assert not answer.endswith(b"0\r\n\r\n"), "the body must be cut, not ended"
    until(lambda: not is_ready(client), 6)
    llama.start()
    until(lambda: is_ready(client), 30)
    assert client.chat()["usage"]["completion_tokens"] == 12
