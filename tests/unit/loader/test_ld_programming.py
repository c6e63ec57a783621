"""Network programming latency: what is measured, and what is not."""

from __future__ import annotations

import datetime

from msgspec import UNSET
from tidegate_api import API_VERSION
from tidegate_api.state import TRIGGER_ANNOTATION, Meta, StateSlice, StateSliceSpec
from tidegate_loader.programming import BUCKETS, Latency
from tidegate_observer.metrics import PROGRAMMING

START = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC).timestamp()


def shard(number: int, revision: int, after: float | None = None, text: str = "") -> StateSlice:
    """Triggered so many seconds after the start."""
    if after is not None:
        moment = datetime.datetime.fromtimestamp(START + after, datetime.UTC)
        text = moment.isoformat().replace("+00:00", "Z")
    return StateSlice(
        api_version=API_VERSION,
        kind="StateSlice",
        metadata=Meta(
            name=f"services-{number}", annotations={TRIGGER_ANNOTATION: text} if text else UNSET
        ),
        spec=StateSliceSpec(
            format=1, table="services", epoch=1, shard=0, shards=1, revision=revision, services=[]
        ),
    )


def test_each_write_is_measured_once() -> None:
    made = Latency(START)
    made.realised([shard(0, 1), shard(1, 1, -5.0)], START + 10)
    assert made.figures is None, "what was there before, and what says no time"
    changed = [shard(0, 2, 20.0), shard(1, 1, -5.0)]
    for _ in range(3):
        made.realised(changed, START + 20.3)
    made.realised([shard(0, 3, 30.0), shard(1, 2, 31.0), shard(2, 1, 0.0)], START + 1000)
    made.realised([shard(0, 4, text="soon"), shard(1, 3, text="2026-01-02T03:04:05")], START + 1000)
    made.realised([shard(2, 2, 2000.0)], START + 1999)
    figures = made.figures
    assert figures is not None
    measured = {i: n for i, n in enumerate(figures.counts) if n}
    assert measured == {BUCKETS.index(0.5): 1, len(BUCKETS): 3, 0: 1}, "a clock that is behind: 0"
    assert round(figures.seconds, 3) == 0.3 + 970 + 969 + 1000


def test_the_bounds_are_those_of_who_shows_them() -> None:
    assert BUCKETS == PROGRAMMING
