"""Rows of figures → families of Prometheus' client. Nothing of their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


def counter(
    name: str, text: str, labels: tuple[str, ...], rows: Mapping[Any, float]
) -> CounterMetricFamily:
    made = CounterMetricFamily(name, text, labels=labels)
    for key, value in sorted(rows.items()):
        made.add_metric(key, value)
    return made


def gauge(name: str, text: str, rows: Mapping[Any, float], *labels: str) -> GaugeMetricFamily:
    made = GaugeMetricFamily(name, text, labels=labels)
    for key, value in rows.items():
        made.add_metric(key, value)
    return made
