"""Nodes that are not heard of, and living ones that are behind, on a real API server: who counts,
who is named, and whom nobody waits for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.operator_town import SECONDS, Town, policy, populate
from support.told import READY, REALISING, SILENT, events, held, identities, say
from support.town_api import apply, remove
from support.waiting import until
from tidegate_kube import resources
from tidegate_operator import relevance
from tidegate_operator.cluster import progress, statuses
from tidegate_operator.cluster.reports import SILENT_SECONDS

pytestmark = pytest.mark.apiserver


def digest(town: Town, name: str) -> str:
    return str((town.nodes()[name].metadata.annotations or {})["tidegate.dev/digest"])


def message(found: dict[str, Any], kind: str) -> str:
    listed = found.get("status", {}).get("conditions", [])
    return next((c["message"] for c in listed if c["type"] == kind), "")


def test_a_silent_node_is_named_and_not_counted_until_it_has_the_newest(town: Town) -> None:
    populate(town)
    town.settled()
    for name in ("n1", "n2"):
        town.report(name)
    say(town, READY, (2, 2))
    before = digest(town, "n2")
    town.clock.ahead += SILENT_SECONDS
    town.report("n1")
    found = say(town, READY | SILENT, (1, 1))
    assert "have not reported for 10 minutes: n2;" in message(found, "NodesSilent")
    apply(town.client, policy("p", {"podSelector": {}}))
    town.settled()
    say(town, REALISING | SILENT, (0, 1))
    town.report("n1")
    say(town, READY | SILENT, (1, 1))
    # It comes back with what it had: that counts for nothing, and it counts again.
    town.report("n2", before)
    found = say(town, REALISING, (1, 2))
    assert "not yet on n2" in message(found, "Ready")
    town.report("n2")
    say(town, READY, (2, 2))


def test_where_nobody_is_heard_of_nothing_is_ready(town: Town) -> None:
    populate(town)
    town.settled()
    for name in ("n1", "n2"):
        town.report(name)
    say(town, READY, (2, 2))
    town.clock.ahead += SILENT_SECONDS
    town.statuses.poke()
    say(town, REALISING | SILENT, (0, 0))
    # So says another operator that starts then.
    town.restart()
    town.settled()
    say(town, REALISING | SILENT, (0, 0))
    for name in ("n1", "n2"):
        town.report(name)
    say(town, READY, (2, 2))


def live(town: Town) -> dict[str, dict[str, Any]]:
    found = identities(town)
    return {
        n: i
        for n, i in found.items()
        if "tidegate.dev/released" not in i["metadata"].get("labels", {})
    }


def test_a_node_that_is_behind_delays_a_merge_visibly_and_only_while_it_lives(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevance, "HOLD_SECONDS", 0.2)
    monkeypatch.setattr(statuses, "HELD_SECONDS", 0.2)
    monkeypatch.setattr(statuses, "IDENTITY_SECONDS", 0.2)
    populate(town)
    town.settled()
    for name in ("n1", "n2"):
        town.report(name)
    say(town, READY, (2, 2))
    assert len(live(town)) == 2
    before = digest(town, "n2")
    remove(town.client, resources.NETWORK_POLICIES, "p", "default")
    town.settled()
    town.report("n1")
    town.report("n2", before)

    def held_apart() -> list[str]:
        return [text for item in live(town).values() if (text := message(item, "HeldApart"))]

    until(held_apart, "a condition that names it", SECONDS)
    assert all("when n2 has in force" in text for text in held_apart())
    until(lambda: ("n2", "Warning", "DelaysMerge") in events(town), "an event", SECONDS)
    assert len(live(town)) == 2
    assert gauge(town, "behind") == 1
    # It goes on reporting that it is behind: as long as it does, it is waited for.
    for _ in range(3):
        town.clock.ahead += SILENT_SECONDS / 2
        town.report("n1")
        town.report("n2", before)
    town.settled()
    assert len(live(town)) == 2
    # And no longer.
    town.clock.ahead += SILENT_SECONDS
    town.report("n1")
    until(lambda: len(live(town)) == 1 and not held_apart(), "one number", SECONDS)
    until(lambda: gauge(town, "silent") == 1, "the metric", SECONDS)
    # What it says when it is back, of a state from before, holds nothing up.
    town.report("n2", before)
    town.settled()
    assert len(live(town)) == 1


def gauge(town: Town, state: str) -> float | None:
    labels = {"state": state}
    return town.metrics.registry.get_sample_value("tidegate_operator_nodes", labels)


def test_a_split_waits_for_nobody(town: Town) -> None:
    populate(town)
    remove(town.client, resources.NETWORK_POLICIES, "p", "default")
    town.settled()
    for name in ("n1", "n2"):
        town.report(name)
    town.clock.ahead += SILENT_SECONDS
    town.report("n1")
    apply(town.client, policy("q", {"podSelector": {"matchLabels": {"app": "a"}}}))
    town.settled()
    assert len({town.ipcache()[cidr] for cidr in ("10.244.0.5/32", "10.244.1.5/32")}) == 2


def test_a_node_that_stays_behind_with_peers_does_not_have_the_policy_in_force(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is as it was, its generation too: what it means is another, and only the nodes
    know from when on."""
    monkeypatch.setattr(progress, "PEERS_SECONDS", 0.5)
    monkeypatch.setattr(statuses, "IDLE_SECONDS", 0.5)
    populate(town)
    elsewhere = {"namespaceSelector": {"matchLabels": {"team": "red"}}}
    apply(town.client, policy("p", {"podSelector": {}, "ingress": [{"from": [elsewhere]}]}))
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}
    town.settled()

    def wanted(name: str) -> str:
        what = town.runner.published
        assert what is not None
        made = statuses.PeerDigests()
        return made.of(what.desired.nodes[name].peer_sets, what.desired.peers)

    for name in ("n1", "n2"):
        town.realise(name, peerSets=wanted(name))
    say(town, READY, (2, 2))
    states = {name: digest(town, name) for name in ("n1", "n2")}
    before = wanted("n2")
    space["metadata"]["labels"] = {"team": "red"}  # type: ignore[index]
    apply(town.client, space)
    town.settled()
    assert wanted("n2") != before
    assert states == {name: digest(town, name) for name in ("n1", "n2")}
    town.realise("n1", peerSets=wanted("n1"))
    found = say(town, REALISING, (1, 2))
    assert "not yet on n2" in message(found, "Ready")
    town.realise("n2", peerSets=wanted("n2"))
    say(town, READY, (2, 2))
    assert (
        json.loads(town.client.get(resources.NETWORK_POLICIES, "p", "default"))["metadata"][
            "generation"
        ]
        == held(town)["policy"]["generation"]
    )
