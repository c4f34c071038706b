"""What our counters and histograms report is what `prometheus_client`'s own would, to the byte."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from octoai.server.catalogue import Model
from octoai.server.engines.base import Generation, Usage
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.errors import Unavailable
from octoai.server.metering import Meter
from octoai.server.metrics.counting import Counter, Histogram
from octoai.server.metrics.families import Metrics
from octoai.server.params.generations import TextRequest
from octoai.server.queue import FairQueue
from octoai.server.router import Deployment
from tests.running import InProcess
from tests.talking import chat, metric, until

BOUNDS = (0.1, 1, 2.5, 10)
LABELS = st.tuples(st.sampled_from(["a", "b"]), st.text(max_size=3))
VALUES = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 20))


@pytest.fixture(autouse=True, scope="module")
def _no_times() -> None:
    disable_created_metrics()


@given(st.lists(st.tuples(LABELS, VALUES)))
def test_a_histogram(observed: list[tuple[tuple[str, str], float]]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = prometheus_client.Histogram("x:seconds", "Some time.", ("x", "y"), buckets=BOUNDS, registry=theirs)
    own = Histogram("x:seconds", "Some time.", ("x", "y"), BOUNDS)
    ours.register(own)
    for labels, value in observed:
        histogram.labels(*labels).observe(value)
        own.labels(*labels).observe(value)
        if value > 10:
            own.fold()
    assert generate_latest(ours) == generate_latest(theirs)


@given(st.lists(st.tuples(LABELS, st.integers(0, 10))))
def test_a_counter(counted: list[tuple[tuple[str, str], float]]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    counter = prometheus_client.Counter("x:tokens_total", "Tokens.", ("x", "y"), registry=theirs)
    own = Counter("x:tokens_total", "Tokens.", ("x", "y"))
    ours.register(own)
    for labels, value in counted:
        counter.labels(*labels).inc(value)
        own.labels(*labels).inc(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_label_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="x, y"):
        Counter("x", "x", ("x", "y")).labels("a")


def test_what_a_running_service_observed_does_not_take_more_and_more_memory(
    in_process: Callable[..., InProcess],
) -> None:
    service = in_process(ScriptedEngine())
    status, _, _ = chat(service)
    assert status == 200
    (deployment,) = service.service.router.deployments
    until(lambda: not service.service.metrics.of(deployment).end_to_end._values, 5.0)
    assert metric(service, "vllm:e2e_request_latency_seconds_count") == 1


class Times(Meter):
    """A request that came so far: to nothing, to its turn, to a whole answer in one, or to token after token."""

    def __init__(self, reached: int, reasons: dict[int, str]) -> None:
        super().__init__(lambda: 0.25)
        self.clock = lambda: 5.0
        self.reasons = reasons
        self.turn = 1.0 if reached > 0 else None
        self.first_token = 1.75 if reached == 3 else None
        self.last_token = 4.0 if reached > 1 else None


ENDS = st.builds(
    lambda which, reached, outcome, reasons, usage, token: (which, Times(reached, reasons), outcome, usage, token),
    st.integers(0, 1),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from(["finished", "refused", "aborted", "failed"]),
    st.dictionaries(st.integers(0, 2), st.sampled_from(["stop", "length"])),
    st.builds(Usage, st.integers(0, 50), st.integers(0, 9), st.integers(0, 3)),
    st.sampled_from(["tok_a", "tok_b"]),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(ENDS, max_size=12))
def test_requests_that_are_counted_together_are_counted_as_each_would_be(ends: list[Any]) -> None:
    deployments = [Deployment(Model(name), ScriptedEngine(), FairQueue(1, 1)) for name in ("one", "two")]
    request = TextRequest("one", (Generation(max_tokens=7, n=2),), stream=False, include_usage=False)
    said = []
    for is_together in (True, False):
        metrics = Metrics()
        metrics.watch(deployments)
        for which, meter, outcome, usage, token in ends:
            metrics.count_job(deployments[which], request, meter, usage, outcome, token, 1_000_000_000)
            if not is_together:
                metrics.registry.collect()
        said.append(asyncio.run(metrics.text()).decode())
    assert sorted(said[0].splitlines()) == sorted(said[1].splitlines())
    counted = [outcome for _, _, outcome, _, _ in ends if outcome != "refused"]
    text = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in said[0].splitlines() if line[0] != "#"}

    def total(name: str, label: str = "") -> float:
        return sum(value for sample, value in text.items() if sample.startswith(name + "{") and label in sample)

    assert total("vllm:e2e_request_latency_seconds_sum") == 4.75 * len(counted)
    seen = [meter for _, meter, outcome, _, _ in ends if outcome != "refused"]
    assert total("vllm:request_queue_time_seconds_count") == len(seen)
    assert total("vllm:request_inference_time_seconds_count") == len([each for each in seen if each.turn is not None])
    begun = len([meter for meter in seen if meter.first_token is not None])
    for name in ("request_prefill_time", "request_decode_time", "time_to_first_token"):
        assert total(f"vllm:{name}_seconds_count") == begun
    several = [usage for _, meter, outcome, usage, _ in ends if outcome != "refused" and meter.first_token is not None]
    assert total("vllm:time_per_output_token_seconds_count") == len(
        [each for each in several if each.completion_tokens > 1]
    )
    assert total("octoai_requests_aborted_total") == counted.count("aborted")
    assert total("octoai_requests_failed_total") == counted.count("failed")
    stopped = [list(meter.reasons.values()).count("stop") for _, meter, outcome, _, _ in ends if outcome == "finished"]
    assert total("vllm:request_success_total", 'finished_reason="stop"') == sum(stopped)
    assert total("octoai_cost_usd_total", "tok_a") == [token for *_, token in ends].count("tok_a")
    assert total("octoai_tokens_total", 'kind="prompt"') == sum(usage.prompt_tokens for *_, usage, _ in ends)


def test_nobody_waits_while_what_was_counted_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten thousand API tokens no stream went on for 0.2 s at each scrape."""
    threads: list[int] = []

    def written(registry: Collector) -> bytes:
        threads.append(threading.get_ident())
        return generate_latest(registry)

    monkeypatch.setattr("octoai.server.metrics.families.generate_latest", written)
    metrics = Metrics()
    metrics.refusals.labels("overloaded").inc()
    assert b'octoai_refusals_total{reason="overloaded"} 1.0' in asyncio.run(metrics.text())
    assert threads and threading.get_ident() not in threads


def test_the_counters_of_tokens_are_gone_through_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten thousand API tokens there are 40,000 numbers, and a thread that serves was to make something of each."""
    threads: set[int] = set()

    def added(self: Any, *given: Any, add: Any = CounterMetricFamily.add_metric) -> None:
        threads.add(threading.get_ident())
        add(self, *given)

    monkeypatch.setattr(CounterMetricFamily, "add_metric", added)
    metrics = Metrics()
    metrics.token_cost.labels("tok_a").inc(2)
    text = asyncio.run(metrics.text())
    assert b'octoai_cost_usd_total{token_id="tok_a"} 2.0' in text
    assert threads and threading.get_ident() not in threads


def test_what_is_counted_while_others_are_gone_through_harms_nothing() -> None:
    metrics = Metrics()
    metrics.token_cost.labels("tok_a").inc(2)
    counted = metrics.counted()
    metrics.token_cost.labels("tok_b").inc(2)
    text = generate_latest(counted)
    assert b'token_id="tok_a"} 2.0' in text and b"tok_b" not in text
    assert generate_latest(counted) == text


@pytest.mark.parametrize("error", [None, Unavailable("The others do not answer.", retry_after=1)])
def test_of_several_processes_many_who_ask_at_once_are_given_one_text(error: Exception | None) -> None:
    num_asked = 0

    async def of_all() -> bytes:
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0.05)
        if error is not None:
            raise error
        return b"all"

    async def main() -> list[Any]:
        metrics = Metrics()
        metrics.of_all = of_all
        return await asyncio.gather(*(metrics.text() for _ in range(50)), return_exceptions=True)

    assert asyncio.run(main()) == [error or b"all"] * 50
    assert num_asked == 1


def test_many_who_ask_at_once_are_given_one_text_and_no_old_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/metrics` asks for no token: a hundred at once kept everybody else waiting for twenty seconds."""
    num_written = 0

    def written(registry: Collector) -> bytes:
        nonlocal num_written
        num_written += 1
        time.sleep(0.05)
        return generate_latest(registry)

    monkeypatch.setattr("octoai.server.metrics.families.generate_latest", written)
    metrics = Metrics()

    async def main() -> list[bytes]:
        first = asyncio.ensure_future(metrics.text())
        await asyncio.sleep(0.01)
        metrics.refusals.labels("overloaded").inc()
        later = [asyncio.ensure_future(metrics.text()) for _ in range(100)]
        later[0].cancel()
        said = await asyncio.gather(first, *later[1:])
        assert b"octoai_refusals_total{" in await metrics.text()
        return said

    first, *later = asyncio.run(main())
    assert b"octoai_refusals_total{" not in first
    assert all(b'octoai_refusals_total{reason="overloaded"} 1.0' in each for each in later)
    assert num_written == 3
