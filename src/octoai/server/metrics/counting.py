"""Counters and histograms for one thread, which `prometheus_client` reports.

Its own are safe for many threads, and take a tenth of a request's time; everything here is counted, and collected, in
the thread of the event loop. What was collected may be read in another.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate
from operator import add
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

Child = TypeVar("Child")


class Count:
    """What has been counted so far."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount


class Spread:
    """How many values fell between each two of `bounds`; those above the last come last.

    `observe` only keeps a value: a request has a dozen, each for a list that no processor's cache has. They are put in
    their places when somebody asks, and by `fold`, so that they do not become many.
    """

    __slots__ = ("_bounds", "_counts", "_sum", "_values", "observe", "observe_all")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._values: list[float] = []
        self.observe = self._values.append
        self.observe_all = self._values.extend

    @property
    def counts(self) -> Sequence[int]:
        self.fold()
        return self._counts

    @property
    def sum(self) -> float:
        self.fold()
        return self._sum

    def fold(self) -> None:
        values = self._values
        if not values:
            return
        self._sum = reduce(add, values, self._sum)
        values.sort()
        num_below = 0
        for place, bound in enumerate(self._bounds):
            num_up_to = bisect_right(values, bound, num_below)
            self._counts[place] += num_up_to - num_below
            num_below = num_up_to
        self._counts[-1] += len(values) - num_below
        values.clear()


class _Labelled(Collector, Generic[Child]):
    def __init__(self, name: str, text: str, labels: Sequence[str], make: Callable[[], Child]) -> None:
        self._name, self._text, self._labels, self._make = name, text, labels, make
        self._children: dict[tuple[str, ...], Child] = {}

    def labels(self, *values: str) -> Child:
        """The one with these values of the labels, from zero where it is new."""
        if len(values) != len(self._labels):
            raise ValueError(f"{self._name} has the labels {', '.join(self._labels)}")
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._make()
        return child


class _Later:
    """Samples that are made when they are read: there are some for each API token, which takes long."""

    def __init__(self, make: Callable[[], Iterator[Sample]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Sample]:
        return self._make()


class Counter(_Labelled[Count]):
    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        super().__init__(name, text, labels, Count)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        family.samples = _Later(partial(self._samples, tuple(self._children.items())))  # type: ignore[assignment]
        return (family,)

    def _samples(self, children: Iterable[tuple[tuple[str, ...], Count]]) -> Iterator[Sample]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, count in children:
            family.add_metric(values, count.value)
        return iter(family.samples)


class Histogram(_Labelled[Spread]):
    """A value counts in the first bucket whose bound is not below it."""

    def __init__(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> None:
        super().__init__(name, text, labels, lambda: Spread(buckets))
        self._bounds = [floatToGoString(bound) for bound in (*buckets, float("inf"))]  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, spread in self._children.items():
            buckets = list(zip(self._bounds, map(float, accumulate(spread.counts)), strict=True))
            family.add_metric(values, buckets, spread.sum)
        return (family,)

    def fold(self) -> None:
        """So that what was observed does not take more and more memory."""
        for spread in self._children.values():
            spread.fold()
