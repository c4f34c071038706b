"""Metrics of several processes, told as those of one."""

from __future__ import annotations

import json
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from octoai.server import app
from octoai.server.catalogue import EMBEDDED_MODEL_ID, Catalogue
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.metrics import totals
from octoai.server.metrics.families import Metrics
from octoai.server.queue import FairQueue
from octoai.server.router import Deployment, Router
from octoai.server.settings import Settings


def counting(requests: int, seconds: float) -> totals.Report:
    registry = CollectorRegistry()
    counter = Counter("requests", "Requests.", ("status",), registry=registry)
    counter.labels("200").inc(requests)
    Histogram("seconds", "Seconds.", buckets=(0.1, 1), registry=registry).observe(seconds)
    sent: totals.Report = json.loads(json.dumps(totals.report(registry)))
    return sent


def values(report: totals.Report) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(totals.text(report).decode())
    return {(each.name, tuple(each.labels.values())): each.value for family in families for each in family.samples}


def test_counters_and_histograms_are_added_up() -> None:
    both = values(totals.merged([counting(3, 0.05), counting(4, 0.5)]))
    assert both["requests_total", ("200",)] == 7
    assert both["seconds_bucket", ("0.1",)] == 1
    assert both["seconds_bucket", ("1.0",)] == 2
    assert both["seconds_count", ()] == 2
    assert both["seconds_sum", ()] == 0.55


def test_one_alone_is_told_as_it_would_tell_itself() -> None:
    metrics = Metrics()
    metrics.refusals.labels('a "reason"').inc()
    own = {metric.name for metric in metrics.registry.collect()}
    assert {family["name"] for family in totals.report(metrics.registry)} == own
    assert values(totals.merged([totals.report(metrics.registry)])) == values(totals.report(metrics.registry))


def test_a_process_that_ended_takes_its_gauges_and_leaves_its_counters() -> None:
    ended = counting(3, 0.05) + totals.gauge("octoai_ledger_open_requests", "Open.", 2)
    left = values(totals.merged([totals.counted(ended), counting(1, 0.05)]))
    assert left["requests_total", ("200",)] == 4
    assert ("octoai_ledger_open_requests", ()) not in left


def test_slots_are_told_as_those_of_all() -> None:
    def config(num_slots: int) -> totals.Report:
        found = GaugeMetricFamily("vllm:cache_config_info", "Slots.", labels=("model_name", "num_slots"))
        found.add_metric(("far", str(num_slots)), 1)
        registry = CollectorRegistry()
        registry.register(type("One", (), {"collect": lambda _: [found]})())
        return totals.report(registry)

    assert values(totals.merged([config(2), config(3)])) == {("vllm:cache_config_info", ("far", "5")): 1}


def test_what_is_sent_is_received() -> None:
    metrics = Metrics()
    metrics.refusals.labels('a "reason" ✓').inc()
    report = totals.received(totals.sent(metrics.counted()))
    assert values(report) == values(totals.report(metrics.registry))
    assert totals.whole([report, report]) == totals.text(totals.merged([report, report])).decode()


def test_it_is_decided_for_every_gauge_how_several_are_told_as_one(tmp_path: Path) -> None:
    catalogue, engine = Catalogue.load(), ScriptedEngine()
    deployment = Deployment(catalogue[EMBEDDED_MODEL_ID], engine, FairQueue(1, 1))
    metrics = Metrics()
    metrics.watch([deployment])
    settings = Settings.model_validate({"data_dir": tmp_path, "cache_dir": tmp_path, "ledger": "off"})
    service = app.over(settings, Router([deployment], catalogue), metrics)
    gauges = {family["name"] for family in totals.report(metrics.registry) if family["type"] == "gauge"}
    assert gauges | {"octoai_workers"} == set(totals.GAUGES)
    assert service.metrics is metrics
