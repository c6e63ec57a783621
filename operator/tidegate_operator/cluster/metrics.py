"""What the operator counts, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Watched(Protocol):
    def restarts(self) -> dict[str, int]:
        """plural -> watches that ended otherwise than by their time."""

    def unsynced(self) -> list[str]: ...

    def queue_age(self) -> float:
        """Seconds for which the oldest change has waited to be published."""

    def leading(self) -> bool: ...


class Metrics:
    """One operator's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.step_seconds = Histogram(
            "tidegate_operator_step_seconds",
            "Time of a part of one step: world, compile, publish",
            ["part"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.objects_written = Counter(
            "tidegate_operator_objects_written",
            "Objects created, updated or deleted in the API server",
            ["kind", "verb"],
            registry=self.registry,
        )
        self.bytes_written = Counter(
            "tidegate_operator_written_bytes",
            "Bytes of objects sent to the API server",
            ["kind"],
            registry=self.registry,
        )
        self.publish_errors = Counter(
            "tidegate_operator_publish_errors",
            "Publishes that did not come to their end, and will be tried again",
            registry=self.registry,
        )
        self.self_checks = Counter(
            "tidegate_operator_self_checks",
            "Comparisons of what is published with what a compile from nothing comes to",
            ["result"],
            registry=self.registry,
        )
        for result in ("equal", "different"):
            self.self_checks.labels(result)
        self.self_check_seconds = Histogram(
            "tidegate_operator_self_check_seconds",
            "Time of one such comparison, beside the publishing",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.identities = Gauge(
            "tidegate_operator_identities",
            "Numbers of the ledger, in use or resting; and those that classes save over labels",
            ["state"],
            registry=self.registry,
        )
        self.nodes = Gauge(
            "tidegate_operator_nodes",
            "Nodes that count as dead, and living ones that lack what was published",
            ["state"],
            registry=self.registry,
        )
        for state in ("silent", "behind"):
            self.nodes.labels(state)
        self.problems = Gauge(
            "tidegate_operator_problems",
            "What is wrong with objects of users, by severity",
            ["severity"],
            registry=self.registry,
        )
        self.published_seconds = Histogram(
            "tidegate_operator_change_published_seconds",
            "From the arrival of an object's change to its state published",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.realised_seconds = Histogram(
            "tidegate_operator_change_realised_seconds",
            "From the arrival of an object's change to its state realised on all nodes",
            buckets=BUCKETS,
            registry=self.registry,
        )

    def watch(self, watched: Watched) -> None:
        self.registry.register(_Watched(watched))

    def written(self, verb: str, kind: str, size: int) -> None:
        self.objects_written.labels(kind, verb).inc()
        if size:
            self.bytes_written.labels(kind).inc(size)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Watched:
    """Read when asked for."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        restarts = CounterMetricFamily(
            "tidegate_operator_watch_restarts",
            "Watches that ended otherwise than by their time",
            labels=["resource"],
        )
        for name, count in sorted(self._watched.restarts().items()):
            restarts.add_metric([name], count)
        yield restarts
        yield GaugeMetricFamily(
            "tidegate_operator_unsynced_kinds",
            "Kinds without a complete list; nothing is written while there are any",
            value=len(self._watched.unsynced()),
        )
        yield GaugeMetricFamily(
            "tidegate_operator_queue_age_seconds",
            "How long the oldest change has waited to be published",
            value=self._watched.queue_age(),
        )
        yield GaugeMetricFamily(
            "tidegate_operator_leader",
            "1 where this replica leads",
            value=int(self._watched.leading()),
        )
