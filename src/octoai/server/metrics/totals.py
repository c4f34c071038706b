"""Metrics of several processes as those of one: counters and histograms added up, gauges each in its own way.

Pure: a report is what a registry has, as values that may be sent. With thousands of API tokens all of this takes long,
and is done in a thread beside the loop. What a process that ended had counted is kept by adding its last counters to
those of the others, so that no sum ever goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# How a gauge of several processes is told as one.
GAUGES: dict[str, Callable[[Sequence[float]], float]] = {
    "vllm:num_requests_running": sum,
    "vllm:num_requests_waiting": sum,
    "vllm:num_requests_waiting_by_reason": sum,
    "vllm:kv_cache_usage_perc": fmean,  # their shares of the slots are equal, but for one slot
    "vllm:cache_config_info": max,
    "octoai_engine_ready": min,
    "octoai_engine_restarts": sum,
    "octoai_ledger_open_requests": sum,
    "octoai_ledger_database_away_seconds": max,
    "octoai_ledger_behind_bytes": sum,
    "octoai_workers": max,
}
# Labels that say how much each process has of what they share.
_SHARED_LABELS = {"vllm:cache_config_info": "num_slots"}

Sample = tuple[str, dict[str, str], float]
Report = list[dict[str, Any]]  # families: name, documentation, type, samples


def report(registry: Collector) -> Report:
    """What a registry has now."""
    return [
        _family(each.name, each.documentation, each.type, [(one.name, one.labels, one.value) for one in each.samples])
        for each in registry.collect()
    ]


def sent(registry: Collector) -> str:
    """The same as text."""
    return orjson.dumps(report(registry)).decode()


def received(said: str) -> Report:
    """The inverse of `sent`."""
    one: Report = orjson.loads(said)
    return one


def whole(reports: Iterable[Report]) -> str:
    """All of them as one, as Prometheus reads it."""
    return text(merged(reports)).decode()


def gauge(name: str, documentation: str, value: float) -> Report:
    return [_family(name, documentation, "gauge", [(name, {}, value)])]


def counter(name: str, documentation: str, value: float) -> Report:
    return [_family(name, documentation, "counter", [(f"{name}_total", {}, value)])]


def counted(one: Report) -> Report:
    """What of a report stays true when its process has ended."""
    return [family for family in one if family["type"] != "gauge"]


def merged(reports: Iterable[Report]) -> Report:
    """All of them as one, in the order in which they are met."""
    families: dict[str, dict[str, Any]] = {}
    for one in reports:
        for each in one:
            known = families.setdefault(each["name"], {**each, "samples": []})
            known["samples"] += each["samples"]
    return [{**each, "samples": _combined(each)} for each in families.values()]


def text(one: Report) -> bytes:
    """As Prometheus reads it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reported(one))
    return generate_latest(registry)


def _family(name: str, documentation: str, type_: str, samples: list[Sample]) -> dict[str, Any]:
    return {"name": name, "documentation": documentation, "type": type_, "samples": samples}


def _combined(family: dict[str, Any]) -> list[Sample]:
    samples, label = family["samples"], _SHARED_LABELS.get(family["name"])
    if label is not None:
        samples = _shared(samples, label)
    values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
    for name, labels, value in samples:
        values.setdefault((name, tuple(labels.items())), []).append(value)
    combine = GAUGES[family["name"]] if family["type"] == "gauge" else sum
    return [(name, dict(labels), combine(each)) for (name, labels), each in values.items()]


def _shared(samples: Sequence[Sample], label: str) -> list[Sample]:
    """With the sum of what that label says of each process, where all else is the same."""
    alike: dict[tuple[tuple[str, str], ...], int] = {}
    keys = [tuple((name, "" if name == label else value) for name, value in labels.items()) for _, labels, _ in samples]
    for key, (_, labels, _) in zip(keys, samples, strict=True):
        alike[key] = alike.get(key, 0) + int(labels[label])
    return [
        (name, {**labels, label: str(alike[key])}, value)
        for key, (name, labels, value) in zip(keys, samples, strict=True)
    ]


class _Reported(Collector):
    def __init__(self, one: Report) -> None:
        self._report = one

    def collect(self) -> Iterable[Metric]:
        for family in self._report:
            metric = Metric(family["name"], family["documentation"], family["type"])
            for name, labels, value in family["samples"]:
                metric.add_sample(name, labels, value)
            yield metric
