"""Streams, of services that behave and of those that do not, for both clients."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any

from tests.sdk.misbehaving import Exchange, chunk, in_one_write, words


def test_a_stream_gives_typed_chunks(api: Any, serve: Any) -> None:
    server = serve(lambda x: x.stream(words()))
    chunks = api.all(api.stream(api.client(base_url=server.url)))
    assert [c.choices[0].delta.content for c in chunks] == ["w0 ", "w1 ", "w2 "]
    assert server.requests[0].json["stream"] is True
    assert server.requests[0].headers["accept"] == "text/event-stream"


def test_legal_event_streams_are_read(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        first, second = json.dumps(chunk("a")).encode(), json.dumps(chunk("b", finish="stop"), indent=1).encode()
        x.part(b"\xef\xbb\xbf: hello\r\n\r\nevent: chunk\r\nid: 7\r\ndata: " + first + b"\r\n\r\n: ping\n\n")
        x.part(b"".join(b"data:" + line + b"\n" for line in second.split(b"\n")) + b"retry: 3\n\n")
        x.end_stream()

    assert api.text(api.stream(api.client(base_url=serve(script).url))) == ["a", "b"]


def test_a_usage_chunk_without_choices_is_kept_but_not_shown(api: Any, serve: Any) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    server = serve(lambda x: x.stream([*words(2), chunk(choices=[], usage=usage)]))
    stream = api.stream(api.client(base_url=server.url))
    assert "".join(c.choices[0].delta.content for c in api.all(stream)) == "w0 w1 "
    assert stream.usage.total_tokens == 7
    assert api.final(stream).usage.total_tokens == 7


def test_the_final_answer_gathers_everything(api: Any, serve: Any) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, "function": function}]}

    token = {"token": "a", "logprob": -1.0}
    chunks = [
        chunk(delta={"role": "assistant", "content": ""}),
        chunk("Hel"),
        chunk("x", index=1),
        chunk("lo", finish="stop"),
        chunk(index=1, delta={"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f"}}]}),
        chunk(index=1, delta=call(0, arguments='{"a"')),
        chunk(index=1, delta=call(1, name="g", arguments="{}")),
        chunk(index=1, delta=call(0, arguments=": 1}"), finish="tool_calls"),
    ]
    for part in chunks[1], chunks[3]:
        part["choices"][0]["logprobs"] = {"content": [token]}
    chunks[-1].update(usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, system_fingerprint="fp")
    server = serve(lambda x: x.stream(chunks))
    stream = api.stream(api.client(base_url=server.url), n=2)
    api.next(stream)
    whole = api.final(stream)
    first, second = whole.choices
    assert (first.message.content, first.finish_reason, first.message.role) == ("Hello", "stop", "assistant")
    assert [one.token for one in first.logprobs.content] == ["a", "a"]
    assert second.message.content == "x"
    assert [one.function.arguments for one in second.message.tool_calls] == ['{"a": 1}', "{}"]
    assert second.message.tool_calls[0].id == "c1"
    assert whole.object == "chat.completion"
    assert whole.usage.total_tokens == 3
    assert whole.system_fingerprint == "fp"


def test_what_a_model_thinks_is_told_from_what_it_says(api: Any, serve: Any) -> None:
    thoughts = [chunk("", delta={"reasoning_content": text}) for text in ("hm", "m")]
    server = serve(lambda x: x.stream([*thoughts, chunk("Hel"), chunk("lo", finish="stop")]))
    client = api.client(base_url=server.url)
    assert [c.choices[0].delta.reasoning_content for c in api.all(api.stream(client))] == ["hm", "m", None, None]
    assert "".join(api.text(api.stream(client))) == "Hello"
    message = api.final(api.stream(client)).choices[0].message
    assert (message.reasoning_content, message.content) == ("hmm", "Hello")


def test_a_text_completion_streams_and_gathers(api: Any, serve: Any) -> None:
    def piece(text: str, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": finish}
        return {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}

    server = serve(lambda x: x.stream([piece("once "), piece("upon", "length")]))
    client = api.client(base_url=server.url)
    assert api.text(api.complete_stream(client)) == ["once ", "upon"]
    whole = api.final(api.complete_stream(client))
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("once upon", "length")


def test_a_stream_knows_its_answer(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream(x_request_id="req-1")
        x.event(chunk("a", finish="stop"))
        x.end_stream()

    stream = api.stream(api.client(base_url=serve(script).url))
    assert stream.raw_response is None
    whole = api.final(stream)
    assert stream.request_id == whole.request_id == "req-1"
    assert stream.raw_response.status_code == 200
    assert stream.raw_response.headers["content-type"] == "text/event-stream"


def test_ten_streams_in_a_row_use_one_connection(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        for one in words():
            x.event(one)
        x.event(b"[DONE]")
        time.sleep(0.01)  # the end of the body comes in a segment of its own
        x.end_stream(done=False)

    server = serve(script)
    client = api.client(base_url=server.url)
    for _ in range(10):
        assert len(api.all(api.stream(client))) == 3
    assert server.connections == 1


def test_a_compressed_stream_is_read(api: Any, serve: Any) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream(content_encoding="gzip")
        body = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in words())
        x.part(gzip.compress(body + b"data: [DONE]\n\n"))
        x.end_stream(done=False)

    assert len(api.all(api.stream(api.client(base_url=serve(script).url)))) == 3


def test_usage_is_known_as_soon_as_it_has_come(api: Any, serve: Any) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    server = serve(in_one_write([*words(), chunk(choices=[], usage=usage), b"[DONE]"]))
    stream = api.stream(api.client(base_url=server.url))
    api.next(stream)
    assert stream.usage.total_tokens == 7
    assert [c.choices[0].delta.content for c in api.all(stream)] == ["w1 ", "w2 "]


def test_none_may_be_what_a_users_function_makes(api: Any, serve: Any) -> None:
    url = serve(in_one_write([{"n": 1}, {"n": 2}, b"[DONE]"])).url
    assert api.all(api.client(base_url=url).infer_stream(url, {}, lambda _value: None)) == [None, None]
