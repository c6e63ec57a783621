"""The operator against a real API server: what it publishes, when, and what it repairs."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs
from support import town_api
from support.apiserver import ApiServer
from support.operator_town import SECONDS, Town, clean, policy, populate
from support.town_api import apply, node, objects, pod
from support.waiting import until
from tidegate_api.state import Identity, NodeState, RuleSet, StateSlice, digest
from tidegate_kube import Client, Conflict, Resource, resources
from tidegate_operator import relabels
from tidegate_operator.cluster.store import TRIES
from tidegate_operator.cluster.world import build, unlike

pytestmark = pytest.mark.apiserver


def test_publishes_what_the_cluster_says(town: Town) -> None:
    populate(town)
    town.settled()
    nodes = town.nodes()
    assert sorted(nodes) == ["n1", "n2"]
    assert {e.name for item in nodes.values() for e in item.spec.endpoints} == {"a", "b"}
    for name, item in nodes.items():
        held = json.loads(town.client.get(resources.NODES, name))
        (owner,) = item.metadata.owner_references or ()
        assert (owner.kind, owner.uid) == ("Node", held["metadata"]["uid"])
        assert (item.metadata.annotations or {})["tidegate.dev/digest"] == digest(item.spec)
        assert item.spec.term == 1
        assert set(item.spec.rule_sets) <= objects(town.client, RuleSet).keys()
    identities = objects(town.client, Identity)
    ipcache = town.ipcache()
    assert identities[str(ipcache["10.244.0.5/32"])].spec.labels == {"app": "a"}
    assert ipcache["10.244.0.0/24"] == 0
    assert ipcache["172.18.0.2/32"] == ipcache["10.244.1.1/32"] == 4


def test_restart_with_nothing_changed_writes_nothing(town: Town) -> None:
    populate(town)
    town.settled()
    assert town.writes()
    town.restart()
    until(lambda: town.runner.published is not None, "published", SECONDS)
    assert town.writes() == {}


def test_a_pod_writes_its_node_and_one_shard(town: Town) -> None:
    populate(town)
    town.settled()
    before = town.writes()
    apply(town.client, pod("c", "n1", app="a"))
    town.settled()
    bound = town.writes()
    assert {
        key: bound[key] - before.get(key, 0) for key in bound if bound[key] != before.get(key)
    } == {("NodeState", "update"): 1}
    apply(town.client, pod("c", "n1", "10.244.0.6", app="a"))
    town.settled()
    assert town.writes_since(bound) == {("NodeState", "update"): 1, ("StateSlice", "update"): 1}


def test_a_status_that_comes_first_delays_no_state(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader reports between the operator's look at a node's state and its write of it."""
    populate(town)
    town.settled()
    update, late = town.client.update, ["n1", "n1", "n2"]

    def after_a_status(resource: Resource, name: str, *more: Any, **how: Any) -> bytes:
        if resource is resources.NODE_STATES and "subresource" not in how and name in late:
            late.remove(name)
            town.realise(name, drift=len(late))
        return update(resource, name, *more, **how)

    monkeypatch.setattr(town.client, "update", after_a_status)
    with capture_logs() as said:
        apply(town.client, pod("c", "n1", "10.244.0.6", app="c"))
        apply(town.client, pod("d", "n2", "10.244.1.6", app="c"))
        apply(town.client, policy("c", {"podSelector": {"matchLabels": {"app": "c"}}}))
        town.settled()
    assert late == []
    assert [line for line in said if line["log_level"] != "info"] == []
    names = {e.name for item in town.nodes().values() for e in item.spec.endpoints}
    assert names == {"a", "b", "c", "d"}


def test_labels_wait_for_a_policy_that_could_not_be_written_everywhere(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the node that has the old policy would judge the pod by it and by its new number."""
    monkeypatch.setattr(relabels, "WAIT_SECONDS", math.inf)
    populate(town)
    town.settled()
    address = "10.244.1.5/32"
    update, before = town.client.update, town.ipcache()[address]
    refused: list[int] = []
    refuses = threading.Event()
    refuses.set()

    def of_n1_only(resource: Resource, name: str, *more: Any, **how: Any) -> bytes:
        mine = resource is resources.NODE_STATES and name == "n2" and "subresource" not in how
        if mine and refuses.is_set():
            refused.append(town.ipcache()[address])
            raise Conflict("update", "by the test")
        return update(resource, name, *more, **how)

    monkeypatch.setattr(town.client, "update", of_n1_only)
    apply(town.client, policy("all-of-b", {"podSelector": {"matchLabels": {"app": "b"}}}))
    until(lambda: refused, "the policy's state of n2 is refused", SECONDS)
    split = town.ipcache()[address]
    assert split != before, "the policy tells it apart"
    apply(town.client, pod("b", "n2", "10.244.1.5", app="a"))
    until(lambda: _labels(town, "b") == {"app": "a"}, "the operator knows the label", SECONDS)
    count = len(refused)
    until(lambda: len(refused) > count + 2 * TRIES, "it has tried again with it", SECONDS)
    assert set(refused[1:]) == {split}
    refuses.clear()
    a = town.ipcache()["10.244.0.5/32"]
    until(lambda: town.ipcache()[address] == a, "the label counts", SECONDS)


def _labels(town: Town, name: str) -> dict[str, str]:
    return town.watches.snapshot().pods["default", name].labels


def _edit(client: Client, kind: type, name: str, change: Callable[[Any], None]) -> None:
    resource = town_api.OURS[kind]
    tree = json.loads(client.get(resource, name))
    change(tree)
    client.update(resource, name, msgspec.json.encode(tree))


def _content(client: Client) -> dict[str, dict[str, Any]]:
    """Everything published, without revisions and versions."""
    found: dict[str, dict[str, Any]] = {}
    for kind in (Identity, RuleSet, StateSlice, NodeState):
        for name, item in objects(client, kind).items():
            spec = msgspec.to_builtins(item.spec)
            spec.pop("revision", None)
            for ref in spec.get("tables", {}).values():
                ref.pop("minRevision")
            found.setdefault(kind.__name__, {})[name] = spec
    return found


def _break_slice(client: Client) -> None:
    name = next(name for name, item in objects(client, StateSlice).items() if item.spec.ipcache)

    def change(tree: Any) -> None:
        tree["spec"]["ipcache"][0]["identity"] = 77777

    _edit(client, StateSlice, name, change)


def _break_node(client: Client) -> None:
    def change(tree: Any) -> None:
        tree["spec"]["endpoints"] = []

    _edit(client, NodeState, "n1", change)


def _break_digest(client: Client) -> None:
    def change(tree: Any) -> None:
        tree["metadata"]["annotations"] = {"tidegate.dev/digest": "0"}
        tree["metadata"].pop("ownerReferences")

    _edit(client, NodeState, "n1", change)


def _delete_each(kind: type) -> Callable[[Client], None]:
    def run(client: Client) -> None:
        for name in objects(client, kind):
            town_api.remove(client, town_api.OURS[kind], name)

    return run


HANDS = [
    ("a shard edited", _break_slice),
    ("a node state emptied", _break_node),
    ("a digest and an owner taken away", _break_digest),
    *((f"every {kind.__name__} deleted", _delete_each(kind))
      for kind in (Identity, RuleSet, StateSlice, NodeState)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "harm"), HANDS)
def test_hand_edits_are_repaired(town: Town, reason: str, harm: Callable[[Client], None]) -> None:
    populate(town)
    town.settled()
    want = _content(town.client)
    harm(town.client)
    until(lambda: _content(town.client) == want, f"repaired: {reason}", SECONDS)
    until(
        lambda: all(
            (item.metadata.annotations or {}).get("tidegate.dev/digest") == digest(item.spec)
            and item.metadata.owner_references
            for item in town.nodes().values()
        ),
        "digests and owners",
        SECONDS,
    )


@pytest.mark.parametrize(("reason", "harm"), HANDS)
def test_hand_edits_while_the_operator_is_down(
    town: Town, reason: str, harm: Callable[[Client], None]
) -> None:
    populate(town)
    town.settled()
    want = _content(town.client)
    town.stop()
    harm(town.client)
    town.restart()
    town.settled()
    assert _content(town.client) == want


def test_node_recreated_under_its_name_owns_its_state(town: Town) -> None:
    populate(town)
    town.settled()
    town_api.remove(town.client, resources.NODES, "n1")
    held = apply(town.client, node("n1", 0))
    town.settled()

    def owned() -> bool:
        (owner,) = town.nodes()["n1"].metadata.owner_references or ()
        return bool(owner.uid == held["metadata"]["uid"])

    until(owned, "owned by the new node", SECONDS)


def test_node_gone_takes_its_state(town: Town) -> None:
    populate(town)
    town.settled()
    town_api.remove(town.client, resources.NODES, "n2")
    until(lambda: sorted(town.nodes()) == ["n1"], "state removed", SECONDS)


def test_who_does_not_lead_writes_nothing(town: Town) -> None:
    town.settled()  # else it may be amid its first writes
    before = town.writes(), _content(town.client)
    town.lead.given = None
    populate(town)
    until(lambda: not town.runner.unsynced(), "synced", SECONDS)
    until(lambda: town.runner._said[:1] == ("not the leader",), "looked", SECONDS)
    assert (town.writes(), _content(town.client)) == before
    town.lead.given = 2
    town.settled()
    assert {item.spec.term for item in town.nodes().values()} == {2}


def test_numbers_taken_by_somebody_else_are_left_to_them(town: Town) -> None:
    populate(town)
    town.settled()
    (number,) = (
        name
        for name, item in objects(town.client, Identity).items()
        if item.spec.labels == {"app": "a"}
    )
    town.stop()
    clean(town.client)
    other = {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "Identity",
        "metadata": {"name": number},
        "spec": {"namespace": "default", "labels": {"app": "other"}},
    }
    apply(town.client, other)
    town.restart()
    populate(town)
    town.settled()
    held = objects(town.client, Identity)
    assert held[number].spec.labels == {"app": "other"}
    mine = [name for name, item in held.items() if item.spec.labels == {"app": "a"}]
    assert [town.ipcache()["10.244.0.5/32"]] == [int(name) for name in mine]
    assert mine != [number]


def test_kinds_that_vanish_are_not_empty(town: Town, server: ApiServer) -> None:
    """The CRD of rule sets goes, with its objects: nothing else is touched, and all comes back."""
    populate(town)
    town.settled()
    want = _content(town.client)
    town_api.remove(town.client, resources.CRDS, "rulesets.tidegate.dev")
    until(lambda: "rulesets" in town.runner.unsynced(), "unsynced", SECONDS)
    town_api.remove(town.client, resources.PODS, "a", "default")
    left = {kind: objects(town.client, kind) for kind in (Identity, StateSlice, NodeState)}
    assert [e.name for e in left[NodeState]["n1"].spec.endpoints] == ["a"]
    apply(town.client, pod("a", "n1", "10.244.0.5", app="a"))
    town_api.install(town.client)
    until(lambda: _content(town.client).keys() == want.keys(), "all kinds again", SECONDS)
    town.settled()
    names = objects(town.client, RuleSet)
    assert all(name in names for item in town.nodes().values() for name in item.spec.rule_sets)


def test_api_server_killed_and_back(town: Town, server: ApiServer) -> None:
    populate(town)
    town.settled()
    server.kill()
    server.start()
    apply(town.client, pod("c", "n1", "10.244.0.7", app="a"))
    town.settled()
    assert "10.244.0.7/32" in town.ipcache()
    assert town.runner.faults() == []


def test_an_index_that_went_wrong_is_found_and_repaired(town: Town) -> None:
    """Of two pods that claim an address the newer one has it: with the claim, it is forgotten."""
    populate(town)
    apply(town.client, pod("old", "n1", "10.244.0.6", app="old"))
    town.settled()
    town.verify_every = 0.05
    town.restart()
    town.settled()
    before = town.runner._world
    before.claims.clear()
    late = pod("late", "n1", "10.244.0.6", app="a")
    late["status"]["startTime"] = "2020-01-01T00:00:00Z"
    apply(town.client, late)
    until(lambda: town.metrics.self_checks.labels("different")._value.get() >= 1, "found", SECONDS)
    until(lambda: town.runner._world is not before and not town.runner.error, "anew", SECONDS)

    def right() -> bool:
        fresh, _ = build(town.runner._world.snapshot)
        return list(unlike(town.runner._world, fresh)) == []

    until(right, "as made from nothing", SECONDS)


def test_what_makes_a_step_fail_is_not_kept(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    populate(town)
    town.settled()
    faulty = town.runner._compiler

    def wrong(*_: object) -> None:
        raise KeyError("what an index should have had")

    monkeypatch.setattr(faulty, "compile", wrong)
    apply(town.client, pod("c", "n1", "10.244.0.6", app="a"))
    town.settled()
    assert town.runner._compiler is not faulty
    assert len(town.nodes()["n1"].spec.endpoints) == 2


def test_a_fault_in_what_is_kept_is_found_and_repaired(town: Town) -> None:
    town.verify_every = 0.05
    town.restart()
    populate(town)
    town.settled()
    compiler = town.runner._compiler
    held = compiler._running.by_node["n1"]
    for name, item in held.items():
        wrong = msgspec.structs.replace(item[3], identity=77777)
        held[name] = (*item[:3], wrong, item[4])
    apply(town.client, pod("c", "n1", "10.244.0.6", app="a"))

    def repaired() -> bool:
        checks = town.metrics.self_checks.labels("different")._value.get()
        found = {one.identity for one in town.nodes()["n1"].spec.endpoints}
        return checks == 1 and len(found) == 1 and 77777 not in found

    until(repaired, "repaired", SECONDS)
    assert town.runner._compiler is not compiler
