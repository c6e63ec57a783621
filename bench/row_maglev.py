"""svc-maglev: what share of a Maglev ring leads elsewhere when one of its backends goes.

No time in it: a property of rings, measured over many sets of backends.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from operator import ne

from measure import Result
from tidegate_loader.maglev import RING_SIZE, BackendAddress, ring

COUNTS = (2, 3, 5, 10, 30, 100)
SETS = 6
GONE = 3
"""Backends that go, one at a time, from each set."""


def backends(rng: random.Random, count: int) -> list[BackendAddress]:
    found = {bytes(10) + b"\xff\xff\x0a" + rng.randbytes(3) for _ in range(count)}
    return [(address, 8080) for address in sorted(found)]


def disruption() -> Iterator[Result]:
    rng = random.Random(1)
    over: dict[int, list[float]] = {}
    times: dict[int, list[float]] = {}
    for count in COUNTS:
        for _ in range(SETS):
            names = backends(rng, count)
            began = time.perf_counter()
            before = ring(names)
            times.setdefault(count, []).append((time.perf_counter() - began) * 1e3)
            for gone in rng.sample(names, min(GONE, len(names))):
                now = ring([name for name in names if name != gone])
                share = sum(map(ne, before, now)) / RING_SIZE
                over.setdefault(count, []).append(share - 1 / len(names))
    yield Result(
        id="svc-maglev",
        what=f"Maglev: connections moved when one of {', '.join(map(str, COUNTS))} backends goes, "
        "worst",
        value=max(value for values in over.values() for value in values),
        unit="share",
        against="1/N",
        bar=0.01,
        extra={
            "mean": {count: round(statistics.mean(values), 4) for count, values in over.items()},
            "ring_ms": {count: round(statistics.median(t), 1) for count, t in times.items()},
            "positions": RING_SIZE,
        },
    )


ROWS: dict[str, Callable[[], Iterator[Result]]] = {"svc-maglev": disruption}
