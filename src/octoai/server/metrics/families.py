"""Prometheus metrics: vLLM's names, so that every dashboard for vLLM works here, and our own under `octoai_`.

Labels come from the configuration only: a name that a client sends never becomes one, nor does a word of an engine.
"""

from __future__ import annotations

import asyncio
import collections
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, sub
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octoai.server.billing.money import NANOS
from octoai.server.directory import Directory
from octoai.server.engines.base import Usage
from octoai.server.ledger.ledger import Ledger
from octoai.server.metering import Meter
from octoai.server.metrics.counting import Counter, Histogram
from octoai.server.params.generations import TextRequest
from octoai.server.router import Deployment

_REASONS = frozenset(("stop", "length", "tool_calls", "function_call", "content_filter", "abort", "error"))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_HTTP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_COUNTS = (1, 2, 5, 10, 20)

_LABELS = ("model_name", "engine")
# The metrics that have a value for each API token, in the text.
_BY_TOKEN = re.compile(rb"# HELP (?:octoai_tokens|octoai_cost_usd)_total [^#]*# TYPE [^#]*")
MAX_UNCOUNTED = 100

_TOKENS_OF = attrgetter("prompt_tokens", "cached_tokens", "completion_tokens")
_TIMES_OF = attrgetter("received", "turn", "first_token", "last_token")

Labelled = TypeVar("Labelled", Counter, Histogram)
Texts = tuple[bytes, bytes]  # with what each API token used, and without


class _Ended(NamedTuple):
    """A request that has ended, and what it asked for: its choices, and their tokens."""

    deployment: Deployment
    asked: tuple[int, int]
    meter: Meter
    now: float
    usage: Usage
    outcome: str
    token_id: str
    cost_nanos: int


class Metrics:
    """One registry of its own per service, so that two in a process (a test) do not share numbers. `of_all` is set
    where this process is one of several: the text of all of them."""

    of_all: Callable[[], Awaitable[bytes]] | None = None
    _writing: asyncio.Future[Texts] | None = None
    _coming: asyncio.Future[Texts] | None = None

    def __init__(self) -> None:
        self.registry = _Registry(self._count_ended)
        self._ended: list[_Ended] = []  # still to be counted
        self._per_deployment: list[Counter | Histogram] = []
        self._known: dict[Any, Any] = {}  # finding a labelled metric costs as much as counting

        def counter(name: str, text: str, labels: tuple[str, ...] = _LABELS) -> Counter:
            return self._added(Counter(name, text, labels), labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = _LABELS) -> Histogram:
            return self._added(Histogram(name, text, labels, buckets), labels)

        self.prompt_tokens = counter("vllm:prompt_tokens_total", "Prompt tokens processed.")
        self.generation_tokens = counter("vllm:generation_tokens_total", "Tokens generated.")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = counter("vllm:num_preemptions_total", "Requests preempted; engines here never do.")
        self.success = counter(
            "vllm:request_success_total", "Requests finished, by reason.", (*_LABELS, "finished_reason")
        )
        self.iteration_tokens = histogram(
            "vllm:iteration_tokens_total", "Tokens that arrived in one read from the engine.", _TOKENS
        )
        self.request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generation = histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS
        )
        self.params_n = histogram("vllm:request_params_n", "Choices asked for.", _COUNTS)
        self.params_max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens asked for.", _TOKENS)
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", _FIRST_TOKEN
        )
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "Between tokens of one request.", _PER_TOKEN)
        self.per_token = histogram(
            "vllm:time_per_output_token_seconds", "Mean time per token after the first.", _PER_TOKEN
        )
        self.end_to_end = histogram("vllm:e2e_request_latency_seconds", "From the request to its end.", _WHOLE)
        self.queued = histogram("vllm:request_queue_time_seconds", "Waiting for a turn at the engine.", _WHOLE)
        self.inference = histogram("vllm:request_inference_time_seconds", "From the turn to the end.", _WHOLE)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "From the turn to the first token.", _WHOLE)
        self.decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _WHOLE)
        self.request_preemptions = histogram("vllm:request_num_preemptions", "Preemptions of a request.", _COUNTS)
        self.refusals = counter("octoai_refusals", "Requests refused, by reason.", ("reason",))
        self.token_tokens = counter("octoai_tokens", "Tokens used, by API token.", ("token_id", "kind"))
        self.token_cost = counter(
            "octoai_cost_usd", "US dollars, by API token; the ledger has it exactly.", ("token_id",)
        )
        self.aborted = counter("octoai_requests_aborted", "Requests whose client left before the end.")
        self.failed = counter("octoai_requests_failed", "Requests that the engine broke off.")
        self.http_requests = counter("http_requests", "HTTP requests answered.", ("handler", "method", "status"))
        self.http_seconds = histogram(
            "http_request_duration_seconds", "Time to the end of the answer.", _HTTP, ("handler",)
        )

    def _added(self, made: Labelled, labels: tuple[str, ...]) -> Labelled:
        self.registry.register(made)
        if labels == _LABELS:
            self._per_deployment.append(made)
        return made

    def watch(self, deployments: Iterable[Deployment]) -> None:
        """Report queues and readiness of these deployments, read at every scrape; and their counters, from zero on."""
        deployments = tuple(deployments)
        for deployment in deployments:
            self.of(deployment)
        self.registry.register(_DeploymentCollector(deployments))

    def watch_books(self, ledger: Ledger, directory: Directory) -> None:
        """Report how the ledger stands with its database, and how often accounts are looked at again."""
        self.registry.register(_BooksCollector(ledger, directory))

    def of(self, deployment: Deployment) -> SimpleNamespace:
        """The metrics of one deployment, by their names here."""
        known: SimpleNamespace | None = self._known.get(deployment)
        if known is None:
            labels = deployment.model.id, _engine_name(deployment)
            named = {name: made for name, made in vars(self).items() if made in self._per_deployment}
            known = SimpleNamespace(**{name: made.labels(*labels) for name, made in named.items()})
            known.success = partial(self.success.labels, *labels)
            self._known[deployment] = known
        return known

    async def fold(self) -> None:
        """To be called now and then."""
        self._count_ended()
        for each in vars(self).values():
            if isinstance(each, Histogram):
                each.fold()

    def count_http(self, handler: str, method: str, status: int | None, seconds: float) -> None:
        """One answered request; `status` None: nothing was sent."""
        counters = self._known.get((handler, method, status))
        if counters is None:
            requests = self.http_requests.labels(handler, method, str(status or "none"))
            counters = self._known[handler, method, status] = (requests, self.http_seconds.labels(handler))
        counters[0].value += 1
        counters[1].observe(seconds)

    def count_job(
        self,
        deployment: Deployment,
        request: TextRequest,
        meter: Meter,
        usage: Usage,
        outcome: str,
        token_id: str,
        cost_nanos: int,
    ) -> None:
        """One ended request: "finished", "refused" (by the engine), "aborted" (its client left) or "failed".

        It is counted with some others: thirty metrics are in no processor's cache when one request ends.
        """
        asked = request.num_choices, request.max_tokens
        self._ended.append(_Ended(deployment, asked, meter, meter.clock(), usage, outcome, token_id, cost_nanos))
        if len(self._ended) >= MAX_UNCOUNTED:
            self._count_ended()

    def _count_ended(self) -> None:
        """One metric after another, each for all of them."""
        ended, self._ended = self._ended, []
        by_token: dict[str, list[_Ended]] = {}
        by_deployment: dict[Deployment, list[_Ended]] = {}
        for one in ended:
            by_token.setdefault(one.token_id, []).append(one)
            if one.outcome != "refused":
                by_deployment.setdefault(one.deployment, []).append(one)
        for token_id, some in by_token.items():
            self._count_cost(token_id, some)
        for deployment, some in by_deployment.items():
            _count_jobs(self.of(deployment), some)

    def _count_cost(self, token_id: str, ended: Sequence[_Ended]) -> None:
        """What one API token used; by its id, never its text."""
        counters = self._known.get(token_id)
        if counters is None:
            kinds = (self.token_tokens.labels(token_id, kind) for kind in ("prompt", "cached", "completion"))
            counters = self._known[token_id] = (*kinds, self.token_cost.labels(token_id))
        *_, usages, _, _, costs = zip(*ended, strict=True)
        for counter, used in zip(counters, zip(*map(_TOKENS_OF, usages), strict=True), strict=False):
            counter.value += sum(used)
        counters[3].value += sum(costs) / NANOS

    async def text(self, *, by_token: bool = True) -> bytes:
        """Of the whole service: where this process is one of several, of all of them. Raises Unavailable."""
        if self._coming is None:
            self._coming = asyncio.ensure_future(self._texts_after(self._writing))
        whole, others = await asyncio.shield(self._coming)
        return whole if by_token else others

    async def _texts_after(self, before: asyncio.Future[Texts] | None) -> Texts:
        """Whoever comes once it is being written is for the next: one serves all who wait, and none has old numbers.
        With thousands of API tokens it takes a tenth of a second, in which streams go on."""
        if before is not None:
            await asyncio.wait([before])
        self._writing, self._coming = self._coming, None
        if self.of_all is not None:
            whole = await self.of_all()
        else:
            whole = await asyncio.to_thread(generate_latest, self.counted())
        return whole, _BY_TOKEN.sub(b"", whole)

    def counted(self) -> Collector:
        """What has been counted until now, which may be read in another thread."""
        return _Counted([*self.registry.collect()])


class _Registry(CollectorRegistry):
    """`before` is called before it is read."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self._before = before

    def collect(self) -> Iterable[Metric]:
        self._before()
        return super().collect()


class _Counted(Collector):
    """What a registry had when it was collected; counters may have a little more."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _count_jobs(of: SimpleNamespace, ended: Sequence[_Ended]) -> None:
    """Of one deployment, none of them refused."""
    _, asked, meters, nows, usages, outcomes, _, _ = zip(*ended, strict=True)
    prompts, cached, completions = zip(*map(_TOKENS_OF, usages), strict=True)
    choices, max_tokens = zip(*asked, strict=True)
    of.prompt_tokens.value += sum(prompts)
    of.generation_tokens.value += sum(completions)
    of.prefix_queries.value += sum(prompts)
    of.prefix_hits.value += sum(cached)
    of.request_prompt.observe_all(prompts)
    of.request_generation.observe_all(completions)
    of.params_n.observe_all(choices)
    of.params_max_tokens.observe_all(max_tokens)
    of.request_preemptions.observe_all([0] * len(ended))
    of.end_to_end.observe_all(map(sub, nows, [meter.received for meter in meters]))
    times = [(*_TIMES_OF(meter), now, tokens) for meter, now, tokens in zip(meters, nows, completions, strict=True)]
    _count_times(of, times)
    finished = [meter.reasons for meter, outcome in zip(meters, outcomes, strict=True) if outcome == "finished"]
    for reason, num in collections.Counter(chain.from_iterable(map(dict.values, finished))).items():
        of.success(reason if reason in _REASONS else "other").value += num
    if len(finished) < len(ended):
        of.success("abort").value += len(ended) - len(finished)
        of.aborted.value += outcomes.count("aborted")
        of.failed.value += outcomes.count("failed")


def _count_times(of: SimpleNamespace, times: Sequence[tuple[Any, ...]]) -> None:
    """When each was received, had its turn, its first token and its last, and ended; and its tokens."""
    begun = [each for each in times if each[2] is not None]
    others = [each for each in times if each[2] is None]
    for received, turn, _, _, now, _ in others:
        of.queued.observe((now if turn is None else turn) - received)
        if turn is not None:
            of.inference.observe(now - turn)
    if begun:
        received, turns, firsts, lasts, nows, tokens = zip(*begun, strict=True)
        of.queued.observe_all(map(sub, turns, received))
        of.inference.observe_all(map(sub, nows, turns))
        of.first_token.observe_all(map(sub, firsts, received))
        of.prefill.observe_all(map(sub, firsts, turns))
        decodes = [*map(sub, lasts, firsts)]
        of.decode.observe_all(decodes)
        of.per_token.observe_all([seconds / (num - 1) for seconds, num in zip(decodes, tokens, strict=True) if num > 1])


class _DeploymentCollector(Collector):
    """Gauges that are read, not kept: they cannot drift from what they describe."""

    def __init__(self, deployments: tuple[Deployment, ...]) -> None:
        self._deployments = deployments

    def collect(self) -> Iterable[Metric]:
        def gauge(name: str, text: str, labels: tuple[str, ...] = _LABELS) -> Any:
            return GaugeMetricFamily(name, text, labels=labels)

        running = gauge("vllm:num_requests_running", "Requests at the engine.")
        waiting = gauge("vllm:num_requests_waiting", "Requests waiting for a turn.")
        by_reason = gauge("vllm:num_requests_waiting_by_reason", "The same, by reason.", (*_LABELS, "reason"))
        kv_cache = gauge("vllm:kv_cache_usage_perc", "Share of the engine's slots in use, 0 to 1.")
        config = gauge(
            "vllm:cache_config_info", "The engine's slots and window.", (*_LABELS, "num_slots", "context_length")
        )
        ready = gauge("octoai_engine_ready", "1 while the engine answers.")
        restarts = gauge("octoai_engine_restarts", "Times the engine was started again.")
        for deployment in self._deployments:
            labels = (deployment.model.id, _engine_name(deployment))
            queue, engine = deployment.queue, deployment.engine
            running.add_metric(labels, queue.num_running)
            waiting.add_metric(labels, queue.num_waiting)
            by_reason.add_metric((*labels, "capacity"), queue.num_waiting)
            kv_cache.add_metric(labels, min(1.0, queue.num_running / queue.num_slots))
            config.add_metric((*labels, str(queue.num_slots), str(deployment.context_length or "")), 1)
            ready.add_metric(labels, float(engine.is_ready))
            restarts.add_metric(labels, getattr(engine, "num_restarts", 0))
        return (running, waiting, by_reason, kv_cache, config, ready, restarts)


class _BooksCollector(Collector):
    def __init__(self, ledger: Ledger, directory: Directory) -> None:
        self._ledger = ledger
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        looks = CounterMetricFamily("octoai_directory_looks", "Looks for changes of accounts, tokens and prices.")
        looks.add_metric((), self._directory.num_looks)
        running = GaugeMetricFamily("octoai_ledger_open_requests", "Requests that are not settled yet.")
        running.add_metric((), len(self._ledger.tabs))
        away = GaugeMetricFamily("octoai_ledger_database_away_seconds", "How long the database has taken nothing.")
        away.add_metric((), self._ledger.writer.away_seconds or 0.0)
        behind = GaugeMetricFamily("octoai_ledger_behind_bytes", "What the journal has and the database has not.")
        behind.add_metric((), self._ledger.behind_bytes)
        return (looks, running, away, behind)


def _engine_name(deployment: Deployment) -> str:
    return type(deployment.engine).__name__.removesuffix("Engine").lower()
