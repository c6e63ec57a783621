"""Whatever is killed, deleted or edited: what was in force stays so, and then all is as wanted.

Every test runs while allowed flows are under way, which must not break, and while strangers keep
asking, who must get no answer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.ca_soak import campaign, scaled

from kind import cluster
from kind.run import Failed
from rig import api, asking, install, pods, town

pytestmark = pytest.mark.kind
ROUNDS = scaled(ci=2, soak=17)
"""In each all loaders are killed: three on this cluster."""
STALLS = 20
"""Of etcd, about a second each."""


def restarted(find: Callable[[], dict[str, pods.Pod]], before: dict[str, pods.Pod]) -> None:
    """Waits until every one of these pods has another container that runs."""
    pods.eventually(
        lambda: (
            (now := find()).keys() >= before.keys()
            and all(now[k].container != pod.container for k, pod in before.items())
        ),
        "started again",
        120,
    )


def test_loaders_killed(traffic: None, place: town.Town) -> None:
    with campaign("kind-loaders-killed", "loaders killed under traffic on kind") as figures:
        for _ in range(ROUNDS):
            before = install.loaders()
            assert set(before) == set(cluster.nodes())
            for pod in before.values():
                pods.kill(pod)
            restarted(install.loaders, before)
            figures.count += len(before)
    install.wait_ready()


def test_operator_killed(traffic: None, askers: asking.Askers, place: town.Town) -> None:
    before = install.operators()
    for pod in before.values():
        pods.kill(pod)
    restarted(install.operators, before)
    install.wait_ready()


def test_api_server_killed(traffic: None, askers: asking.Askers, place: town.Town) -> None:
    before = pods.running("kube-system", "component=kube-apiserver")
    for pod in before.values():
        pods.kill(pod)
    # New connections need neither it nor anybody who talks to it.
    place.served(askers)
    pods.eventually(cluster.is_up, "the API server is back", 120)
    # Each of both may be in force for a moment, so neither lets a stranger in.
    pods.apply(town.policy("nobody"), town.policy())
    install.wait_ready()


def test_etcd_slow(traffic: None, askers: asking.Askers, place: town.Town) -> None:
    """It stands still most of the time, so that every write is late; nothing in force is touched
    by that, and what is written meanwhile comes into force afterwards."""
    node = cluster.control_plane()
    stall = "pkill -STOP -x etcd; sleep 0.9; pkill -CONT -x etcd; sleep 0.3"
    stalls = f"for i in $(seq {STALLS}); do {stall}; done"
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cluster.inside, node, "sh", "-c", stalls)
        written = 0
        while not slow.done():
            with contextlib.suppress(Failed):  # a request may end before etcd goes on
                pods.apply(town.policy("nobody", *(["somebody"] if written % 2 else [])))
                written += 1
            place.served(askers)
            place.refused(askers)
        slow.result()
    assert written
    pods.eventually(cluster.is_up, "the API server is back", 120)
    pods.apply(town.policy())
    install.wait_ready()


@pytest.mark.parametrize("kinds", ["nodestates", "nodestates,rulesets,stateslices,identities"])
def test_whole_kinds_deleted_by_hand_change_nothing_in_force(
    traffic: None, askers: asking.Askers, place: town.Town, kinds: str
) -> None:
    crds = [f"{kind}.tidegate.dev" for kind in kinds.split(",")]
    cluster.kubectl("delete", "crds", *crds, "--timeout=60s")
    assert "tidegate.dev" in cluster.kubectl("get", "crds")
    place.served(askers)
    place.refused(askers)
    install.apply()
    # The operator reads them again, and what it lost is there again.
    pods.eventually(lambda: install.node_states().keys() == set(cluster.nodes()), "states", 60)
    install.wait_realised(60)


@pytest.mark.parametrize("kind", ["nodestates", "rulesets", "stateslices"])
def test_objects_deleted_by_hand_come_back_and_nothing_falls_open(traffic: None, kind: str) -> None:
    # A rule set that no node uses any more is on its way out, and does not come back.
    used = str(api.items("nodestates"))
    before = {name for name in _specs(kind) if kind != "rulesets" or name in used}
    assert before
    cluster.kubectl("delete", kind, "--all", "--wait=false")
    pods.eventually(lambda: _specs(kind).keys() >= before, f"{kind} are back", 60)


def test_a_slice_edited_by_hand_is_repaired(traffic: None) -> None:
    slices = _specs("stateslices").items()
    name, spec = next((n, s) for n, s in slices if n.startswith("ipcache") and "10.244" in str(s))
    empty = {key: [] for key, value in spec.items() if isinstance(value, list)}
    cluster.kubectl("patch", "stateslices", name, "--type=merge", "-p", json.dumps({"spec": empty}))
    pods.eventually(lambda: _without_revision(name) == _plain(spec), "the slice is repaired", 60)


def _specs(kind: str) -> dict[str, dict[str, object]]:
    return {item["metadata"]["name"]: item["spec"] for item in api.items(kind)}


def _plain(spec: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in spec.items() if key not in ("revision", "term")}


def _without_revision(name: str) -> dict[str, object]:
    return _plain(_specs("stateslices").get(name, {}))
