"""What our counters and histograms report is what `prometheus_client`'s own would, to the byte."""

from collections.abc import Callable

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest

from octoai.server.counting import Counter, Histogram
from octoai.server.engines.scripted import ScriptedEngine
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
