"""Answers that are wrong in a detail: what was paid for is not lost because of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octoai import ResponseError, _gather
from octoai.text_gen import ChatCompletionChunk, ChatCompletionResponse, ToolCall, UsageStats
from tests.sdk.misbehaving import Exchange, answer, chunk

COUNTS = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def whole(api: Any, serve: Any, body: Any) -> ChatCompletionResponse:
    return api.chat(api.client(base_url=serve(lambda x: x.reply(200, body)).url))  # type: ignore[no-any-return]


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def message(**more: Any) -> dict[str, Any]:
    return answer(choices=[{"index": 0, "message": {"role": "assistant", "content": "hello", **more}}])


@pytest.mark.parametrize(
    "usage",
    [
        {**COUNTS, "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": None}},
        {**COUNTS, "prompt_tokens_details": {"cached_tokens": 1.5, "kinds": ["text"]}},
        {**COUNTS, "cost": {"total_cost": 0.1}},
        {"total_tokens": 3},
        {**COUNTS, "prompt_tokens": None},
        {},
        "3 tokens",
    ],
)
def test_no_detail_of_the_usage_loses_an_answer(api: Any, serve: Any, usage: Any) -> None:
    assert whole(api, serve, answer(usage=usage)).choices[0].message.content == "hello"
    server = serve(lambda x: x.stream([chunk("a", finish="stop"), {**chunk(), "choices": [], "usage": usage}]))
    assert api.final(api.stream(api.client(base_url=server.url))).choices[0].message.content == "a"


def test_what_is_right_in_a_partial_usage_is_there(api: Any, serve: Any) -> None:
    usage = whole(api, serve, answer(usage={"total_tokens": "3", "cost": 0.5})).usage
    assert isinstance(usage, UsageStats)
    assert usage.prompt_tokens is None
    assert usage.cost == 0.5  # as it came
    usage = whole(api, serve, answer(usage={**COUNTS, "cost": 0.5})).usage
    assert usage is not None
    assert usage.cost == "0.5"
    usage = whole(api, serve, answer(usage={**COUNTS, "cost": "0.50"})).usage
    assert usage is not None
    assert usage.cost == "0.50"


@pytest.mark.parametrize("cost", ["0.000000001", "0.00000012", "1234.123456789"])
def test_a_cost_that_is_a_number_keeps_its_digits(cost: str) -> None:
    usage = UsageStats.parse_raw(f'{{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2,"cost":{cost}}}')
    assert usage.cost == cost


@pytest.mark.parametrize("cost", ["0.0000007", "0.000000001", "12.5", "1234567.000000001"])
def test_what_a_stream_cost_is_the_same_when_it_is_put_together(cost: str) -> None:
    events = [json.dumps(chunk("a")).encode(), json.dumps(chunk(finish="stop", usage=COUNTS)).encode()]
    events[1] = events[1].replace(b'"usage": {', b'"usage": {"cost": %b, ' % cost.encode())
    whole = ChatCompletionResponse.parse_obj(_gather.chat_completion(events))
    assert whole.usage is not None and whole.usage.cost == cost


@pytest.mark.parametrize(
    "body",
    [
        without(answer(), "id"),
        without(answer(), "model", "created", "usage"),
        answer(created=1.5),
        answer(created=None, id=None),
        message(tool_calls=[{"function": {"name": "f", "arguments": "{}"}, "type": ""}]),
        message(tool_calls=[{"custom": {"name": "f"}, "type": "custom", "id": "c"}]),
        message(tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}, "type": "function"}]),
        message(tool_calls=[{"function": "f"}, None]),
        message(role=None),
        answer(choices=[{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}]),
        answer(
            choices=[
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "hello"},
                    "logprobs": {"content": [{"token": "a", "logprob": None, "top_logprobs": [{"token": "b"}]}]},
                }
            ]
        ),
    ],
)
def test_an_answer_that_is_wrong_in_a_detail_is_read(api: Any, serve: Any, body: Any) -> None:
    read = whole(api, serve, body)
    assert read.choices[0].message.content == "hello"
    assert read.raw_response is not None
    assert read.dict()["choices"][0]["message"]["content"] == "hello"
    assert json.loads(read.json())["choices"]


def test_what_is_missing_is_none_and_what_is_right_has_its_type(api: Any, serve: Any) -> None:
    tool_call = {"id": 7, "function": {"name": "f", "arguments": "{}"}, "type": "custom"}
    read = whole(api, serve, without(message(tool_calls=[tool_call]), "id", "model"))
    assert read.id is None
    assert read.model is None
    assert read.created == 1
    assert "id" not in read.dict()
    calls = read.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0], ToolCall)
    assert (calls[0].id, calls[0].type) == ("7", "custom")
    with pytest.raises(TypeError, match="immutable"):
        read.id = "x"


def test_parts_of_other_kinds_stay_as_they_came(api: Any, serve: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}]
    content = whole(api, serve, message(content=parts)).choices[0].message.content
    assert isinstance(content, list)
    assert content[0].text == "a"  # type: ignore[union-attr]
    assert content[1] == parts[1]


def test_half_a_character_loses_no_answer(api: Any, serve: Any) -> None:
    body = json.dumps(answer("x\ud83d")).encode()
    assert whole(api, serve, body).choices[0].message.content == "x\ud83d"
    server = serve(lambda x: x.stream([chunk("x\ud83d"), chunk("y", finish="stop")]))
    assert api.final(api.stream(api.client(base_url=server.url))).choices[0].message.content == "x\ud83dy"


@pytest.mark.parametrize(
    "odd",
    [
        {**chunk(), "choices": [{"index": 0}]},
        {**chunk(), "choices": [{"index": 0, "delta": None}]},
        {**chunk(), "choices": [{"delta": {"content": ""}}]},
        without(chunk(""), "id", "model", "created"),
        chunk("", usage={}),
        chunk("", delta={"content": [{"type": "thinking"}]}),
        chunk("", delta={"tool_calls": "none"}),
        chunk("", delta={"tool_calls": [{"index": 0, "function": {"name": 5, "arguments": {"a": 1}}}]}),
        {**chunk(), "choices": [{"index": 0, "delta": {}, "logprobs": {"content": "none"}}]},
    ],
)
def test_a_chunk_that_is_wrong_in_a_detail_ends_no_stream(api: Any, serve: Any, odd: Any) -> None:
    server = serve(lambda x: x.stream([odd, chunk("a"), chunk("b", finish="stop", usage=COUNTS), chunk(usage={})]))
    client = api.client(base_url=server.url)
    assert "".join(api.text(api.stream(client))) == "ab"
    assert all(isinstance(each, ChatCompletionChunk) for each in api.all(api.stream(client)))
    stream = api.stream(client)
    final = api.final(stream)
    assert final.choices[0].message.content in ("ab", [{"type": "thinking"}])
    assert final.usage.total_tokens == stream.usage.total_tokens == 3


def test_tool_calls_without_an_index_are_told_apart_by_their_ids(api: Any, serve: Any) -> None:
    def call(arguments: str, **more: Any) -> dict[str, Any]:
        return {"type": "", "function": {"name": "f", "arguments": arguments}, **more}

    deltas = [[call("{", id="a")], [call("}")], [call("[]", id="b")]]
    server = serve(lambda x: x.stream([*(chunk(delta={"tool_calls": each}) for each in deltas), chunk(finish="stop")]))
    client = api.client(base_url=server.url)
    first = api.all(api.stream(client))[0].choices[0].delta.tool_calls[0]
    assert (first.index, first.type, first.function.arguments) == (0, "", "{")
    calls = api.final(api.stream(client)).choices[0].message.tool_calls
    assert [(each.id, each.function.name, each.function.arguments) for each in calls] == [
        ("a", "f", "{}"),
        ("b", "f", "[]"),
    ]


def test_the_pieces_of_a_function_call_are_gathered(api: Any, serve: Any) -> None:
    pieces = [{"name": "f", "arguments": ""}, {"arguments": '{"a"'}, {"arguments": ":1}"}]
    server = serve(
        lambda x: x.stream([*(chunk(delta={"function_call": each}) for each in pieces), chunk(finish="stop")])
    )
    final = api.final(api.stream(api.client(base_url=server.url)))
    assert final.choices[0].message.function_call == {"name": "f", "arguments": '{"a":1}'}


@pytest.mark.parametrize(
    "body", [{"id": "x"}, {"choices": None}, {"choices": "x"}, {"choices": ["x"]}, {"choices": [{"message": "x"}]}, []]
)
def test_what_is_plainly_no_answer_is_an_error(api: Any, serve: Any, body: Any) -> None:
    with pytest.raises(ResponseError):
        whole(api, serve, body)


TEXT = {"index": 0, "text": "hello", "finish_reason": "stop"}
MESSAGE = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}


@pytest.mark.parametrize("body", [answer(choices=[TEXT]), {"choices": []}, {"choices": [{"error": {"code": 502}}]}])
def test_an_answer_of_another_kind_is_not_an_empty_one(api: Any, serve: Any, body: Any) -> None:
    with pytest.raises(ResponseError) as caught:
        whole(api, serve, body)
    assert caught.value.body == body


def test_an_error_in_place_of_choices_is_told(api: Any, serve: Any) -> None:
    with pytest.raises(ResponseError, match="upstream failed"):
        whole(api, serve, {"error": {"message": "upstream failed"}, "choices": []})


def test_a_chat_is_no_completion(api: Any, serve: Any) -> None:
    client = api.client(base_url=serve(lambda x: x.reply(200, answer(choices=[MESSAGE]))).url)
    with pytest.raises(ResponseError):
        api.complete(client)


@pytest.mark.parametrize("choice", [TEXT, MESSAGE, {**TEXT, "delta": None}, {"index": 0, "error": {"code": 502}}])
def test_an_event_of_another_kind_is_not_an_empty_chunk(api: Any, serve: Any, choice: Any) -> None:
    client = api.client(base_url=serve(lambda x: x.stream([{**chunk(), "choices": [choice]}])).url)
    with pytest.raises(ResponseError) as caught:
        api.all(api.stream(client))
    assert json.loads(caught.value.body)["choices"] == [choice]


def test_no_key_is_too_odd_to_be_kept(api: Any, serve: Any) -> None:
    odd = {**without(answer(), "id"), "cls": 1, "self": 2, "_fields_set": [3]}
    read = whole(api, serve, odd)
    assert read.choices[0].message.content
    assert read.dict() == odd


@pytest.mark.parametrize("data", [{"id": "x"}, {"choices": None}, {"choices": [{"delta": "x"}]}, [], "x"])
def test_what_is_plainly_no_chunk_is_an_error(api: Any, serve: Any, data: Any) -> None:
    def script(x: Exchange) -> None:
        x.stream([chunk("a"), data])

    with pytest.raises(ResponseError):
        api.all(api.stream(api.client(base_url=serve(script).url)))


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), ("0", "1"), (0, "1.0")])
def test_choices_are_told_apart_however_their_index_is_written(api: Any, serve: Any, first: Any, second: Any) -> None:
    parts = [("A", first, None), ("B", second, None), ("a", first, "stop"), ("b", second, "stop")]
    server = serve(lambda x: x.stream([chunk(text, index=index, finish=finish) for text, index, finish in parts]))
    stream = api.stream(api.client(base_url=server.url))
    assert [(each.index, each.message.content) for each in api.final(stream).choices] == [(0, "Aa"), (1, "Bb")]
    assert stream._reader.partial == "Aa"


@pytest.mark.parametrize("index", [1.5, "x", None, [], "nan", float("1e400")])
def test_an_index_that_is_none_is_the_first(index: Any) -> None:
    assert _gather.index_of({"index": index}) == 0


@pytest.mark.parametrize("choices", [{"choices": None}, {}])
def test_usage_without_choices_loses_no_stream(api: Any, serve: Any, choices: Any) -> None:
    last = {**without(chunk(), "choices"), **choices, "usage": COUNTS}
    server = serve(lambda x: x.stream([chunk("a", finish="stop"), last]))
    whole = api.final(api.stream(api.client(base_url=server.url)))
    assert whole.choices[0].message.content == "a"
    assert whole.usage.total_tokens == 3


def test_an_event_that_is_no_chunk_tells_what_came_before_it(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream([chunk("a"), {"type": "ping"}]))
    with pytest.raises(ResponseError, match="not a ChatCompletionChunk") as caught:
        api.final(api.stream(api.client(base_url=server.url)))
    assert caught.value.partial == "a"
