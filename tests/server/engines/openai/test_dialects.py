"""What each engine is told, and how its events are read. The events are written as those servers write them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from octoai.server.engines.base import Delta, Event, Finished, Generation, Started, Usage
from octoai.server.engines.openai.dialects import DIALECTS
from octoai.server.engines.openai.reader import Reader
from octoai.server.engines.openai.refusals import refusal
from octoai.server.errors import BadRequest, ContextLengthExceeded, EngineFailed, Refusal, Unavailable

CHAT = Generation(max_tokens=9, messages=[{"role": "developer", "content": "Hi"}])
TEXT = Generation(max_tokens=9, text="Hi")
EVERYTHING = Generation(
    max_tokens=9,
    messages=[{"role": "user", "content": "Hi"}],
    temperature=0.5,
    top_p=0.9,
    top_k=7,
    min_p=0.1,
    frequency_penalty=0.2,
    presence_penalty=0.3,
    repetition_penalty=1.2,
    seed=-1,
    stop=("a", "b"),
    logit_bias={5: -100},
    logprobs=2,
    ignore_eos=True,
    schema={"type": "object"},
)


def body(dialect: str, generation: Generation) -> dict[str, Any]:
    return dict(json.loads(DIALECTS[dialect].body(generation, "up/model")))


@pytest.mark.parametrize("name", DIALECTS)
def test_every_request_is_a_stream_of_the_upstream_model(name: str) -> None:
    for generation in (CHAT, TEXT):
        said = body(name, generation)
        assert (said["model"], said["stream"], said["max_tokens"], said["n"]) == ("up/model", True, 9, 1)
    assert DIALECTS[name].path(CHAT) == "/chat/completions"
    assert DIALECTS[name].path(TEXT) == "/completions"


def test_vllm_is_told_everything_by_our_names() -> None:
    said = body("vllm", EVERYTHING)
    assert said["repetition_penalty"] == 1.2
    assert (said["top_k"], said["min_p"], said["ignore_eos"], said["seed"]) == (7, 0.1, True, -1)
    assert said["logit_bias"] == {"5": -100}
    assert (said["logprobs"], said["top_logprobs"]) == (True, 2)
    assert said["stop"] == ["a", "b"]
    assert said["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert said["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_llama_cpp_is_told_everything_by_its_own_names() -> None:
    said = body("llama.cpp", EVERYTHING)
    assert said["repeat_penalty"] == 1.2
    assert "repetition_penalty" not in said
    assert said["response_format"] == {"type": "json_object", "schema": {"type": "object"}}
    assert said["seed"] != 0xFFFFFFFF  # which would mean a random one
    assert 0 <= said["seed"] < 2**32
    assert said["messages"] == [{"role": "user", "content": "Hi"}]


def test_llama_cpp_is_not_told_limits_that_limit_nothing_and_cannot_be_read() -> None:
    unlimited = {"type": "array", "minItems": 1, "maxItems": 2**32, "items": {"type": "integer", "maximum": 2**64 - 1}}
    generation = Generation(max_tokens=9, text="Hi", schema=unlimited)
    told = body("llama.cpp", generation)["response_format"]["schema"]
    assert told == {"type": "array", "minItems": 1, "items": {"type": "integer"}}
    assert body("vllm", generation)["response_format"]["json_schema"]["schema"] == unlimited


@pytest.mark.parametrize(
    ("given", "samplers"),
    [
        ({}, []),
        ({"temperature": 0.0, "seed": 4}, []),
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "presence_penalty": 0.5}, ["penalties"]),
        ({"temperature": 0.1, "top_p": 0.9}, ["top_p"]),
        ({"top_p": 0.9}, ["top_p"]),
        ({"top_k": 40, "min_p": 0.05}, ["top_k", "min_p"]),
        ({"frequency_penalty": 1.0}, ["penalties"]),
        ({"presence_penalty": -1.0, "top_p": 0.5}, ["penalties", "top_p"]),
        ({"repetition_penalty": 1.1}, ["penalties"]),
    ],
)
def test_llama_cpp_runs_only_the_samplers_that_change_something(given: dict[str, Any], samplers: list[str]) -> None:
    said = body("llama.cpp", Generation(max_tokens=1, text="x", **given))
    assert said["samplers"] == [*samplers, "temperature"]


@pytest.mark.parametrize("seed", [0, -1, 2**32 - 1, 2**63 - 1, -(2**63)])
def test_no_seed_becomes_llama_cpps_random_one(seed: int) -> None:
    assert body("llama.cpp", Generation(max_tokens=1, text="x", seed=seed))["seed"] != 0xFFFFFFFF


def test_defaults_are_said_too_because_servers_have_others() -> None:
    for name in ("llama.cpp", "vllm"):
        said = body(name, TEXT)
        assert (said["temperature"], said["top_p"], said["top_k"], said["min_p"]) == (1.0, 1.0, 0, 0.0)
    assert "seed" not in body("vllm", TEXT)


def test_openai_and_ollama_are_told_only_what_they_know() -> None:
    for name in ("openai", "ollama"):
        said = body(name, CHAT)
        assert not said.keys() & {"top_k", "min_p", "repetition_penalty", "repeat_penalty", "ignore_eos"}


def test_the_developer_role_is_system_for_servers_that_do_not_know_it() -> None:
    assert [body(name, CHAT)["messages"][0]["role"] for name in ("llama.cpp", "vllm", "ollama", "openai")] == [
        "system",
        "system",
        "system",
        "developer",
    ]


def test_prompts_are_text_or_tokens() -> None:
    assert body("vllm", TEXT)["prompt"] == "Hi"
    assert body("vllm", Generation(max_tokens=1, text=""))["prompt"] == ""
    assert body("vllm", Generation(max_tokens=1, tokens=[1, 2]))["prompt"] == [1, 2]


def test_llama_is_asked_for_a_token_more_than_none_or_it_says_no_logprob_at_all() -> None:
    names = ("vllm", "ollama", "openai", "llama.cpp")
    text, chat = Generation(max_tokens=1, text="x", logprobs=0), Generation(max_tokens=1, messages=(), logprobs=0)
    assert [body(name, text)["logprobs"] for name in names] == [0, 0, 0, 1]
    assert [body(name, chat)["top_logprobs"] for name in names] == [0, 0, 0, 1]
    assert body("llama.cpp", Generation(max_tokens=1, text="x", logprobs=3))["logprobs"] == 3


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_ollama_which_ignores_how_tools_are_chosen_knows_of_none_where_none_may_be_called(choice: str | None) -> None:
    asked = Generation(max_tokens=1, messages=[{"role": "user", "content": "x"}], tools=TOOLS, tool_choice=choice)
    assert ("tools" in body("ollama", asked)) == (choice != "none")
    assert body("openai", asked)["tools"] == TOOLS


def test_one_call_at_a_time_is_asked_of_servers_that_know_it() -> None:
    asked = Generation(max_tokens=1, messages=[ASKED], tools=TOOLS, parallel_tool_calls=False)
    assert [body(name, asked)["parallel_tool_calls"] for name in ("vllm", "openai")] == [False, False]
    assert "parallel_tool_calls" not in body("vllm", Generation(max_tokens=1, messages=[ASKED], tools=TOOLS))
    assert "parallel_tool_calls" not in body("vllm", replace(asked, tools=()))


def test_vllm_is_told_how_many_tokens_are_the_least() -> None:
    assert body("vllm", Generation(max_tokens=9, text="x", min_tokens=4))["min_tokens"] == 4
    assert "min_tokens" not in body("vllm", TEXT)


# Chats that end with the assistant

ASKED = {"role": "user", "content": "x"}
BEGUN = {"role": "assistant", "content": "y"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
GOES_ON = {"add_generation_prompt": False, "continue_final_message": True}


def prompt(dialect: str, messages: list[dict[str, Any]], **given: Any) -> dict[str, Any]:
    """What of the body is about the prompt."""
    said = body(dialect, Generation(max_tokens=1, messages=messages, **given))
    return {name: said[name] for name in ("messages", "chat_template_kwargs", *GOES_ON) if name in said}


def test_an_answer_that_has_begun_is_continued() -> None:
    begun = [ASKED, BEGUN]
    assert prompt("vllm", begun) == {"messages": begun, **GOES_ON}
    assert prompt("llama.cpp", begun) == {"messages": begun}  # it does by itself
    for name in ("vllm", "llama.cpp"):
        assert prompt(name, [*begun, BEGUN], continues=True) == {"messages": [*begun, BEGUN], **GOES_ON}


@pytest.mark.parametrize(
    ("messages", "continues"),
    [([ASKED, BEGUN, BEGUN], None), ([ASKED, CALLING], None), ([ASKED, BEGUN], False), ([ASKED, BEGUN, BEGUN], False)],
)
def test_after_other_messages_of_the_assistants_comes_a_new_turn(messages: list[Any], continues: bool | None) -> None:
    assert prompt("vllm", messages, continues=continues) == {"messages": messages}
    said = prompt("llama.cpp", messages, continues=continues)  # which would go on with the last one, or refuse it
    assert said == {"messages": [*messages, {"role": "user", "content": ""}]}


def test_what_a_template_is_told_goes_with_the_messages_also_to_be_counted() -> None:
    told = {"enable_thinking": False}
    asked = Generation(max_tokens=1, messages=[ASKED, BEGUN], template_kwargs=told)
    assert prompt("llama.cpp", [ASKED], template_kwargs=told) == {"messages": [ASKED], "chat_template_kwargs": told}
    for name, more in (("vllm", GOES_ON), ("llama.cpp", {})):
        counting = DIALECTS[name].counting(asked, "up")
        assert counting is not None
        said = json.loads(next(counting)[1])
        assert said.items() >= {"messages": [ASKED, BEGUN], "chat_template_kwargs": told, **more}.items()


@pytest.mark.parametrize(
    ("dialect", "given", "name"),
    [
        *(
            (dialect, {"template_kwargs": {"enable_thinking": False}}, name)
            for dialect, name in (
                ("openai", "chat_template_kwargs"),
                ("ollama", "chat_template_kwargs"),
                ("vllm", None),
            )
        ),
        *(
            (dialect, {"min_tokens": 1}, name)
            for dialect, name in (("openai", "min_tokens"), ("ollama", "min_tokens"), ("llama.cpp", "min_tokens"))
        ),
        *((dialect, {"continues": False}, "continue_final_message") for dialect in ("openai", "ollama")),
        *((dialect, {"continues": True}, None) for dialect in ("vllm", "llama.cpp")),
        ("vllm", {"min_tokens": 1, "tools": TOOLS, "parallel_tool_calls": False}, None),
        ("openai", {"tools": TOOLS, "parallel_tool_calls": False}, None),
        ("ollama", {"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ("ollama", {"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False}, None),
        ("ollama", {"parallel_tool_calls": False}, None),
        ("openai", {"top_k": 5}, "top_k"),
        ("openai", {"min_p": 0.1}, "min_p"),
        ("openai", {"repetition_penalty": 1.1}, "repetition_penalty"),
        ("openai", {"ignore_eos": True}, "ignore_eos"),
        ("ollama", {"logit_bias": {1: 1.0}}, "logit_bias"),
        ("llama.cpp", {"tools": TOOLS}, "tools"),
        ("llama.cpp", {"tools": TOOLS, "tool_choice": "none"}, None),
        ("ollama", {"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ("ollama", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        *(("ollama", {"tools": TOOLS, "tool_choice": choice}, None) for choice in (None, "auto", "none")),
        ("vllm", {"top_k": 5, "min_p": 0.1, "ignore_eos": True}, None),
        ("openai", {}, None),
    ],
)
def test_what_a_server_cannot_do_is_named(dialect: str, given: dict[str, Any], name: str | None) -> None:
    generation = Generation(max_tokens=1, messages=[{"role": "user", "content": "x"}], **given)
    assert DIALECTS[dialect].unsupported(generation) == name


# Reading


def read(*payloads: dict[str, Any] | str) -> list[Event]:
    reader = Reader()
    events: list[Event] = []
    for payload in payloads:
        said = payload if isinstance(payload, str) else json.dumps(payload)
        reader.read_events([f"data: {said}".encode()], events)
    return events


def delta(text: str | None, index: int = 0, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
    return {"id": "x", "object": "chat.completion.chunk", "choices": [choice], **more}


def timings(cached: int, prompt: int, predicted: int) -> dict[str, Any]:
    return {"timings": {"cache_n": cached, "prompt_n": prompt, "prompt_ms": 1.5, "predicted_n": predicted}}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]}
PROGRESS = {"choices": [], "prompt_progress": {"total": 12, "cache": 4, "processed": 12, "time_ms": 3}}


def test_llama_cpp_counts_in_timings() -> None:
    events = read(
        PROGRESS,
        {**ROLE, **timings(4, 8, 1)},
        delta("He", **timings(4, 8, 1)),
        delta("llo", **timings(4, 8, 3)),
        delta(None, reason="stop", **timings(4, 8, 4)),
        "[DONE]",
    )
    assert events == [
        Started(12, 4),
        Delta(0, "He", 1),
        Delta(0, "llo", 3),
        Finished({0: "stop"}, Usage(12, 4, 4)),
    ]


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0, **details}}


def test_vllm_counts_in_usage_on_every_event() -> None:
    events = read(
        {**ROLE, **usage(5, 0)},
        delta("a", **usage(5, 1)),
        delta("bc", reason="length", **usage(5, 3, cached=2)),
        {"choices": [], **usage(5, 3, cached=2)},
        "[DONE]",
    )
    assert events == [
        Started(5, 0),
        Delta(0, "a", 1),
        Delta(0, "bc", 3),
        Finished({0: "length"}, Usage(5, 2, 3)),
    ]


def test_openai_counts_in_one_last_event_without_choices() -> None:
    events = read(
        delta("a", usage=None),
        delta("b", 1, usage=None),
        delta("c", usage=None),
        delta(None, reason="stop", usage=None),
        delta(None, 1, reason="length", usage=None),
        {"choices": [], **usage(7, 9)},
        "[DONE]",
    )
    assert events == [
        Started(0),
        Delta(0, "a", 1),
        Delta(1, "b", 1),
        Delta(0, "c", 2),
        Finished({0: "stop", 1: "length"}, Usage(7, 0, 9)),
    ]


def test_a_server_that_counts_nothing_is_counted_by_its_events() -> None:
    assert read(delta("a"), delta("b"), delta("", reason="stop"), "[DONE]")[-1] == Finished({0: "stop"}, Usage(0, 0, 2))


def test_ollama_says_the_reason_and_usage_at_once() -> None:
    events = read(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": "stop"}]},
        {"choices": [], **usage(26, 2)},
        "[DONE]",
    )
    assert events == [Started(0), Delta(0, "Hi", 1), Finished({0: "stop"}, Usage(26, 0, 2))]


def test_completions_say_text() -> None:
    events = read(
        {"object": "text_completion", "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]},
        {"object": "text_completion", "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]},
        "[DONE]",
    )
    assert events == [Started(0), Delta(0, "a", 1), Finished({0: "stop"}, Usage(0, 0, 1))]


def test_other_tokens_are_left_out_where_none_were_asked_for() -> None:
    others = [{"token": "a", "logprob": -0.5}]
    chat_form = {"content": [{"token": "b", "logprob": -0.1, "top_logprobs": others}]}
    lists = {"tokens": ["b"], "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.5}], "text_offset": [0]}
    for choice in ({"delta": {"content": "b"}, "logprobs": chat_form}, {"text": "b", "logprobs": lists}):
        for number, num_others in ((0, 0), (1, 1)):
            events: list[Event] = []
            event = b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode()
            Reader(Generation(max_tokens=1, text="x", logprobs=number)).read_events([event], events)
            (delta,) = [each for each in events if isinstance(each, Delta)]
            assert delta.logprobs is not None
            assert [len(entry["top_logprobs"]) for entry in delta.logprobs] == [num_others]
            assert [entry["logprob"] for entry in delta.logprobs] == [-0.1]


def test_logprobs_are_read_in_both_forms() -> None:
    chat_form = {"content": [{"token": "é", "logprob": -0.1, "bytes": None, "top_logprobs": []}]}
    (_, chat_delta) = read({"choices": [{"index": 0, "delta": {"content": "é"}, "logprobs": chat_form}]})
    assert isinstance(chat_delta, Delta)
    assert chat_delta.logprobs == [{"token": "é", "logprob": -0.1, "bytes": [0xC3, 0xA9], "top_logprobs": []}]
    lists = {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [{"a": -0.5}], "text_offset": [0]}
    (_, text_delta) = read({"choices": [{"index": 0, "text": "a", "logprobs": lists}]})
    assert isinstance(text_delta, Delta)
    assert text_delta.logprobs == [
        {
            "token": "a",
            "logprob": -9999.0,
            "bytes": [97],
            "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
        }
    ]


@pytest.mark.parametrize(
    "payload",
    [
        {"error": {"message": "out of memory", "type": "server_error"}},
        {"error": "out of memory"},
        {"object": "error", "message": "out of memory"},
    ],
)
def test_an_error_event_is_a_failure_with_its_words(payload: dict[str, Any]) -> None:
    with pytest.raises(EngineFailed, match="out of memory"):
        read(delta("a"), payload)


def test_an_end_without_a_reason_is_a_failure() -> None:
    with pytest.raises(EngineFailed, match="without saying why"):
        read(delta("a"), "[DONE]")


def test_a_reason_without_an_end_is_not_an_end() -> None:
    assert not any(isinstance(event, Finished) for event in read(delta("a"), delta(None, reason="stop")))


@pytest.mark.parametrize(
    "payload",
    [
        *("not json", "[]", "null", "5", '"x"', '{"choices": 5}', '{"choices": [null]}', '{"choices": ["x"]}'),
        *('{"choices": [{"delta": "x"}]}', '{"choices": [{"delta": {"content": 5}}]}', '{"choices": {"a": 1}}'),
        *(
            '{"usage": 5}',
            '{"usage": [1]}',
            '{"timings": {"cache_n": 1}}',
            '{"timings": 5}',
            '{"timings": {"cache_n": "a"}}',
        ),
        '{"choices": [{"text": "a", "logprobs": {"content": [{}]}}]}',
        '{"choices": [{"text": "a", "logprobs": 5}]}',
        '{"choices": [{"text": "a", "index": []}]}',
        '{"usage": {"prompt_tokens_details": 5, "prompt_tokens": 1}}',
    ],
)
def test_an_event_of_another_shape_is_the_engines_failure(payload: str) -> None:
    with pytest.raises(EngineFailed):
        read(payload)


# Refusals


def refused(status: int, said: Any, generation: Generation = CHAT) -> Refusal:
    return refusal(status, said if isinstance(said, bytes) else json.dumps(said).encode(), generation)


def test_llama_cpps_context_error_keeps_both_numbers() -> None:
    error = {
        "code": 400,
        "message": "request (9031 tokens) exceeds the available context size (8192 tokens), try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 9031,
        "n_ctx": 8192,
    }
    for generation, param in ((CHAT, "messages"), (TEXT, "prompt")):
        answer = refused(400, {"error": error}, generation)
        assert isinstance(answer, ContextLengthExceeded)
        assert (answer.prompt_tokens, answer.context_length, answer.param) == (9031, 8192, param)


VLLM_TOO_LONG = [
    "This model's maximum context length is 8192 tokens. However, you requested 9512 tokens (9000 in the messages, "
    "512 in the completion). Please reduce the length of the messages or completion.",
    "This model's maximum context length is 8192 tokens. However, your request has 9000 input tokens. "
    "Please reduce the length of the input messages. (parameter=input_tokens, value=9000)",
    "You passed 9000 input tokens and requested 512 output tokens. However, the model's context length is only "
    "8192 tokens, resulting in a maximum input length of 7680 tokens. Please reduce the length of the input prompt.",
    "This model's maximum context length is 8192 tokens. However, you requested 0 output tokens and your prompt "
    "contains at least 9000 input tokens, for a total of at least 9000 tokens. Please reduce the length of the input "
    "prompt or the number of requested output tokens. (parameter=input_tokens, value=9000)",
    "this model's maximum context length is 8192 tokens, but the prompt contains 9000 input tokens",
]


@pytest.mark.parametrize("message", VLLM_TOO_LONG, ids=range(len(VLLM_TOO_LONG)))
def test_vllms_context_errors_keep_both_numbers(message: str) -> None:
    for said in ({"error": {"message": message, "code": 400}}, {"object": "error", "message": message, "code": 400}):
        answer = refused(400, said)
        assert isinstance(answer, ContextLengthExceeded)
        assert (answer.prompt_tokens, answer.context_length) == (9000, 8192)


VLLM_TOO_MUCH = [
    "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 8192 tokens and "
    "your request has 8000 input tokens (512 > 8192 - 8000).",
    "This model's maximum context length is 8192 tokens. However, your request has 8000 input tokens plus 512 "
    "'max_tokens'. Please reduce one or the other. (parameter=input_tokens, max_tokens, value=(8000, 512))",
    "This model's maximum context length is 8192 tokens. However, you requested 512 output tokens and your prompt "
    "contains at least 7681 input tokens, for a total of at least 8193 tokens.",
    "This model's maximum context length is 8192 tokens. However, you requested 512 output tokens and your prompt "
    "contains 90000 characters (more than 65536 characters, which is the upper bound for 7680 input tokens).",
]


@pytest.mark.parametrize("message", VLLM_TOO_MUCH, ids=range(len(VLLM_TOO_MUCH)))
def test_where_max_tokens_is_in_the_sum_the_engines_own_words_are_kept(message: str) -> None:
    answer = refused(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
    assert (answer.status, answer.code) == (400, "context_length_exceeded")
    assert message in answer.message


@pytest.mark.parametrize(
    ("status", "kind", "our_status"),
    [
        (400, BadRequest, 400),
        (422, BadRequest, 400),
        (429, Unavailable, 503),
        (503, Unavailable, 503),
        (500, EngineFailed, 502),
        (502, EngineFailed, 502),
        (401, EngineFailed, 502),
        (404, EngineFailed, 502),
    ],
)
@pytest.mark.parametrize(
    "said",
    [{"error": {"message": "no"}}, {"error": "no"}, {"message": "no"}, {"error": None}, [], 5, "no", b"<html>", b""],
    ids=repr,
)
def test_a_status_has_one_meaning_whatever_the_body(status: int, kind: type, our_status: int, said: Any) -> None:
    answer = refused(status, said)
    assert isinstance(answer, kind)
    assert answer.status == our_status
    if our_status == 503:
        assert int(answer.headers["retry-after"]) >= 1


def test_an_engines_own_parameter_name_is_passed_on() -> None:
    answer = refused(400, {"error": {"message": "bad", "param": "temperature"}})
    assert answer.param == "temperature"
    for no_name in (3, ["messages"], {}, True, "", None):
        assert refused(400, {"error": {"message": "bad", "param": no_name}}).param == "messages"


@pytest.mark.parametrize("said", ["too hot", {"error": "too hot"}, {"message": "too hot"}], ids=repr)
def test_an_engines_own_words_are_passed_on(said: Any) -> None:
    assert refused(400, said).message == "The engine refused: too hot"


@pytest.mark.parametrize("said", ["", {"error": None}, {}, []], ids=repr)
def test_an_engine_that_says_nothing_did_not_say_why(said: Any) -> None:
    assert refused(400, said).message == "The engine refused: it did not say why"


def test_llama_cpp_is_put_in_words_where_its_grammar_does_not_take_how_an_answer_begins() -> None:
    said = {"error": {"code": 400, "message": "Failed to initialize samplers: std::exception"}}
    begun = Generation(max_tokens=9, messages=[ASKED, BEGUN], schema={})
    assert refused(400, said, begun).param == "response_format"
    assert refused(400, said, replace(begun, messages=[ASKED])).param == "messages"
    assert refused(400, said, replace(begun, schema=None)).param == "messages"


def test_a_grammar_that_llama_cpp_cannot_read_is_not_for_how_an_answer_begins() -> None:
    said = {"error": {"code": 400, "message": "Failed to initialize samplers: failed to parse grammar"}}
    answer = refused(400, said, Generation(max_tokens=9, messages=[ASKED, BEGUN], schema={}))
    assert answer.param == "response_format"
    assert "failed to parse grammar" in answer.message
    assert "last message" not in answer.message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ('invalid type for "enable_thinking" (expected boolean, got string)', "chat_template_kwargs"),
        ("------------ While executing For: ...{% for each in documents %}... ^ Error", "chat_template_kwargs"),
        ("Found unexpected chat template kwargs from request: {'documents'}", "chat_template_kwargs"),
        ("Conversation roles must alternate user/assistant", "messages"),
        ("cannot compile this grammar", "response_format"),
        ("enable_thinking should be a boolean", "chat_template_kwargs"),
        ("temperature is too high for these documents", "messages"),
        ("'is' is undefined", "chat_template_kwargs"),
    ],
)
def test_a_complaint_of_what_a_template_was_told_is_of_that(message: str, param: str) -> None:
    told = Generation(max_tokens=9, messages=[ASKED], template_kwargs={"enable_thinking": "x", "documents": 5, "is": 1})
    said = {"error": {"code": 400, "message": message}}
    assert refused(400, said, told).param == param
    assert refused(400, said, replace(told, template_kwargs=None)).param == param.replace(
        "chat_template_kwargs", "messages"
    )


def test_the_engines_key_and_errors_of_its_own_are_not_told_to_our_caller() -> None:
    assert "secret" not in refused(500, {"error": {"message": "secret trace"}}).message
    assert "secret" not in refused(401, {"error": {"message": "wrong key secret"}}).message
