"""What every row shares: the result's shape, the CPU, the clock, the interleaving.

No row's own meaning may live here.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNS = 5
"""Runs of an absolute row; its value is their median."""


class Unmeasurable(Exception):
    """The row cannot be measured here and now; the text says what is missing."""


@dataclass(frozen=True)
class Result:
    """One line of results.json. `ok`: value <= bar, or >= with `at_least`. `extra` joins the line:
    the raw figures."""

    id: str
    what: str
    value: float
    unit: str
    against: str
    bar: float
    extra: Mapping[str, Any] = field(default_factory=dict)
    at_least: bool = False

    @property
    def ok(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def line(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "what": self.what,
            "value": round(self.value, 4),
            "unit": self.unit,
            "against": self.against,
            "bar": self.bar,
            **({"at least": True} if self.at_least else {}),
            "ok": self.ok,
            **self.extra,
        }


@contextmanager
def pinned(cpu: int | None = None) -> Iterator[int]:
    """This thread, and what it starts, on one CPU (the last one: interrupts prefer the first)."""
    before = os.sched_getaffinity(0)
    chosen = max(before) if cpu is None else cpu
    os.sched_setaffinity(0, {chosen})
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on standard error how long the block took: of what prepares a row for minutes."""
    began = time.monotonic()
    yield
    print(f"       {time.monotonic() - began:6.1f} s  {what}", file=sys.stderr, flush=True)


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each variant's figures, one a round, in turn: what disturbs the machine disturbs all."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            figures[name].append(run())
    return figures


def paired(figures: Mapping[str, list[float]], one: str, other: str) -> float:
    """The median, over the rounds, of `one` divided by `other` of the same round."""
    pairs = zip(figures[one], figures[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def calibration() -> float:
    """Milliseconds that a fixed loop takes: how fast this machine was at the time."""
    began = time.perf_counter_ns()
    total = 0
    for i in range(200_000):
        total += i * i & 0xFF
    return (time.perf_counter_ns() - began) / 1e6


def absolute(
    id: str, what: str, unit: str, bar: float, run: Callable[[], float], runs: int = RUNS
) -> Result:
    """Median of `runs` runs, a calibration loop beside each."""
    values, loops = [], []
    for _ in range(runs):
        loops.append(calibration())
        values.append(run())
    extra = {
        "runs": [round(v, 3) for v in values],
        "calibration": {"unit": "ms", "runs": [round(v, 2) for v in loops]},
    }
    against = f"median of {runs}; calibration loop {statistics.median(loops):.1f} ms"
    return Result(id, what, statistics.median(values), unit, against, bar, extra)


def percentile(values: list[float], share: float) -> float:
    """Nearest rank; `share` of 0..1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def resident(pid: int) -> float:
    """Resident memory of a process, MiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no Rss in smaps_rollup")
