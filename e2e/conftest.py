"""The cluster that every e2e test uses, with Tidegate in it.

`KEEP=1` leaves it up afterwards, and takes one that is up. Without it both cluster and Docker
daemon are gone at the end, whatever happened, and the machine is as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from kind import cluster
from rig import asking, install, pods, sysdump, town, traffic

KEEP = os.environ.get("KEEP") == "1"
DUMPS = Path(__file__).parents[1] / ".cache" / "e2e"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


@pytest.fixture(scope="session")
def bare_cluster() -> Iterator[None]:
    """The cluster, with nothing of Tidegate brought by this run."""
    # Whoever ends the tests means to have them cleaned up, too.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if not KEEP and cluster.daemon.answers():
            cluster.delete()
        cluster.up()
        yield
    finally:
        if not KEEP:
            cluster.down()


@pytest.fixture(scope="session")
def tidegate(bare_cluster: None) -> None:
    """Tidegate is installed and ready, and CoreDNS with it."""
    install.install()


@pytest.fixture(scope="session")
def askers(tidegate: None) -> Iterator[asking.Askers]:
    made = asking.Askers()
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(askers: asking.Askers) -> town.Town:
    """The town as new; its Service follows a moment after its pods."""
    made = town.build()
    pods.eventually(lambda: made.is_served(askers), "friends are served", 60)
    return made


@pytest.fixture(name="traffic")
def traffic_under_way(askers: asking.Askers, place: town.Town) -> Iterator[None]:
    with traffic.under_way(askers, place):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure leaves a dump of the cluster in .cache/e2e/<test>."""
    report = yield
    # The last test's fixtures take the cluster down, and Docker with it.
    if report.failed and cluster.daemon.answers() and cluster.is_up():
        directory = DUMPS / item.name
        sysdump.collect(directory)
        report.sections.append(("sysdump", str(directory)))
    return report
