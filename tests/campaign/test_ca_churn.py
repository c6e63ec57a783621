"""Services that come, go and change their endpoints all the time, through the operator's code and
a loader's process: at the end the kernel is as a cold compile says, and nothing has grown.

With TIDEGATE_SOAK=1 10,000 Services for ten minutes.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from support import ca_maps, ca_rig, sites, waiting
from support.ca_soak import campaign, scaled
from support.sites import ready, service
from tidegate_bpf import Map
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_loader.local import read_realised
from tidegate_loader.source import Source

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

SERVICES = scaled(1_000, 10_000)
SECONDS = scaled(5, 600)
ENDPOINTS = 6
"""That a Service may have: a node has 65,536 ids for all of them, and they rest for ten minutes."""
AT_ONCE = 10
"""Services that one publish changes."""
SETTLE_SECONDS = 120.0
GROWS = 1.15
"""At most this much of what it was after a tenth of the time."""
NODE = "node-1"


def drawn(number: int, rng: random.Random) -> list[sites.Tree]:
    """A Service with some of its endpoints."""
    return made(number, rng.sample(range(ENDPOINTS), rng.randint(0, ENDPOINTS)), rng)


def made(number: int, which: Iterable[int], rng: random.Random) -> list[sites.Tree]:
    pods = [
        f"10.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"
        for n in (number * ENDPOINTS + i for i in which)
    ]
    address = f"10.96.{1 + (number >> 8)}.{number & 255}"
    port = rng.choice([80, 80, 80, 443])
    return service(f"s{number}", address, [ready(pod) for pod in pods], port=port)


def resident(pid: int) -> int:
    """KiB."""
    found = re.search(r"^Rss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def map_memory(pin_dir: Path) -> int:
    """Bytes of all pinned maps, as the kernel counts them; inner maps have pins of their own."""
    total = 0
    for path in pin_dir.rglob("*"):
        if path.is_file() and path.parent.name in ("maps", "rule_sets", "cidrs", "half_open"):
            with Map.open_pinned(str(path)) as opened:
                total += opened.memory()
    return total


def differs_from_cold(tidegate: sites.Tidegate) -> bool:
    pins = tidegate.pin_dir(NODE)
    found = ca_maps.read(pins)
    interfaces, _ = Source(tidegate.paths(NODE), NODE).interfaces()
    cold = pins.parent / "cold"
    with ca_rig.from_scratch(cold) as bookkeeper:
        bookkeeper.apply(tidegate.cold().state(NODE), interfaces)
        expected = ca_maps.read(cold)
    return bool(found.problems) or found.content() != expected.content()


def test_churn_leaves_what_a_cold_compile_makes_and_nothing_more() -> None:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    rng = random.Random(6)
    with (
        campaign("service-churn", "changed Services") as figures,
        sites.made(f"tgw{os.getpid()}") as site,
        sites.tidegate(site) as tidegate,
    ):
        # Who has an id is known while that rests: each endpoint has one before memory is measured.
        for first in (lambda n: made(n, range(ENDPOINTS), rng), lambda n: drawn(n, rng)):
            tidegate.publish([tree for n in range(SERVICES) for tree in first(n)])
            tidegate.realise(NODE)
        loader = tidegate.start(NODE)
        try:
            sizes = []
            for seconds in (SECONDS / 10, SECONDS * 9 / 10):
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    churn(tidegate, rng)
                    figures.count += AT_ONCE
                settled(tidegate)
                sizes.append((resident(loader.pid), map_memory(tidegate.pin_dir(NODE))))
            assert loader.poll() is None
        finally:
            loader.kill()
            loader.wait()
        realised = read_realised(tidegate.paths(NODE).realised)
    assert realised is not None
    assert (realised.counters.drift, realised.counters.left_out) == (0, 0)
    for what, old, new in zip(("resident KiB", "map bytes"), *sizes, strict=True):
        print(f"{what}: {old} -> {new}")
        assert new <= old * GROWS, what


def churn(tidegate: sites.Tidegate, rng: random.Random) -> None:
    """Two Services go, the others change or come."""
    numbers = rng.sample(range(SERVICES), AT_ONCE)
    gone = [f"s{number}" for number in numbers[:2]]
    tidegate.change([tree for n in numbers[2:] for tree in drawn(n, rng)], gone)
    time.sleep(0.01)


def settled(tidegate: sites.Tidegate) -> None:
    """The kernel is as a cold compile says."""
    waiting.until(
        lambda: not differs_from_cold(tidegate), "equal to a cold compile", SETTLE_SECONDS
    )
