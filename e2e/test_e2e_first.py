"""A pod's first packet meets its policy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rig import asking, flood, pods

pytestmark = pytest.mark.kind
STARTS = 8


@pytest.fixture(scope="module")
def sink(tidegate: None) -> Iterator[pods.Pod]:
    yield flood.build()
    pods.remove_namespaces(flood.SPACE, wait=False)


def test_nothing_is_heard_of_pods_that_may_send_nothing(
    askers: asking.Askers, sink: pods.Pod
) -> None:
    silent = flood.starts(sink, STARTS, "not")
    # Those who may are heard: the flood works, and the sink counts.
    loud = flood.starts(sink, 2, "flood")
    heard = flood.received(sink, askers.of(sink))
    assert {a: heard.get(a, 0) for a in silent} == dict.fromkeys(silent, 0)
    assert all(heard.get(address, 0) > 0 for address in loud), (loud, heard)
