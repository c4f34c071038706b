"""The names there are, what their objects do, and what importing them costs."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path
from typing import Any

import pytest

import octoai
import octoai.text_gen
from octoai.text_gen import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatCompletionResponseFormat,
    ChatMessage,
    MultiModalTextMessage,
)
from octoai.text_gen.client import OMIT
from tests.sdk.misbehaving import answer, chunk

MODULES = ["octoai", "octoai.client", "octoai.core", "octoai.errors", "octoai.text_gen", "octoai.text_gen.client"]
MODULES += ["octoai.text_gen.errors", "octoai.util", "octoai.base_client", "octoai.environment"]


@pytest.mark.parametrize("name", [*MODULES, "octoai.text_gen.types"])
def test_all_is_sorted_and_true(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    for public in module.__all__:
        if public != "pydantic_v1":  # pydantic warns of it on new Pythons
            assert getattr(module, public) is not None
            assert public in dir(module)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def test_every_type_has_its_historical_places() -> None:
    names = set(octoai.text_gen.__all__)
    assert len(names) == 41
    types = importlib.import_module("octoai.text_gen.types")
    assert set(types.__all__) == names - {"InternalServerError", "UnprocessableEntityError"}
    for place, name in [
        ("types.chat_message", "ChatMessage"),
        ("types.chat_completion_delta_tool_call_function", "ChatCompletionDeltaToolCallFunction"),
        ("types.chat_message_content_item", "ChatMessageContentItem_ImageUrl"),
        ("types.validation_error_loc_item", "ValidationErrorLocItem"),
        ("errors.internal_server_error", "InternalServerError"),
        ("errors.unprocessable_entity_error", "UnprocessableEntityError"),
    ]:
        assert getattr(importlib.import_module(f"octoai.text_gen.{place}"), name) is getattr(octoai.text_gen, name)


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert octoai.__version__ == project["project"]["version"]


def fresh(code: str) -> str:
    """What a new Python prints, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_submodules_are_there_after_a_bare_import() -> None:
    fresh("import octoai; octoai.core.ApiError; octoai.environment.OctoAIEnvironment; octoai.text_gen.ChatMessage")


HEAVY = (
    "{'asyncio', 'pydantic', 'httpx2', 'httpx', 'ssl', 'json', 'typing', 'dataclasses', 'functools', 'http', 'email'}"
)


@pytest.mark.parametrize(
    "code", ["import octoai", "from octoai.client import OctoAI, AsyncOctoAI; OctoAI(); AsyncOctoAI()"]
)
def test_nothing_heavy_is_imported_before_the_first_call(code: str) -> None:
    # `-S` and `-E`: what site packages import at start-up is not ours.
    source = str(Path(octoai.__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {source!r}); {code}; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-SE", "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_synchronous_call_does_not_import_asyncio(serve: Any) -> None:
    server = serve(lambda x: x.reply(200, answer()))
    call = "create_chat_completion(model='m', messages=[{'role': 'user', 'content': 'hi'}])"
    code = f"import sys, octoai; octoai.OctoAI(base_url={server.url!r}, api_key='k').text_gen.{call}"
    assert fresh(f"{code}; print(sorted({{'asyncio', 'httpx', 'httpx2'}} & set(sys.modules)))").strip() == "[]"


def test_a_client_is_made_in_less_than_three_times_bare_python() -> None:
    # CPU time, the least of interleaved runs: what else the machine does is not measured.
    programs = {"bare": "pass", "import": "import octoai", "client": "from octoai.client import OctoAI; OctoAI()"}
    least = dict.fromkeys(programs, float("inf"))
    for _ in range(7):
        for name, code in programs.items():
            process = subprocess.Popen([sys.executable, "-c", code])
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            least[name] = min(least[name], used.ru_utime + used.ru_stime)
    assert least["import"] < 1.5 * least["bare"]
    assert least["client"] < 3 * least["bare"]


def test_responses_keep_the_originals_manners() -> None:
    received = {**answer(), "system_fingerprint": None, "extra": 1}
    response = ChatCompletionResponse.parse_obj(received)
    assert json.loads(json.dumps(response.dict())) == {
        **received,
        "choices": [{"finish_reason": "stop", "index": 0, "message": {"content": "hello", "role": "assistant"}}],
    }
    assert dict(response)["choices"][0].message.content == "hello"
    assert response.extra == 1  # type: ignore[attr-defined]
    assert json.loads(response.json())["extra"] == 1
    assert response.copy(update={"id": "other"}).id == "other"
    assert ChatCompletionResponse.parse_raw(response.json()) == response
    assert response.__fields_set__ >= {"id", "usage"}
    assert "usage" in response.__fields__
    assert "usage" in ChatCompletionResponse.__fields__
    assert response.model_dump()["usage"]["total_tokens"] == 3
    with pytest.raises(TypeError, match="immutable"):
        response.id = "x"
    assert ChatCompletionChunk.parse_obj(chunk("a")).choices[0].delta.content == "a"


def test_messages_keep_the_originals_manners() -> None:
    assert ChatMessage(role="user").dict() == {"role": "user"}
    assert ChatMessage(role="user", content=None).dict() == {"content": None, "role": "user"}
    assert ChatMessage(role=1).role == "1"  # type: ignore[arg-type]
    assert len({ChatMessage(role="user", content="a"), ChatMessage(role="user", content="a")}) == 1
    parts: Any = [MultiModalTextMessage(text="t")]
    assert ChatMessage(role="user", content=parts).dict()["content"] == [{"text": "t", "type": "text"}]
    with pytest.raises(TypeError):
        ChatMessage("user")  # type: ignore[call-arg]
    for made in (
        ChatCompletionResponseFormat(type="j", schema={"a": 1}),
        ChatCompletionResponseFormat(
            type="j",
            schema_={"a": 1},  # type: ignore[call-arg]
        ),
    ):
        assert made.dict() == {"schema": {"a": 1}, "type": "j"}
        assert made.schema_ == {"a": 1}


def test_the_core_helpers_work() -> None:
    from octoai import core

    assert core.encode_query({"a": {"b": 1}}) == {"a[b]": 1}
    assert core.jsonable_encoder([ChatMessage(role="r", content="c")]) == [{"content": "c", "role": "r"}]
    assert core.remove_none_from_dict({"a": None, "b": 0}) == {"b": 0}
    assert core.deep_union_pydantic_dicts({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    wrapper = core.SyncClientWrapper(httpx_client=None, api_key=lambda: "k")
    assert wrapper.get_headers()["Authorization"] == "Bearer k"


def test_files_and_retries_of_the_old_helpers(tmp_path: Any) -> None:
    from types import SimpleNamespace

    from octoai.util import from_file, retry, to_file

    to_file("aGVsbG8=", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"hello"
    assert from_file(tmp_path / "f") == "aGVsbG8="
    for folded in ("aGVs\nbG8=\r\n", b"aGVs\nbG8=", bytearray(b"aGVs\nbG8="), memoryview(b"aGVsbG8=")):
        to_file(folded, tmp_path / "g")
        assert (tmp_path / "g").read_bytes() == b"hello"
    with pytest.raises(ValueError, match="base64"):
        to_file("aGVs*bG8=", tmp_path / "h")
    answers = iter([503, 429, 200])
    assert retry(lambda: SimpleNamespace(status_code=next(answers)), interval=0, jitter=0).status_code == 200


UNIQUE = uuid.UUID(int=1)


def test_json_takes_what_it_took() -> None:
    message = ChatMessage(role="user", content="é")
    assert message.json() == '{"content": "\\u00e9", "role": "user"}'
    assert ChatMessage(role="user", content="a\ud83d").json() == '{"content": "a\\ud83d", "role": "user"}'
    assert message.json(sort_keys=True, ensure_ascii=False) == '{"content": "é", "role": "user"}'
    assert message.json(separators=(",", ":"), exclude={"role"}) == '{"content":"\\u00e9"}'
    assert message.json(encoder=repr, models_as_dict=False) == message.json()
    odd = ChatMessage(role="user", made={1}, at=UNIQUE)  # type: ignore[call-arg]
    assert json.loads(odd.json(encoder=str)) == {"role": "user", "made": "{1}", "at": str(UNIQUE)}


@pytest.mark.parametrize("kind", [octoai.OctoAI, octoai.AsyncOctoAI])
def test_the_signature_of_a_method_names_its_parameters(kind: Any) -> None:
    chat = inspect.signature(kind().text_gen.create_chat_completion).parameters
    assert {"messages", "model", "max_tokens", "extra_body"} <= chat.keys()
    assert "params" not in chat
    assert chat["model"].default is inspect.Parameter.empty
    assert chat["max_tokens"].default is OMIT
    stream = inspect.signature(kind().text_gen.create_completion_stream).parameters
    assert "prompt" in stream
    assert "messages" not in stream


def test_an_object_equals_what_it_is_as_a_dict() -> None:
    message = ChatMessage(role="user", content="a")
    assert message == {"role": "user", "content": "a"}
    assert message == {"role": "user", "content": "a"}
    assert message != {"role": "user"}
    assert message == ChatMessage(role="user", content="a")
    assert message != ChatMessage(role="user")
    assert message != "a"
    assert hash(message) == hash(ChatMessage(role="user", content="a"))


def test_copies_and_dicts_of_a_part_are_made_as_they_were() -> None:
    message = ChatMessage(role="user", content="a", name="n")  # type: ignore[call-arg]
    assert message.copy(include={"role"}).dict() == {"role": "user"}
    assert message.copy(exclude={"content", "name"}).dict() == {"role": "user"}
    assert message.copy(exclude={"content"}, update={"content": "b"}).content == "b"
    assert "content" not in dict(message.copy(include={"role"}, deep=True))
    assert message.content == "a"
    assert message.dict(skip_defaults=True) == {"role": "user", "content": "a", "name": "n"}


def test_historical_names_that_nobody_should_need() -> None:
    import octoai.base_client
    import octoai.client
    import octoai.core.http_client
    import octoai.util

    assert octoai.client.BaseOctoAI is octoai.base_client.BaseOctoAI
    assert octoai.client.AsyncBaseOctoAI is octoai.base_client.AsyncBaseOctoAI
    assert octoai.client.retry is octoai.util.retry
    assert octoai.core.http_client.MAX_RETRY_DELAY_SECONDS_FROM_HEADER == 30
