"""Events that are read by their shape mean what they mean when they are read in full."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from octoai.server.engines.base import Delta, Deltas, Event, Finished, Started, Usage
from octoai.server.engines.openai import reader
from octoai.server.engines.openai.answer import Answer
from octoai.server.engines.openai.odd import MAX_KNOWN, OddEvents
from octoai.server.engines.openai.plain import Habits, plain
from octoai.server.engines.openai.timed import timed
from octoai.server.errors import EngineFailed
from tests.server.engine_events import BOTH, ONE, TIMED, saying
from tests.server.singly import singly

TEXTS = st.one_of(
    st.text(max_size=4),
    st.sampled_from([" word", "[DONE]", '"', "\\", "é", "\n", "\u2028", '","x":"', "", "7", '":7,']),
)


@st.composite
def timings(draw: st.DrawFn, total: int) -> dict[str, Any]:
    """As llama.cpp says them, and now and then as it does not."""
    others = [{"prompt_n": 4}, {"cache_n": 2}, {"predicted_n": None}, {"predicted_n": 0}, {"draft_n": 3}, {"x": "1"}]
    odd = draw(st.sampled_from(others)) if draw(st.integers(0, 9)) == 0 else {}
    numbers = st.sampled_from([0.0, 1.5, 17, 1e-05, 1e22, -1.0])
    times = {"predicted_n": total, "predicted_ms": draw(numbers), "predicted_per_second": draw(numbers)}
    counts = {"cache_n": 1, "prompt_n": 2, "prompt_ms": 1.5}
    return {"created": draw(st.sampled_from([1795887152, 1795887153])), "timings": {**counts, **times, **odd}}


@st.composite
def odd_events(draw: st.DrawFn, total: int) -> dict[str, Any]:
    """One without text, as servers send them at the beginning and at the end, and now and then as none does."""
    choices = draw(
        st.sampled_from(
            [
                [],
                [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
                [{"index": 0, "delta": {}, "finish_reason": "length", "stop_reason": 7}],
                [{"delta": {"content": ""}, "finish_reason": "stop", "index": 0}],
                [{"index": 0, "delta": {"content": "7"}, "finish_reason": None}],
            ]
        )
    )
    prompt, cached = draw(st.sampled_from([0, 3, 4, 50])), draw(st.integers(0, 99))
    usage: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + total, "completion_tokens": total}
    usage |= draw(
        st.sampled_from(
            [
                {},
                {"prompt_tokens_details": None},
                {"prompt_tokens_details": {"cached_tokens": cached}},
                {"prompt_tokens_details": {"cached_tokens": None, "prompt_tokens": 5}},
                {"completion_tokens_details": {"reasoning_tokens": 3}},
                {"completion_tokens_details": {"reasoning_tokens": -3}},
                {"completion_tokens_details": 7},
                {"completion_tokens_details": {"completion_tokens": 3}},
                {"completion_tokens": None},
            ]
        )
    )
    frames = [{"id": "x"}, {"id": "x", "created": 1795887152}, {"id": "x", "created": 17}, {}, {"ids": {"id": "index"}}]
    return {**draw(st.sampled_from(frames)), "choices": choices, **draw(st.sampled_from([{"usage": usage}, {}]))}


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """An answer as some server might write it, most events alike, some not."""
    says_usage, has_role, is_completion = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    is_timed = draw(st.booleans())
    spaced = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    escapes = draw(st.booleans())
    cached: dict[str, Any] = draw(
        st.sampled_from([{}, {}, *({"prompt_tokens_details": {"cached_tokens": number}} for number in (0, 1, 2))])
    )
    more = draw(st.sampled_from([{}, {}, {"system_fingerprint": "100%d%"}]))
    events: list[dict[str, Any]] = []
    total = 0
    if draw(st.booleans()):
        events.append(draw(odd_events(0)))
    num_thoughts, thought = draw(st.integers(0, 4)), draw(st.sampled_from(["reasoning", "reasoning_content"]))
    for number, text in enumerate(draw(st.lists(TEXTS, max_size=8))):
        total += draw(st.integers(0, 2))
        said = {"text": text} if is_completion else {"delta": {"content": text}}
        if not is_completion and number < num_thoughts:
            others = [{}, {}, {"content": None}, {"reasoning": text}, {"content": "x"}]
            said = {"delta": {thought: text, **draw(st.sampled_from(others))}}
        choice: dict[str, Any] = {"index": 0, **said, "finish_reason": None}
        if draw(st.integers(0, 9)) == 0:
            logprobs = {"content": [{"token": "a", "logprob": -1.0}]}
            choice |= draw(
                st.sampled_from([{"finish_reason": "stop"}, {"logprobs": logprobs}, {"stop_reason": "content"}])
            )
        if has_role and number == 0 and not is_completion:
            choice["delta"]["role"] = "assistant"
        counts = [("total_tokens", 3 + total), ("completion_tokens", total)]
        usage = {"prompt_tokens": 3, **dict(counts[::-1] if is_completion else counts), **cached}
        if draw(st.integers(0, 9)) == 0:
            usage = draw(
                st.sampled_from([{}, {**usage, "prompt_tokens": 4}, {"completion_tokens": total}, {**usage, "x": 1}])
            )
        timed = draw(timings(total)) if is_timed else {}
        events.append({"choices": [choice], "id": "x", **more, **timed, **({"usage": usage} if says_usage else {})})
    events.append({"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if draw(st.booleans()):
        events.append(draw(odd_events(total)))
    texts = [json.dumps(event, separators=spaced, ensure_ascii=escapes) for event in events]
    return "".join(f"data: {text}\n\n" for text in [*texts, "[DONE]"]).encode()


def read(answer: Answer, blocks: Iterator[bytes]) -> tuple[list[Event], list[Event]]:
    """Each delta by itself, however they were gathered."""
    events = [event for block in blocks for event in answer.events(block)]
    return [*singly(events)], answer.so_far()


def cut(data: bytes, places: list[int]) -> Iterator[bytes]:
    ends = sorted(place % (len(data) + 1) for place in places)
    return (data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True))


COUNTED = '{"prompt_tokens":3,"completion_tokens":0}'
OTHER = '{"prompt_tokens":4,"completion_tokens":0}'


@given(streams(), st.lists(st.integers(min_value=0, max_value=10_000), max_size=4))
@example(saying("a", "{}") + saying("", COUNTED) + saying("b", "{}") + saying("", "{}", '"stop"'), [])
@example(saying("a", COUNTED) + saying("", OTHER) + saying("b", COUNTED) + saying("", "{}", '"stop"'), [])
@example(saying("", COUNTED) + saying("a", "{}") + saying("b", "{}") + saying("", "{}", '"stop"'), [])
def test_plain_or_in_full_it_means_the_same(data: bytes, places: list[int]) -> None:
    assert read(Answer(ONE), cut(data, places)) == read(Answer(), cut(data, places))


@given(st.lists(streams(), min_size=2, max_size=4), st.lists(st.integers(0, 99), min_size=4, max_size=4))
def test_what_was_learnt_of_one_answer_changes_no_other(answers: list[bytes], prompts: list[int]) -> None:
    habits = Habits()
    for data, prompt_tokens in zip(answers, prompts, strict=False):
        told = data.replace(b'"id":"x"', b'"id":"%d"' % prompt_tokens)
        told = told.replace(b'"prompt_tokens":3', b'"prompt_tokens":%d' % prompt_tokens)
        assert read(Answer(ONE, habits), iter([told])) == read(Answer(), iter([told]))


def test_of_a_second_answer_all_plain_events_are_one_batch() -> None:
    def told(prompt_tokens: int) -> bytes:
        usage = '{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}'
        texts = [saying(f" w{each}", usage % (prompt_tokens, prompt_tokens + each, each)) for each in range(1, 9)]
        return b"".join([saying("", usage % (prompt_tokens, prompt_tokens, 0)), *texts])

    habits = Habits()
    assert [type(event) for event in Answer(ONE, habits).events(told(3))] == [Started, Delta, Deltas]
    assert [type(event) for event in Answer(ONE, habits).events(told(77))] == [Started, Deltas]


CACHED = '{"prompt_tokens":20,"total_tokens":%d,"completion_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'


@pytest.mark.parametrize("opening", ["", "a"])
def test_what_was_found_in_the_cache_is_no_earlier_answers(opening: str) -> None:
    def told(cached: int) -> bytes:
        texts = [saying(f" w{each}", CACHED % (20 + each, each, cached)) for each in range(1, 4)]
        return b"".join([saying(opening, '{"prompt_tokens":20,"total_tokens":20,"completion_tokens":0}'), *texts])

    habits = Habits()
    for cached in (16, 16, 8, 0, 16):
        answer = Answer(ONE, habits)
        answer.events(told(cached))
        assert answer.so_far() == [Started(20, cached), Delta(0, "", 3)]


def test_events_with_times_are_known_by_their_shape() -> None:
    shape = timed(TIMED)
    assert shape is not None
    later = TIMED.replace(b'"a"', b'"b c"').replace(b"7152", b"7153").replace(b'_n":9', b'_n":10')
    later = later.replace(b"0.001", b"17.25").replace(b"1e-05", b"34")
    assert shape.read([TIMED, later, b"data: [DONE]", TIMED], 0) == (["a", "b c"], [9, 10])
    assert shape.read([TIMED, later, TIMED], 1) == (["b c", "a"], [10, 9])


@pytest.mark.parametrize(
    ("given", "other"),
    [
        (b'"a"', b'""'),
        (b'"a"', b'"\\n"'),
        (b'"a"', b'"a","text":"b"'),
        (b'"a"', b'"\xff"'),
        (b'"index":0', b'"index":1'),
        (b"null", b'"stop"'),
        (b"1795887152", b"17958871520"),
        (b"1795887152", b"1795887x52"),
        (b'"prompt_n":31', b'"prompt_n":32'),
        (b'"predicted_n":9', b'"predicted_n":-9'),
        (b'"predicted_n":9', b'"predicted_n":9.5'),
        (b'"predicted_n":9', b'"predicted_n":9999999999'),
        (b'"predicted_n":9,', b'"predicted_n":9'),
        (b"0.001", b"null"),
        (b"}}", b',"draft_n":3}}'),
        (b"}}", b'},"usage":{}}'),
        (b"}}", b"}"),
    ],
)
def test_what_differs_with_times_is_read_in_full(given: bytes, other: bytes) -> None:
    shape = timed(TIMED)
    assert shape is not None
    before, _, after = TIMED.rpartition(given)
    changed = before + other + after
    for number in range(3):
        assert shape.read([*[TIMED] * number, changed, TIMED], 0) == (["a"] * number, [9] * number)


def test_llama_cpps_events_after_the_first_are_read_as_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    decoded = reader.decoded
    monkeypatch.setattr(reader, "decoded", lambda data: parsed.append(data) or decoded(data))
    answer = Answer(ONE)
    for number in range(1, 9):
        event = TIMED.replace(b'_n":9', b'_n":%d' % number).replace(b"7152", b"715%d" % number)
        assert [*singly(answer.events(event + b"\n\n"))][-1] == Delta(0, "a", number)
    assert len(parsed) == 1


@pytest.mark.parametrize("says_counts", [True, False])
def test_an_escape_beside_the_text_is_no_part_of_it(says_counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model's name that is a path on Windows."""
    parsed: list[bytes] = []
    decoded = reader.decoded
    monkeypatch.setattr(reader, "decoded", lambda data: parsed.append(data) or decoded(data))
    answer = Answer(ONE)
    for number in range(1, 9):
        event = saying("a", BOTH % (3 + number, number) if says_counts else "null")
        event = event.replace(b"{", b'{"model":"C:\\\\m.gguf",', 1)
        assert [*singly(answer.events(event))][-1] == Delta(0, "a", number)
    assert len(parsed) == 1


def test_events_like_the_first_are_known_by_their_shape() -> None:
    first = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a"}}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}'  # noqa: E501
    shape = plain(first)
    assert shape is not None
    second = first.replace(b'"a"', b'"b c"').replace(b":4,", b":14,").replace(b":1}", b":11}")
    assert shape.read([first], 0) == (["a"], [1])
    assert shape.read([first, second, first, b"data: [DONE]", first], 0) == (["a", "b c", "a"], [1, 11, 1])
    assert shape.read([first, second, first], 1) == (["b c", "a"], [11, 1])


def test_many_events_of_a_block_are_one_batch_of_deltas() -> None:
    block = b"".join(saying(f" w{number}", BOTH % (3 + number, number)) for number in range(1, 100))
    started, first, rest = Answer(ONE).events(block)
    assert (started, first) == (Started(3), Delta(0, " w1", 1))
    assert rest == Deltas([f" w{number}" for number in range(2, 100)], list(range(2, 100)))


def test_events_that_are_not_plain_among_many_are_no_work_for_all() -> None:
    texts = [("\\n" if number % 2 else f" w{number}", number) for number in range(1, 4001)]
    block = b"".join(saying(text, BOTH % (3 + number, number)) for text, number in texts)
    began = time.process_time()
    events, _ = read(Answer(ONE), iter([block]))
    assert [event.text for event in events[1:] if isinstance(event, Delta)] == [
        text.replace("\\n", "\n") for text, _ in texts
    ]
    assert time.process_time() - began < 3  # 0.1 s where it is as it should be, a minute where it is not


def test_one_event_of_another_shape_among_many_is_read_in_full() -> None:
    for place in (2, 50, 99):
        block = [saying(f"{number}", BOTH % (number, number)) for number in range(100)]
        block[place] = saying(f"{place}", BOTH % (place, place) + ',"x":{"y":{}}')
        events, _ = read(Answer(ONE), iter([b"".join(block)]))
        assert [event.text for event in events[1:]] == [f"{number}" for number in range(100)]


@pytest.mark.parametrize(
    "other",
    [
        b'data: {"choices":[{"index":1,"delta":{"content":"a"}}]}',  # another choice
        b'data: {"choices":[{"index":0,"delta":{"content":""}}]}',  # no text
        b'data: {"choices":[{"index":0,"delta":{"content":"\\n"}}]}',  # an escape
        b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}',
        b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}}',
        b'data: {"choices":[{"index":0,"delta":{"content":"a',
        b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}",{"b":"b"}}]}',
        b'data: {"choices":[{"index":0,"delta":{"content":"}}]}',  # its ends overlap
        b"",
    ],
)
def test_what_differs_is_read_in_full(other: bytes) -> None:
    shape = plain(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}')
    assert shape is not None
    plain_one = b'data: {"choices":[{"index":0,"delta":{"content":"b"}}]}'
    for number in range(3):
        assert shape.read([*[plain_one] * number, other, plain_one], 0) == (["b"] * number, [])


def test_an_event_that_may_be_read_in_two_ways_is_not_plain() -> None:
    assert plain(b'data: {"choices":[{"index":0,"delta":{"content":"a","text":"b"}}]}') is None


def test_a_text_that_is_no_unicode_is_the_engines_fault() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
    answer = Answer(ONE)
    assert isinstance(answer.events(event % b"a")[-1], Delta)
    with pytest.raises(EngineFailed):
        answer.events(event % b"\xff")


ROLE = b'{"id":"a1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":%b}'
ENDED = b'{"id":"a1","choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}],"usage":%b}'
SUM = b'{"id":"a1","choices":[],"usage":%b}'
TOLD = b'{"prompt_tokens":31,"total_tokens":33,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":9}}'


def test_events_without_text_are_known_by_those_of_earlier_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, parsed = reader.decoded, []
    monkeypatch.setattr(reader, "decoded", lambda data: parsed.append(data) or decoded(data))
    habits, answers = Habits(), []
    for number in range(3):
        block = b"".join(b"data: %b\n\n" % (event % TOLD) for event in (ROLE, ENDED, SUM)) + b"data: [DONE]\n\n"
        block = block.replace(b'"a1"', b'"b%d"' % number).replace(b":31", b":4%d" % number)
        answers.append(Answer(ONE, habits).events(block))
        assert answers[-1] == [Started(40 + number, 9), Finished({0: "stop"}, Usage(40 + number, 9, 2))]
    assert len(parsed) == 3


@pytest.mark.parametrize(
    ("given", "other"),
    [
        (b'"content":""', b'"content":"7"'),
        (b'"content":""', b'"content":"\\""'),
        (b'"index":0', b'"index":1'),
        (b'"finish_reason":"stop"', b'"finish_reason":"sto7p"'),
        (b'"finish_reason":"stop"', b'"finish_reason":null'),
        (b'"id":"a1"', b'"id":"a1","error":{"code":7}'),
        (b'"id":"a1"', b'"id":"a\\"1"'),
        (b":31", b":-1"),
        (b":31", b":1.5"),
        (b":31", b':"31"'),
        (b":31", b":031"),
        (b":31", b":2147483648"),
        (b":31", b":99999999999"),
        (b"9}}", b"9}}}"),
    ],
)
def test_an_event_without_text_that_differs_in_more_is_read_in_full(given: bytes, other: bytes) -> None:
    learnt = OddEvents()
    event = ENDED % TOLD
    learnt.learn(event, json.loads(event))
    assert learnt.read(event.replace(b"a1", b"b2").replace(b":9", b":8")) == (True, "stop", (31, 8, 2, None))
    assert given in event
    assert learnt.read(event.replace(given, other)) is None


def test_what_is_learnt_of_events_without_text_is_bounded() -> None:
    learnt = OddEvents()
    for number in range(1000):
        event = b'{"choices":[],"x%d":null}' % number
        learnt.learn(event, json.loads(event))
    assert len(learnt._shapes) <= MAX_KNOWN < 1000


@pytest.mark.parametrize(
    "others",
    [
        b'"format":{"type":"x","text":"plain"}',
        b'"meta":{"content":"none"}',
        b'"timings":{"cache_n":0,"prompt_n":3,"predicted_n":1,"predicted_ms":1.5},"__verbose":{"content":"x","a":1}',
        b'"__verbose":{"content":"x"},"timings":{"cache_n":0,"prompt_n":3,"predicted_n":1,"predicted_ms":1.5}',
        b'"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1},"meta":{"text":"x"}',
    ],
)
@pytest.mark.parametrize("text", ["\\n", "\\u00e9", ""])
def test_what_always_stands_beside_the_text_is_not_taken_for_it(others: bytes, text: str) -> None:
    """Also where the first texts have none that could be found: each is in an escape."""
    choice = b'{"index":0,"delta":{"content":"%b"},"finish_reason":null}'
    events = [b'data: {"choices":[%b],%b}\n\n' % (choice % each, others) for each in [text.encode()] * 4 + [b"a"] * 4]
    answer = Answer(ONE)
    said = [each for block in events for each in singly(answer.events(block)) if isinstance(each, Delta)]
    assert "".join(each.text for each in said) == json.loads(f'"{text}"') * 4 + "a" * 4
