"""What a body may say: each parameter alone, the old spellings, and every body there could be."""

from __future__ import annotations

import json
import math
import time
import timeit
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoai.server.engines.base import Generation
from octoai.server.engines.openai.dialects import DIALECTS
from octoai.server.errors import BadRequest, InvalidBody, MalformedBody, Refusal, UnsupportedParameter
from octoai.server.params import bodies, generations
from octoai.server.params.generations import TextRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Hi"}
ENDPOINTS = pytest.mark.parametrize(("decode", "base"), [(generations.chat, CHAT), (generations.completion, TEXT)])

SHARED_DEFAULTS = {
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "logit_bias": {},
    "max_tokens": 512,
    "min_p": 0.0,
    "min_tokens": 0,
    "n": 1,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": (),
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}
OTHER_OPTIONAL = ("log_prompt", "loglikelihood", "logprobs", "peft", "stream", "stream_options", "user")
CHAT_OPTIONAL = (
    *SHARED_DEFAULTS,
    *OTHER_OPTIONAL,
    *("response_format", "tool_choice", "tools", "top_logprobs", "functions", "function_call", "octoai"),
    *("max_completion_tokens", "modalities", "metadata", "store", "parallel_tool_calls", "reasoning_effort"),
    *("add_generation_prompt", "chat_template_kwargs", "continue_final_message", "skip_special_tokens"),
)
TEXT_OPTIONAL = (*SHARED_DEFAULTS, *OTHER_OPTIONAL, "best_of", "echo", "suffix", "octoai", "max_completion_tokens")


def chat(**changes: Any) -> TextRequest:
    return generations.chat(json.dumps({**CHAT, **changes}).encode())


def completion(**changes: Any) -> TextRequest:
    return generations.completion(json.dumps({**TEXT, **changes}).encode())


def only(request: TextRequest) -> Generation:
    (generation,) = request.generations
    return generation


def refused(decode: Any, body: Any) -> Refusal:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refusal) as caught:
        decode(raw)
    assert 400 <= caught.value.status < 500
    return caught.value


# Defaults and nulls


@ENDPOINTS
def test_what_is_left_out_has_the_octoai_default(decode: Any, base: dict[str, Any]) -> None:
    request = decode(json.dumps(base).encode())
    generation = only(request)
    assert {name: getattr(generation, name) for name in SHARED_DEFAULTS} == SHARED_DEFAULTS
    assert (request.stream, request.include_usage, request.echo) == (False, False, False)
    assert (generation.logprobs, generation.schema, tuple(generation.tools)) == (None, None, ())


@pytest.mark.parametrize(
    ("decode", "base", "name"),
    [
        *((generations.chat, CHAT, name) for name in CHAT_OPTIONAL),
        *((generations.completion, TEXT, name) for name in TEXT_OPTIONAL),
    ],
)
def test_null_means_left_out(decode: Any, base: dict[str, Any], name: str) -> None:
    assert decode(json.dumps({**base, name: None}).encode()) == decode(json.dumps(base).encode())


def test_every_optional_may_be_null_at_once() -> None:
    assert chat(**dict.fromkeys(CHAT_OPTIONAL)) == chat()
    assert completion(**dict.fromkeys(TEXT_OPTIONAL)) == completion()


def test_a_null_prompt_starts_from_nothing() -> None:
    assert only(completion(prompt=None)).text == ""
    assert only(generations.completion(b'{"model":"m"}')).text == ""


@ENDPOINTS
@pytest.mark.parametrize("value", [None, ""])
def test_a_model_is_required(decode: Any, base: dict[str, Any], value: Any) -> None:
    for body in ({**base, "model": value}, {key: base[key] for key in base if key != "model"}):
        refusal = refused(decode, body)
        assert (refusal.status, refusal.param) == (422, "model")


# Ranges

EDGES: list[tuple[str, list[Any], list[Any]]] = [
    ("frequency_penalty", [-2, 2, 0.5], [-2.001, 2.001]),
    ("presence_penalty", [-2, 2, 0.5], [-2.001, 2.001]),
    ("repetition_penalty", [0.001, 1.5, 1000], [0, -1, 1e-300, 0.0009]),
    ("temperature", [0, 2, 0.7], [-0.001, 2.001]),
    ("top_p", [0.001, 1], [0, -0.1, 1.001]),
    ("min_p", [0, 1], [-0.001, 1.001]),
    ("max_tokens", [1, 2**31 - 1], [0, -1, 2**31]),
    ("max_completion_tokens", [1, 2**31 - 1], [0, -1, 2**31]),
    ("min_tokens", [0, 512, 513, 2**31 - 1], [-1, 2**31]),
    ("n", [1, 16], [0, -1, 17]),
    ("top_k", [-1, 0, 40], [-2, 2**31]),
    ("seed", [0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 10**40]),
    ("stop", ["x", ["x"] * 16, []], ["", ["x"] * 17, [""], "x" * 1025]),
    ("logit_bias", [{"1": -100}, {"1": 100.0}, {}], [{"1": -100.1}, {"1": 101}]),
]


@ENDPOINTS
@pytest.mark.parametrize(("name", "good", "bad"), EDGES, ids=[edge[0] for edge in EDGES])
def test_a_range_holds_at_its_edge_and_not_beyond(
    decode: Any, base: dict[str, Any], name: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert isinstance(decode(json.dumps({**base, name: value}).encode()), TextRequest)
    for value in bad:
        refusal = refused(decode, {**base, name: value})
        assert refusal.status == 422
        assert (refusal.param or "").split(".")[0] == name


@ENDPOINTS
def test_at_least_so_many_tokens_are_no_more_than_were_asked_for(decode: Any, base: dict[str, Any]) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        refusal = refused(decode, {**base, name: 20, "min_tokens": 21})
        assert (refusal.status, refusal.param) == (400, "min_tokens")
        assert "at most max_tokens, 20 here" in refusal.message
    for least, most in ((600, 600), (512, 512), (20, 512), (None, 512)):
        assert decode(encoded({**base, "min_tokens": least})).max_tokens == most


def test_logprobs_have_ranges_of_their_own_at_each_endpoint() -> None:
    assert only(chat(logprobs=True, top_logprobs=20)).logprobs == 20
    assert only(chat(logprobs=True)).logprobs == 0
    assert only(chat(logprobs=False, top_logprobs=0)).logprobs is None
    assert only(completion(logprobs=5)).logprobs == 5
    assert only(completion(logprobs=0)).logprobs == 0
    assert refused(generations.chat, {**CHAT, "logprobs": True, "top_logprobs": 21}).param == "top_logprobs"
    assert refused(generations.completion, {**TEXT, "logprobs": 6}).param == "logprobs"
    assert refused(generations.completion, {**TEXT, "logprobs": True}).param == "logprobs"


def test_top_logprobs_without_logprobs_is_refused_not_ignored() -> None:
    assert refused(generations.chat, {**CHAT, "top_logprobs": 3}).param == "top_logprobs"


def test_the_answer_to_a_wrong_field_serves_every_client() -> None:
    body = refused(generations.chat, {**CHAT, "temperature": 3, "top_p": 0}).body()
    assert [row["loc"] for row in body["detail"]] == [["body", "temperature"], ["body", "top_p"]]
    assert all(row["msg"] and row["type"] for row in body["detail"])
    assert (body["object"], body["type"], body["param"]) == ("error", "invalid_request_error", "temperature")
    assert body["error"] == {key: body[key] for key in ("message", "type", "param", "code")}
    assert body["validation_errors"].keys() == {"temperature", "top_p"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({**CHAT, "messages": [{"role": "user", "content": 5}]}, ["messages", 0, "content"]),
        ({**CHAT, "messages": [CHAT["messages"][0], {"content": "x"}]}, ["messages", 1, "role"]),
        ({**CHAT, "messages": [{"role": "user", "content": [{"text": 5}]}]}, ["messages", 0, "content", 0, "text"]),
        ({**CHAT, "messages": [{"role": "user", "content": [{}]}]}, ["messages", 0, "content", 0]),
        ({**CHAT, "messages": [{"role": "a", "reasoning_content": 5}]}, ["messages", 0, "reasoning_content"]),
        ({**CHAT, "messages": []}, ["messages"]),
        ({"model": "m"}, ["messages"]),
        ({**CHAT, "stop": ["a", 5]}, ["stop", 1]),
        ({**CHAT, "stop": 5}, ["stop"]),
        ({**CHAT, "logit_bias": {"one": 5}}, ["logit_bias", "one"]),
        ({**CHAT, "logit_bias": {"1": "5"}}, ["logit_bias", "1"]),
        ({**CHAT, "stream_options": {"include_usage": "yes"}}, ["stream_options", "include_usage"]),
        ({**CHAT, "response_format": {"type": "yaml"}}, ["response_format", "type"]),
        ({**CHAT, "response_format": {"type": "json_schema"}}, ["response_format", "json_schema"]),
        ({**CHAT, "response_format": {}}, ["response_format", "type"]),
        ({**CHAT, "tools": [{"function": {}}]}, ["tools", 0, "function", "name"]),
        ({**CHAT, "tool_choice": {"type": "function"}}, ["tool_choice", "function"]),
    ],
)
def test_the_place_is_the_path_in_the_body(body: Any, place: list[Any]) -> None:
    refusal = refused(generations.chat, body)
    assert isinstance(refusal, InvalidBody)
    assert refusal.detail[0]["loc"] == ["body", *place]


CUSTOM = {"type": "custom", "id": "c", "custom": {"name": "x", "input": "y"}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "web_search", "function": {"name": "x"}}]}, "tools.0.type"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}, "tool_choice.type"),
        ({"messages": [{"role": "assistant", "tool_calls": [CUSTOM]}]}, "messages.0.tool_calls.0.type"),
    ],
)
def test_a_kind_of_tool_that_is_not_offered_is_refused_as_that(change: dict[str, Any], param: str) -> None:
    refusal = refused(generations.chat, {**CHAT, **change})
    assert (refusal.status, refusal.param, refusal.message) == (422, param, f"{param}: Input should be 'function'")


@pytest.mark.parametrize("kind", [{}, {"type": None}, {"type": ""}, {"type": "function"}])
def test_a_call_that_is_told_again_need_not_say_its_kind(kind: dict[str, Any]) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}, **kind}
    (generation,) = generations.chat(
        encoded({**CHAT, "messages": [{"role": "assistant", "tool_calls": [call]}]})
    ).generations
    assert generation.messages is not None
    assert generation.messages[0]["tool_calls"] == [{**call, "type": "function"}]


@pytest.mark.parametrize("nothing", [{}, {"arguments": None}, {"arguments": ""}], ids=repr)
def test_a_call_without_arguments_had_none(nothing: dict[str, Any]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", **nothing}}
    messages = only(chat(messages=[{"role": "assistant", "tool_calls": [call]}])).messages
    assert messages is not None
    assert messages[0]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": "{}"}}]


def test_of_a_body_with_many_wrong_values_the_first_are_told_in_no_time() -> None:
    for wrong, decode in (
        ({"prompt": [-1] * 2000}, generations.completion),
        ({"messages": [{}] * 2000}, generations.chat),
    ):
        began = time.process_time()
        refusal = refused(decode, {"model": "m", **wrong})
        assert time.process_time() - began < 0.15  # 0.01 s where it is as it should be, 0.3 s and more where it is not
        assert 1 <= len(refusal.detail) <= bodies.MAX_PROBLEMS
        assert len(json.dumps(refusal.body())) < 50_000


def test_more_wrong_values_than_anybody_could_list_are_one_refusal() -> None:
    bias = dict.fromkeys(range(bodies.MAX_LISTED_PROBLEMS + 1), "wrong")
    refusal = refused(generations.chat, {**CHAT, "logit_bias": bias})
    assert [row["loc"] for row in refusal.detail] == [["body"]]


def filled(path: str, value: str, number: int) -> bytes:
    before, after = path.split("…")
    return (before + f"{value}," * (number - 1) + value + after).encode()


@pytest.mark.parametrize("value", ["1", "{}", "[]", '""'])
@pytest.mark.parametrize(
    ("decode", "path"),
    [
        (generations.completion, '{"model":"m","prompt":[…]}'),
        (generations.completion, '{"model":"m","prompt":"a","messages":[…]}'),
        (generations.chat, '{"model":"m","messages":[…]}'),
        (generations.chat, '{"model":"m","messages":[{"role":"user","content":[…]}]}'),
        (generations.chat, '{"model":"m","messages":[{"role":"user","tool_calls":[…]}]}'),
        (generations.chat, '{"model":"m","modalities":[…],"messages":[]}'),
        (generations.chat, '{"model":"m","metadata":[…],"messages":[]}'),
    ],
)
def test_no_body_takes_long_to_refuse_whatever_it_is_full_of(decode: Any, path: str, value: str) -> None:
    most = bodies.MAX_VALUES if value == "1" else bodies.MAX_LISTS_AND_TEXTS
    for number, limit in ((most - 9, 1.2), (9_900_000 // (len(value) + 1), 0.8)):
        body = filled(path, value, number)
        began = time.process_time()
        refusal = refusal_of(decode, body)
        # At most 0.3 s where it is as it should be; before values were counted, up to 12 s.
        assert time.process_time() - began < limit
        assert refusal is None or len(json.dumps(refusal.body())) < 5_000


def refusal_of(decode: Any, body: bytes) -> Refusal | None:
    try:
        decode(body)
    except Refusal as refusal:
        return refusal
    return None


def test_what_stands_in_a_text_is_not_counted_as_values() -> None:
    for text in ("[" * 400_000, '"' * 400_000, '\\"],' * 200_000, "\\" * 400_001, '{"a": [1, "b\\""]}\n' * 20_000):
        assert only(completion(prompt=text)).text == text
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        assert only(chat(messages=[message])).messages == (message,)


def test_to_count_values_takes_no_longer_than_to_read_them() -> None:
    content = [{"image_url": {"url": "data:image/png;base64," + "A" * 9_000_000}}]
    raw = json.dumps({**CHAT, "messages": [{"role": "user", "content": content}]}).encode()
    counting = fastest(lambda: bodies._refuse_countless(raw))
    # About as long where it is as it should be; 35 times as long where texts are taken out first.
    assert counting < 4 * fastest(lambda: generations._CHAT.validator.validate_json(raw))


def fastest(action: Callable[[], object]) -> float:
    """Seconds of processor time, at best."""
    return min(timeit.repeat(action, timer=time.process_time, number=1, repeat=9))


def test_prompts_may_have_as_many_tokens_as_a_body_has_room_for() -> None:
    tokens = [100_000] * 1_000_000
    assert only(completion(prompt=tokens)).tokens == tokens
    several = [[1234] * 15_000] * 128
    assert [each.tokens for each in completion(prompt=several).generations] == several
    refusal = refused(generations.completion, {**TEXT, "prompt": [1] * (bodies.MAX_VALUES + 2)})
    assert (refusal.status, refusal.param) == (422, None)
    assert f"at most {bodies.MAX_VALUES} values" in refusal.message
    texts = ["a"] * (bodies.MAX_LISTS_AND_TEXTS + 1)
    assert f"{bodies.MAX_LISTS_AND_TEXTS} texts" in refused(generations.chat, {**CHAT, "metadata": texts}).message


def test_of_a_long_key_only_the_beginning_is_answered() -> None:
    for body in ({"logit_bias": {"k" * 1_000_000: "x"}}, {"logit_bias": {"k" * 1_000_000: 1}}):
        refusal = refused(generations.chat, {**CHAT, **body})
        assert refusal.detail[0]["loc"] == ["body", "logit_bias", "k" * 64]
        assert len(json.dumps(refusal.body())) < 1_500


# Types


@ENDPOINTS
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "max_tokens", "n", "seed", "top_k"])
@pytest.mark.parametrize("value", ["1", True, False, [], {}, [1]], ids=repr)
def test_a_number_is_a_number(decode: Any, base: dict[str, Any], name: str, value: Any) -> None:
    assert refused(decode, {**base, name: value}).param == name


@ENDPOINTS
@pytest.mark.parametrize("name", ["stream", "ignore_eos", "log_prompt"])
@pytest.mark.parametrize("value", ["true", 1, 0, [], {}], ids=repr)
def test_a_boolean_is_a_boolean(decode: Any, base: dict[str, Any], name: str, value: Any) -> None:
    assert refused(decode, {**base, name: value}).param == name


@ENDPOINTS
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["temperature", "frequency_penalty", "repetition_penalty", "min_p"])
def test_a_number_is_finite(decode: Any, base: dict[str, Any], name: str, literal: str) -> None:
    body = json.dumps(base)[:-1] + f', "{name}": {literal}}}'
    assert refused(decode, body.encode()).param == name


def test_a_token_id_that_no_model_has_is_refused_whatever_its_length() -> None:
    for key in ("9" * 11, "9" * 5000, "-1", "1.5", "²", ""):
        refusal = refused(generations.chat, {**CHAT, "logit_bias": {key: 1}})
        assert (refusal.param or "").startswith("logit_bias")
    for prompt in ([10**30], [[10**30]], [-1], [True], [1.5]):
        assert (refused(generations.completion, {**TEXT, "prompt": prompt}).param or "").startswith("prompt")


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [["a"]], {"text": "a"}, 5, True, [None], ["a", None], ["x"] * 129], ids=repr
)
def test_a_prompt_is_text_tokens_or_a_list_of_one_kind(prompt: Any) -> None:
    assert (refused(generations.completion, {**TEXT, "prompt": prompt}).param or "").split(".")[0] == "prompt"


def test_prompts_become_a_generation_each() -> None:
    texts = completion(prompt=["a", "b"], n=2)
    assert [generation.text for generation in texts.generations] == ["a", "b"]
    assert texts.num_choices == 4
    assert [generation.tokens for generation in completion(prompt=[[1], [2, 3]]).generations] == [[1], [2, 3]]
    assert only(completion(prompt=[1, 2])).tokens == [1, 2]


def test_too_many_choices_in_all_are_refused() -> None:
    assert completion(prompt=["a"] * 8, n=16).num_choices == 128
    assert refused(generations.completion, {**TEXT, "prompt": ["a"] * 9, "n": 16}).param == "prompt"


# Bodies that are not what they should be


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"{} {}",
        b"\xef\xbb\xbf" + json.dumps(CHAT).encode(),
        json.dumps(CHAT).encode("utf-16"),
        b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"\\ud83d"}]}',
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b"model=m",
        b"{'model': 'm'}",
    ],
    ids=lambda body: repr(body[:20]),
)
@ENDPOINTS
def test_what_is_not_json_is_refused(decode: Any, base: dict[str, Any], body: bytes) -> None:
    refusal = refused(decode, body)
    assert isinstance(refusal, MalformedBody)
    assert (refusal.status, refusal.code) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"x"', b"true", b"[{}]"])
@ENDPOINTS
def test_what_is_not_an_object_is_refused(decode: Any, base: dict[str, Any], body: bytes) -> None:
    refusal = refused(decode, body)
    assert isinstance(refusal, InvalidBody)
    assert refusal.detail[0]["loc"] == ["body"]


def test_of_a_key_said_twice_the_last_counts() -> None:
    request = generations.chat(json.dumps(CHAT)[:-1].encode() + b', "max_tokens": "x", "max_tokens": 7}')
    assert request.max_tokens == 7


def test_nesting_that_json_allows_is_no_error_of_ours() -> None:
    nested: Any = 1
    for _ in range(150):
        nested = [nested]
    assert isinstance(chat(metadata=nested), TextRequest)


# What old and foreign clients send


def test_unknown_keys_are_passed_over() -> None:
    assert chat(no_such_parameter=1, service_tier="auto", store=True, metadata={"a": "b"}) == chat()


def test_octoai_0_x_sends_explicit_nulls() -> None:
    nulls = dict.fromkeys(("function_call", "functions", "logit_bias", "max_tokens", "response_format", "stop", "user"))
    assert chat(**nulls, n=1, stream=False) == chat()


def test_the_old_vllm_extension_is_understood() -> None:
    said = {"vllm": {"top_k": 5, "ignore_eos": True, "skip_special_tokens": True, "best_of": 1}, "loras": []}
    generation = only(chat(octoai=said))
    assert (generation.top_k, generation.ignore_eos) == (5, True)
    assert only(chat(octoai=said, top_k=7)).top_k == 7
    assert chat(octoai={"vllm": None, "loras": None}) == chat(octoai={}) == chat()


@pytest.mark.parametrize(
    ("extension", "param"),
    [
        ({"loras": ["x"]}, "octoai.loras"),
        ({"vllm": {"use_beam_search": True}}, "octoai.vllm.use_beam_search"),
        ({"vllm": {"stop_token_ids": [2]}}, "octoai.vllm.stop_token_ids"),
        ({"vllm": 5}, "octoai.vllm"),
        ({"vllm": {"top_k": "5"}}, "octoai.vllm.top_k"),
        ({"vllm": {"top_k": True}}, "octoai.vllm.top_k"),
        ({"vllm": {"top_k": 10**30}}, "octoai.vllm.top_k"),
        (5, "octoai"),
    ],
)
def test_what_the_old_extension_asks_for_is_never_ignored(extension: Any, param: str) -> None:
    assert refused(generations.chat, {**CHAT, "octoai": extension}).param == param


def test_types_that_the_original_sdk_dropped_are_put_back() -> None:
    message = only(
        chat(
            messages=[
                {"role": "user", "content": [{"text": "a"}, {"image_url": {"url": "data:"}}]},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            ],
            tools=[{"function": {"name": "brave_search"}}],
        )
    )
    assert message.messages is not None
    assert message.messages[0]["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:"}},
    ]
    assert message.messages[1]["tool_calls"][0]["type"] == "function"
    assert message.messages[1]["content"] == ""
    assert message.tools == ({"type": "function", "function": {"name": "brave_search"}},)


def test_what_an_assistant_refused_with_is_text() -> None:
    for part in ({"type": "refusal", "refusal": "No."}, {"refusal": "No."}):
        history = [{"role": "assistant", "content": [part]}, {"role": "user", "content": "Why?"}]
        messages = only(chat(messages=history)).messages
        assert messages is not None
        assert messages[0] == {"role": "assistant", "content": [{"type": "text", "text": "No."}]}
    wrong = [{"role": "assistant", "content": [{"type": "refusal", "refusal": 5}]}]
    assert refused(generations.chat, {**CHAT, "messages": wrong}).param == "messages.0.content.0.refusal"


@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=repr)
def test_an_assistant_that_refused_said_so_where_it_said_nothing_else(nothing: dict[str, Any]) -> None:
    message = {"role": "assistant", **nothing, "refusal": "No."}
    said = {"role": "assistant", "content": "No."}
    assert only(chat(messages=[ASKED, message, ASKED])).messages == (ASKED, said, ASKED)
    assert only(chat(messages=[ASKED, message])).messages == (ASKED, said)
    assert only(chat(messages=[ASKED, {**said, "refusal": None}])).messages == (ASKED, said)
    wrong = [{**message, "refusal": 5}]
    assert refused(generations.chat, {**CHAT, "messages": wrong}).param == "messages.0.refusal"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_absent_and_null_content_is_no_text(content: dict[str, Any]) -> None:
    assert only(chat(messages=[{"role": "assistant", **content, "tool_calls": None}])).messages == (
        {"role": "assistant", "content": ""},
    )


def test_a_tool_message_needs_no_tool_call_id_and_a_role_may_be_any() -> None:
    for role in ("tool", "developer", "system", "ipython"):
        assert only(chat(messages=[{"role": role, "content": "x"}])).messages == ({"role": role, "content": "x"},)


ASKED = {"role": "user", "content": "Name a city."}
BEGUN = {"role": "assistant", "content": "The city of"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": [{"text": ""}]}])
def test_an_answer_that_has_not_begun_is_a_new_one(content: dict[str, Any]) -> None:
    unbegun = {"role": "assistant", **content}
    generation = only(chat(messages=[ASKED, unbegun]))
    assert (generation.messages, generation.is_prefilled) == ((ASKED,), False)
    for before in ([], [ASKED, BEGUN]):
        generation = only(chat(messages=[*before, unbegun]))
        assert (len(generation.messages or ()), generation.is_prefilled) == (len(before) + 1, False)


@pytest.mark.parametrize(
    ("messages", "is_prefilled"),
    [
        ([ASKED, BEGUN], True),
        ([BEGUN], True),
        ([ASKED, {**BEGUN, "content": [{"text": "The city of"}]}], True),
        ([ASKED], False),
        ([BEGUN, ASKED], False),
        ([ASKED, BEGUN, BEGUN], False),
        ([ASKED, CALLING], False),
    ],
)
def test_a_single_text_of_the_assistants_at_the_end_is_an_answer_that_has_begun(
    messages: list[Any], is_prefilled: bool
) -> None:
    assert only(chat(messages=messages)).is_prefilled == is_prefilled


def test_who_asks_says_whether_the_last_message_is_to_be_continued() -> None:
    for messages in ([ASKED, BEGUN], [ASKED, BEGUN, BEGUN]):
        for begins_anew in ({"continue_final_message": False}, {"add_generation_prompt": True}):
            assert not only(chat(messages=messages, **begins_anew)).is_prefilled
            assert only(chat(messages=[ASKED], **begins_anew)) == only(chat(messages=[ASKED]))
        for goes_on in ({"continue_final_message": True}, {"add_generation_prompt": False}):
            assert only(chat(messages=messages, **goes_on)).is_prefilled
        assert only(chat(messages=messages, continue_final_message=True, add_generation_prompt=False)).is_prefilled


@pytest.mark.parametrize(
    ("messages", "said", "param"),
    [
        ([ASKED], {"continue_final_message": True}, "continue_final_message"),
        ([ASKED], {"add_generation_prompt": False}, "add_generation_prompt"),
        ([ASKED, CALLING], {"continue_final_message": True}, "continue_final_message"),
        *(
            ([ASKED, BEGUN], {"continue_final_message": each, "add_generation_prompt": each}, "continue_final_message")
            for each in (True, False)
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: list[Any], said: dict[str, Any], param: str) -> None:
    refusal = refused(generations.chat, {**CHAT, "messages": messages, **said})
    assert (refusal.status, refusal.param) == (400, param)


def test_what_a_template_is_told_is_bounded_and_part_of_the_prompt() -> None:
    told = {"enable_thinking": False, "documents": [{"text": "x" * 1000}]}
    generation = only(chat(chat_template_kwargs=told))
    assert generation.template_kwargs == told
    assert generation.num_prompt_bytes > 1000
    for wrong in ({"a": "x" * 17_000}, {"a": 10**30}):
        refusal = refused(generations.chat, {**CHAT, "chat_template_kwargs": wrong})
        assert (refusal.status, (refusal.param or "").split(".")[0]) == (400, "chat_template_kwargs")
    assert refused(generations.chat, {**CHAT, "chat_template_kwargs": [1]}).status == 422


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", [{"role": "user", "content": "Other"}]),
        ("conversation", []),
        ("tools", None),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("chat_template", "{{ 1 }}"),
        ("bos_token", "x"),
        ("eos_token", "x"),
        ("tokenize", True),
        ("return_dict", True),
        ("return_tensors", "pt"),
        ("padding", True),
        ("truncation", True),
        ("max_length", 1),
    ],
)
def test_a_template_is_told_nothing_in_place_of_what_the_request_says(name: str, value: Any) -> None:
    refusal = refused(generations.chat, {**CHAT, "chat_template_kwargs": {"enable_thinking": False, name: value}})
    assert (refusal.status, refusal.param) == (400, f"chat_template_kwargs.{name}")


def test_what_a_model_thought_before_is_passed_on_to_its_template() -> None:
    thought = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    assert only(chat(messages=[thought])).messages == (thought,)
    without = {"role": "assistant", "content": "x"}
    assert only(chat(messages=[{**without, "reasoning_content": None}])).messages == (without,)


def test_max_completion_tokens_wins_over_max_tokens() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7


def test_messages_may_be_sent_to_completions_and_are_checked_there_too() -> None:
    body = {"model": "m", "messages": CHAT["messages"]}
    assert only(generations.completion(json.dumps(body).encode())).messages == tuple(CHAT["messages"])
    for messages in ("hello", [1], [{"content": "x"}], [{"role": "user", "content": [1]}], {"role": "user"}, 5):
        refusal = refused(generations.completion, {"model": "m", "messages": messages})
        assert (refusal.param or "").split(".")[0] == "messages"


@pytest.mark.parametrize(
    ("decode", "base", "name", "value"),
    [
        (generations.chat, CHAT, "functions", [{"name": "f"}]),
        (generations.chat, CHAT, "function_call", {"name": "f"}),
        (generations.chat, CHAT, "loglikelihood", True),
        (generations.chat, CHAT, "peft", "my-lora"),
        (generations.chat, CHAT, "modalities", ["audio"]),
        (generations.chat, CHAT, "audio", {"voice": "x"}),
        (generations.chat, CHAT, "web_search_options", {}),
        (generations.chat, CHAT, "guided_json", {"type": "object"}),
        (generations.chat, CHAT, "guided_choice", ["a", "b"]),
        (generations.chat, CHAT, "structured_outputs", {"regex": "a+"}),
        (generations.chat, CHAT, "allowed_token_ids", [10]),
        (generations.chat, CHAT, "bad_words", ["The"]),
        (generations.chat, CHAT, "chat_template", "{{ 1 }}"),
        (generations.chat, CHAT, "prompt_logprobs", 0),
        (generations.chat, CHAT, "skip_special_tokens", False),
        (generations.chat, CHAT, "stop_token_ids", [2]),
        (generations.chat, CHAT, "truncate_prompt_tokens", -1),
        (generations.chat, CHAT, "use_beam_search", True),
        (generations.completion, TEXT, "chat_template_kwargs", {"enable_thinking": False}),
        (generations.completion, TEXT, "continue_final_message", True),
        (generations.completion, TEXT, "continue_final_message", False),
        (generations.completion, TEXT, "add_generation_prompt", True),
        (generations.completion, TEXT, "add_generation_prompt", False),
        (generations.completion, TEXT, "prompt_logprobs", 1),
        (generations.completion, TEXT, "use_beam_search", True),
        (generations.chat, CHAT, "best_of", 3),
        (generations.chat, CHAT, "echo", True),
        (generations.chat, CHAT, "json_schema", {"type": "object"}),
        (generations.chat, CHAT, "regex", "a+"),
        (generations.chat, CHAT, "ebnf", "root ::= x"),
        (generations.completion, TEXT, "response_format", {"type": "json_object"}),
        (generations.completion, TEXT, "tools", [{"function": {"name": "f"}}]),
        (generations.completion, TEXT, "top_logprobs", 2),
        (generations.completion, TEXT, "grammar", "root ::= x"),
        (generations.completion, TEXT, "guided_regex", "a+"),
        (generations.completion, TEXT, "guided_grammar", "root ::= x"),
        (generations.completion, TEXT, "suffix", "x"),
        (generations.completion, TEXT, "best_of", 3),
        (generations.completion, TEXT, "echo", True),
    ],
)
def test_what_nothing_here_can_do_is_refused_by_name(decode: Any, base: dict[str, Any], name: str, value: Any) -> None:
    more = {"logprobs": 1} if (name, base) == ("echo", TEXT) else {}
    refusal = refused(decode, {**base, name: value, **more})
    assert isinstance(refusal, UnsupportedParameter)
    assert (refusal.status, refusal.param) == (400, name)


def test_harmless_forms_of_it_are_not() -> None:
    assert chat(functions=[], function_call="auto", loglikelihood=False, peft="", modalities=["text"]) == chat()
    nothing = {"guided_json": None, "structured_outputs": {}, "web_search_options": None, "best_of": 1, "echo": False}
    assert chat(**nothing) == chat()
    nothing = {"allowed_token_ids": None, "bad_words": [], "chat_template": None, "prompt_logprobs": None}
    assert chat(**nothing, skip_special_tokens=True, stop_token_ids=[], use_beam_search=False) == chat()
    assert chat(chat_template_kwargs={}, min_tokens=0, parallel_tool_calls=True) == chat()
    assert chat(n=3, best_of=3) == chat(n=3)
    nothing = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "top_logprobs": 0}
    nothing |= {"add_generation_prompt": None, "continue_final_message": None}
    assert completion(suffix="", best_of=1, **nothing) == completion()
    assert completion(n=3, best_of=3).num_choices == 3


def test_other_keys_that_are_not_known_are_ignored() -> None:
    assert chat(reasoning_effort="high", verbosity="low", store=True, maxtokens=5) == chat()


def test_the_response_formats_say_a_schema() -> None:
    schema = {"type": "object"}
    assert only(chat(response_format={"type": "text"})).schema is None
    assert only(chat(response_format={"type": "json_object"})).schema == {}
    assert only(chat(response_format={"type": "json_object", "schema": schema})).schema == schema
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": False}}
    assert only(chat(response_format=named)).schema == schema
    assert only(chat(response_format={"type": "json_schema", "schema": schema})).schema == schema
    assert only(chat(response_format={"type": "json_object", "value": schema})).schema == schema
    assert only(chat(response_format={"type": "json_object", "json_schema": {"schema": schema}})).schema == schema
    assert only(chat(response_format={"type": "json_schema", "json_schema": {"schema": {}}})).schema == {}


def test_a_response_format_that_names_a_schema_has_one() -> None:
    inside = ["response_format", "json_schema", "schema"]
    for said, place in (
        ({"type": "json_schema"}, inside[:2]),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, inside),
        ({"type": "json_schema", "json_schema": {"type": "object", "properties": {}}}, inside),
        ({"type": "json_object", "json_schema": {"type": "object"}}, inside),
    ):
        refusal = refused(generations.chat, {**CHAT, "response_format": said})
        assert refusal.detail[0]["loc"] == ["body", *place]


def test_tools_that_have_to_be_called_have_arguments_of_a_bounded_schema() -> None:
    """An engine makes a grammar of them then."""
    tools = [{"function": {"name": "f"}}, {"function": {"name": "g", "parameters": {"pattern": "^(a?){100}$"}}}]
    for choice in (None, "auto", "none"):
        assert len(only(chat(tools=tools, tool_choice=choice)).tools) == 2
    for choice in ("required", {"type": "function", "function": {"name": "g"}}):
        refusal = refused(generations.chat, {**CHAT, "tools": tools, "tool_choice": choice})
        assert (refusal.status, refusal.param) == (400, "tools")
    assert len(only(chat(tools=tools[:1], tool_choice="required")).tools) == 1


def test_what_has_to_be_called_has_to_be_there() -> None:
    named = {"type": "function", "function": {"name": "g"}}
    for tools in ([], None):
        for choice in ("required", named):
            refusal = refused(generations.chat, {**CHAT, "tools": tools, "tool_choice": choice})
            assert (refusal.status, refusal.param) == (400, "tool_choice")
        for choice in ("auto", "none"):
            assert only(chat(tools=tools, tool_choice=choice)).tools == ()
    offered = [{"function": {"name": "f" * 100}}, {"function": {"name": "h"}}]
    refusal = refused(generations.chat, {**CHAT, "tools": offered, "tool_choice": named})
    assert (refusal.status, refusal.param) == (400, "tool_choice")
    assert refusal.message == f"tool_choice: no tool is called `g`; there is {'f' * 64}, h"
    named["function"] = {"name": "h"}
    assert only(chat(tools=offered, tool_choice=named)).tool_choice == named


# Any body at all

KEYS = (
    *("model", "messages", "role", "content", "prompt", "type", "text", "image_url", "url", "function", "name"),
    *("schema", "json_schema", "tool_calls", "vllm", "loras", "top_k", "include_usage", "arguments", "1", "str"),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**30)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "auto", "none", "text", "json_object", "json_schema", "function", "1", "9" * 4400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(KEYS),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def outcome(decode: Any, body: bytes) -> None:
    """A request that every dialect can word, or a refusal that is the caller's fault."""
    try:
        request = decode(body)
        for generation in request.generations:
            for dialect in DIALECTS.values():
                json.loads(dialect.body(generation, "m"))
                dialect.unsupported(generation)
    except Refusal as refusal:
        assert 400 <= refusal.status < 500
        json.dumps(refusal.body()).encode("ascii")


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@settings(max_examples=250, deadline=None)
@given(json_values)
def test_any_json_is_a_request_or_a_refusal(value: Any) -> None:
    outcome(generations.chat, encoded(value))
    outcome(generations.completion, encoded(value))


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([*CHAT_OPTIONAL, "model", "messages"]), json_values)
def test_any_json_in_place_of_a_chat_parameter_too(name: str, value: Any) -> None:
    outcome(generations.chat, encoded({**CHAT, name: value}))


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([*TEXT_OPTIONAL, "model", "messages", "prompt"]), json_values)
def test_any_json_in_place_of_a_completion_parameter_too(name: str, value: Any) -> None:
    base = {"model": "m"} if name == "messages" else TEXT
    outcome(generations.completion, encoded({**base, name: value}))


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_any_json_as_a_message_part_tool_or_schema_too(value: Any) -> None:
    for body in (
        {**CHAT, "messages": [value]},
        {**CHAT, "messages": [{"role": "user", "content": [value]}]},
        {**CHAT, "messages": [{"role": "user", "content": "x", "tool_calls": [value]}]},
        {**CHAT, "tools": [{"function": {"name": "f", "parameters": {"x": value}}}]},
        {**CHAT, "response_format": {"type": "json_object", "schema": {"x": value}}},
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": value}},
    ):
        outcome(generations.chat, encoded(body))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_too(body: bytes) -> None:
    outcome(generations.chat, body)
    outcome(generations.completion, body)


def test_numbers_that_no_engine_could_be_told_are_the_callers_fault() -> None:
    request = chat(response_format={"type": "json_object", "schema": {"const": 10**40}})
    for dialect in DIALECTS.values():
        with pytest.raises(BadRequest):
            dialect.body(only(request), "m")
    assert math.isfinite(only(request).temperature)
