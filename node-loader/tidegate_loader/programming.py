"""Network programming latency, as the Kubernetes SLI has it: from the time that an EndpointSlice
says it was triggered at, to the change being in force on this node. Pure; the time is given.

A clock that is not the control plane's is wrong by what they differ.
"""

from __future__ import annotations

import datetime
import operator
from bisect import bisect_left
from collections.abc import Sequence
from itertools import compress

from msgspec import UNSET
from tidegate_api.state import TRIGGER_ANNOTATION, StateSlice

from tidegate_loader.local import Programming

BUCKETS = (
    0.25,
    0.5,
    *(float(n) for n in range(1, 60)),
    *(float(n) for n in range(60, 120, 5)),
    *(float(n) for n in range(120, 301, 30)),
)
"""Upper bounds in seconds, those of kube-proxy's histogram of the same name."""


class Latency:
    """Of one loader, since it started."""

    def __init__(self, started: float) -> None:
        """`started`: seconds of the wall clock. What changed before is not measured."""
        self._started = started
        self._last: Sequence[StateSlice | None] = ()
        self._seen: dict[str, int] = {}
        self._counts = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def realised(self, slices: Sequence[StateSlice], now: float) -> None:
        """These are in force. Each write of one is measured once."""
        last, self._last = self._last, slices
        if len(last) != len(slices):
            last = (None,) * len(slices)
        for item in compress(slices, map(operator.is_not, slices, last)):
            name, revision = item.metadata.name, item.spec.revision
            if self._seen.get(name) == revision:
                continue
            self._seen[name] = revision
            annotations = item.metadata.annotations
            text = "" if annotations is UNSET else annotations.get(TRIGGER_ANNOTATION, "")
            since = _seconds(text)
            if since is not None and since >= self._started:
                seconds = max(0.0, now - since)
                self._counts[bisect_left(BUCKETS, seconds)] += 1
                self._seconds += seconds

    @property
    def figures(self) -> Programming | None:
        """None: nothing was measured yet."""
        return Programming(list(self._counts), self._seconds) if any(self._counts) else None


def _seconds(text: str) -> float | None:
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.timestamp() if found.tzinfo is not None else None
