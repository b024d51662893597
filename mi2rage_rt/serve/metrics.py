"""What Prometheus reads: requests by model, protocol and status, and the batchers' own counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mi2rage_rt.batch_stats import BatchStats
from mi2rage_rt.batch_stats import Histogram as BatchHistogram

if TYPE_CHECKING:
    from mi2rage_rt.serve.service import Service

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

_COUNTERS: tuple[tuple[str, str, Callable[[BatchStats], float]], ...] = (
    ("rejected", "Requests refused because too many waited.", lambda stats: stats.rejected),
    ("late", "Requests dropped because their time was over before they were computed.", lambda stats: stats.late),
    ("withdrawn", "Requests withdrawn while they waited.", lambda stats: stats.cancelled),
    ("answered", "Requests computed.", lambda stats: stats.answered),
    ("failed", "Requests that failed while they were computed.", lambda stats: stats.failed),
)
_GAUGES: tuple[tuple[str, str, Callable[[BatchStats], float]], ...] = (
    ("queue_depth", "Requests that wait.", lambda stats: stats.queued),
    ("running", "Requests of the batch that is being computed.", lambda stats: stats.running),
)
_HISTOGRAMS: tuple[tuple[str, str, float, Callable[[BatchStats], BatchHistogram]], ...] = (
    ("queue_seconds", "From a request's arrival to the start of its batch.", 1e-3, lambda stats: stats.wait_ms),
    ("compute_seconds", "Of each batch.", 1e-3, lambda stats: stats.compute_ms),
    ("batch_size", "Requests of a batch.", 1.0, lambda stats: stats.batch_sizes),
)


class Metrics:
    """One service's metrics, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mi2rage_requests",
            "Requests, by the HTTP status of their answer; 499: the client went away.",
            ("model", "protocol", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mi2rage_request_seconds",
            "From a request's last byte to its answer.",
            ("model", "protocol"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_BatcherMetrics(service))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def count(self, model: str, protocol: str, status: int, seconds: float) -> None:
        """One request came to its end."""
        self._requests.labels(model, protocol, str(status)).inc()
        self._seconds.labels(model, protocol).observe(seconds)

    def page(self) -> bytes:
        """In Prometheus's text form."""
        return generate_latest(self._registry)


class _BatcherMetrics(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        service = self._service
        live = GaugeMetricFamily("mi2rage_live", "1 while every model works.", value=float(service.live))
        ready = GaugeMetricFamily("mi2rage_ready", "1 while requests are taken.", labels=("model",))
        for model in service.models:
            ready.add_metric((model,), float(service.ready(model)))
        yield live
        yield ready
        stats = {model: batcher.stats() for model, batcher in service.batchers.items()}
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(f"mi2rage_{name}", text, labels=("model",))
            for model, counted in stats.items():
                counter.add_metric((model,), read(counted))
            yield counter
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"mi2rage_{name}", text, labels=("model",))
            for model, counted in stats.items():
                gauge.add_metric((model,), read(counted))
            yield gauge
        for name, text, unit, read_histogram in _HISTOGRAMS:
            histogram = HistogramMetricFamily(f"mi2rage_{name}", text, labels=("model",))
            for model, counted in stats.items():
                found = read_histogram(counted)
                histogram.add_metric((model,), _buckets(found, unit), found.total * unit)
            yield histogram


def _buckets(histogram: BatchHistogram, unit: float) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, as Prometheus has them."""
    seen, buckets = 0, []
    for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
        seen += count
        buckets.append(("+Inf" if bound is None else str(bound * unit), float(seen)))
    return buckets
