"""OctoAI's own SDKs as published, 1.11.0 for Python and for TypeScript, against the service.

Each in an environment of its own: the Python one owns the same import name as ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import Serve

pytestmark = [pytest.mark.compat, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(300)]

PYTHON_PROGRAM = """
import asyncio, json, os
from octoai.client import AsyncOctoAI, OctoAI
from octoai.core import ApiError
from octoai.environment import OctoAIEnvironment
from octoai.text_gen import *

url, token, model = os.environ["URL"], os.environ["TOKEN"], "meta-llama-3-8b-instruct"
settings = dict(api_key=token, environment=OctoAIEnvironment(default=url, image_gen=url, text_gen=url))
text_gen = OctoAI(**settings).text_gen
greedy = {"temperature": 0}  # or the model may end its answer before `max_tokens`
messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Write a blog about Seattle")]
nothing = dict(stop=None, tools=None, response_format=None, logit_bias=None, peft=None, user=None)
seen = {}
seen["chat"] = text_gen.create_chat_completion(model=model, messages=messages, max_tokens=8, **greedy, **nothing).dict()
seen["stream"] = [chunk.dict() for chunk in text_gen.create_chat_completion_stream(
    model=model, messages=messages, max_tokens=8, **greedy, stream_options=StreamOptions(include_usage=True))]
seen["completion"] = text_gen.create_completion(
    model=model, prompt="Hello my", max_tokens=4, **greedy, logprobs=2).dict()
seen["completions"] = [c.dict() for c in text_gen.create_completion_stream(
    model=model, prompt="Hello my", max_tokens=4, **greedy)]
schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
seen["json"] = text_gen.create_chat_completion(model=model, max_tokens=60, **greedy, messages=[ChatMessage(role="user", content=[
    ChatMessageContentItem_Text(text="Hi")])], response_format=ChatCompletionResponseFormat(type="json_object", schema=schema)).dict()

async def count():
    chunks = AsyncOctoAI(**settings).text_gen.create_chat_completion_stream(model=model, messages=messages, max_tokens=8, **greedy)
    return len([chunk async for chunk in chunks])
seen["async"] = asyncio.run(count())

errors = {}
for name, change in {"model": {"model": "no-such"}, "range": {"temperature": 9}}.items():
    try:
        text_gen.create_chat_completion(**{"model": model, "messages": messages, **change})
    except ApiError as error:
        errors[name] = [type(error).__name__, error.status_code]
seen["errors"] = errors
print(json.dumps(seen))
"""

TYPESCRIPT_PROGRAM = """
const { OctoAIClient } = require("@octoai/sdk");
const url = process.env.URL_, model = "meta-llama-3-8b-instruct";
const client = new OctoAIClient({ apiKey: process.env.TOKEN, environment: { default: url, imageGen: url, textGen: url } });
const messages = [{ role: "user", content: "Write a blog about Seattle 😀 你好 [DONE]" }];
(async () => {
  const seen = { chunks: 0, text: "" };
  seen.chat = await client.textGen.createChatCompletion({ model, messages, maxTokens: 8, temperature: 0 });
  for await (const chunk of await client.textGen.createChatCompletionStream({ model, messages, maxTokens: 8, temperature: 0 })) {
    seen.chunks += 1;
    seen.text += chunk.choices[0].delta.content;
  }
  try { await client.textGen.createChatCompletion({ model: "no-such", messages }); }
  catch (error) { seen.error = error.statusCode; }
  console.log(JSON.stringify(seen));
})();
"""


def environ(served: Serve) -> dict[str, str]:
    return {**os.environ, "URL": served.url, "URL_": served.url, "TOKEN": served.token}


def test_the_original_python_sdk(served: Serve, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "octoai==1.11.0"], check=True)
    ran = subprocess.run(
        [python, "-c", PYTHON_PROGRAM], env=environ(served), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["chat"]["usage"]["completion_tokens"] == 8
    assert seen["stream"][-1]["usage"]["completion_tokens"] == 8
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in seen["stream"])
    assert len(seen["completion"]["choices"][0]["logprobs"]["content"]) == 4
    assert seen["completions"][-1]["choices"][0]["finish_reason"] == "length"
    assert isinstance(json.loads(seen["json"]["choices"][0]["message"]["content"])["a"], bool)
    assert seen["async"] > 5
    assert seen["errors"] == {"model": ["ApiError", 404], "range": ["UnprocessableEntityError", 422]}


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node.js and npm")
def test_the_original_typescript_sdk(served: Serve, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("{}")
    subprocess.run(["npm", "install", "--silent", "--no-audit", "@octoai/sdk@1.11.0"], cwd=tmp_path, check=True)
    ran = subprocess.run(
        ["node", "-e", TYPESCRIPT_PROGRAM],
        env=environ(served),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["chat"]["usage"]["completionTokens"] == 8
    assert seen["chunks"] > 2  # a character of several tokens comes as one
    assert seen["text"] == seen["chat"]["choices"][0]["message"]["content"]
    assert seen["error"] == 404
