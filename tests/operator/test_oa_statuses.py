"""What the operator tells people, on a real API server: in force, on its way, or not as
written; and only when it changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import town_api
from support.kstatus import kstatus
from support.operator_town import SECONDS, Town, policy, populate
from support.told import NAME, READY, REALISING, STALLED, conditions, events, held, identities, say
from support.town_api import apply, node, objects
from support.waiting import until
from tidegate_api.state import NodeState, RuleSet
from tidegate_kube import resources
from tidegate_operator.compile import compiler, rules

pytestmark = pytest.mark.apiserver

TAINT = {"key": "tidegate.dev/agent-not-ready", "effect": "NoSchedule"}
OTHER = {"key": "example.com/other", "effect": "NoSchedule"}


def test_policy_is_ready_when_every_node_has_it(town: Town) -> None:
    populate(town)
    town.settled()
    found = say(town, REALISING, (0, 2))
    there = json.loads(town.client.get(resources.NETWORK_POLICIES, "p", "default"))["metadata"]
    assert found["policy"] == {"kind": "NetworkPolicy", "name": "p", "uid": there["uid"],
                               "generation": there["generation"]}  # fmt: skip
    assert found["metadata"]["ownerReferences"][0]["uid"] == there["uid"]
    town.realise("n1")
    say(town, REALISING, (1, 2))
    town.realise("n2")
    say(town, READY, (2, 2))


def test_edited_policy_is_not_ready_until_it_is_in_force_again(town: Town) -> None:
    populate(town)
    town.settled()
    for name in ("n1", "n2"):
        town.realise(name)
    first = say(town, READY, (2, 2))
    apply(town.client, policy("p", {"podSelector": {}}))
    town.settled()
    second = say(town, REALISING, (0, 2))
    assert second["policy"]["generation"] == first["policy"]["generation"] + 1
    assert second["metadata"]["generation"] == first["metadata"]["generation"] + 1
    for name in ("n1", "n2"):
        town.realise(name)
    say(town, READY, (2, 2))


def test_policy_not_as_written_stalls_with_an_event_once(town: Town) -> None:
    populate(town)
    block = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    odd = {"podSelector": {}, "egress": [{"to": [block], "ports": [{"port": "web"}]}]}
    apply(town.client, policy("p", odd))
    town.settled()
    say(town, STALLED, (0, 2))
    until(lambda: events(town), "an event", SECONDS)
    assert events(town) == [("p", "Warning", "NotAsWritten")]
    town.restart()
    town.settled()
    town.realise("n1")
    say(town, STALLED, (1, 2))
    assert events(town) == [("p", "Warning", "NotAsWritten")]
    apply(town.client, policy("p", {"podSelector": {}}))
    until(lambda: len(events(town)) == 2, "an event that it goes on", SECONDS)
    assert events(town)[0] == ("p", "Normal", "AsWritten")


def test_a_loader_too_old_for_what_is_published_is_named(town: Town) -> None:
    populate(town)
    town.settled()
    town.realise("n1")
    # It says what it had before, and that it reads nothing of today's.
    town.realise("n2", "before", formats=(7,))

    def message() -> str:
        found = held(town).get("status", {}).get("conditions", [])
        return next((c["message"] for c in found if c["type"] == "Reconciling"), "")

    why = "the loader of node n2 reads format 7, not format 1, in which this is published"
    until(lambda: why in message(), "the policy's status says so", SECONDS)
    until(lambda: events(town) == [("n2", "Warning", "FormatNotRead")], "an event", SECONDS)
    town.realise("n2", formats=(1, 7))
    say(town, READY, (2, 2))
    assert len(events(town)) == 1


def test_what_a_loader_refuses_is_in_the_policys_status(town: Town) -> None:
    populate(town)
    town.settled()
    town.realise("n1")
    limit = "rule set x: more than 200000 map entries"
    said = {
        "type": "Stalled",
        "status": "True",
        "reason": "Refused",
        "message": limit,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    town.realise("n2", "before", conditions=[said])

    def message() -> str:
        listed = held(town).get("status", {}).get("conditions", [])
        return next((c["message"] for c in listed if c["type"] == "Ready"), "")

    told = f"in force on 1 of 2 nodes, not yet on n2; the loader of node n2 says: {limit}"
    until(lambda: message() == told, "the policy's status says so", SECONDS)
    say(town, REALISING, (1, 2))
    town.realise("n2")
    say(town, READY, (2, 2))


def test_a_policy_past_a_limit_denies_and_names_it(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rules, compiler):
        monkeypatch.setattr(module, "MAX_RULE_SET_BYTES", 20_000)
    populate(town)
    blocks = [{"ipBlock": {"cidr": f"198.18.{n // 256}.{n % 256}/32"}} for n in range(500)]
    apply(town.client, policy("p", {"podSelector": {}, "ingress": [{"from": blocks}]}))
    town.settled()
    found = say(town, STALLED, (0, 2))
    message = next(c["message"] for c in found["status"]["conditions"] if c["type"] == "Stalled")
    assert "20000" in message
    for name in ("n1", "n2"):  # what is published instead
        town.realise(name)
    say(town, STALLED, (2, 2))
    # Those of what was there before rest for a while.
    named = {name for item in town.nodes().values() for name in item.spec.rule_sets}
    sets = [item for name, item in objects(town.client, RuleSet).items() if name in named]
    assert {term.action for item in sets for term in item.spec.terms} == {"Deny"}
    until(lambda: ("p", "Warning", "NotAsWritten") in events(town), "an event", SECONDS)
    apply(town.client, policy("p", {"podSelector": {}, "ingress": [{"from": blocks[:5]}]}))
    town.settled()
    for name in ("n1", "n2"):
        town.realise(name)
    say(town, READY, (2, 2))


def test_status_goes_with_its_policy_and_comes_back_if_deleted(town: Town) -> None:
    populate(town)
    town.settled()
    say(town, REALISING, (0, 2))
    town_api.remove(town.client, resources.POLICY_STATUSES, NAME, "default")
    say(town, REALISING, (0, 2))
    town_api.remove(town.client, resources.NETWORK_POLICIES, "p", "default")
    until(lambda: not held(town), "gone", SECONDS)


def test_restart_writes_no_status(town: Town) -> None:
    populate(town)
    town.settled()
    for name in ("n1", "n2"):
        town.realise(name)
    before = say(town, READY, (2, 2))

    def counted() -> bool:
        # A first look may have come before the pods were counted: its status is not yet the last.
        found = [item.get("status", {}).get("endpoints") for item in identities(town).values()]
        return found == [1, 1]

    until(counted, "each identity counts its pod", SECONDS)
    versions = {
        name: item["metadata"]["resourceVersion"] for name, item in identities(town).items()
    }
    town.restart()
    town.settled()
    until(lambda: town.statuses._looked > 0, "looked at identities", SECONDS)
    # What it would write, it writes before it removes the status of a policy that goes.
    apply(town.client, policy("q", {"podSelector": {}}))
    until(lambda: held(town, "networkpolicy.q"), "another policy's", SECONDS)
    assert held(town)["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert versions == _versions(town)


def _versions(town: Town) -> dict[str, str]:
    return {name: item["metadata"]["resourceVersion"] for name, item in identities(town).items()}


def _user_identity(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "Identity",
        "metadata": {"name": name},
        "spec": spec,
    }


def test_identities_say_what_they_are(town: Town) -> None:
    populate(town)
    apply(town.client, _user_identity("soon", {"namespace": "default", "labels": {"app": "soon"}}))
    apply(town.client, _user_identity("inside", {"cidrs": ["10.244.0.0/25"]}))
    town.settled()

    def said() -> dict[str, tuple[str, int, dict[str, str]]]:
        return {
            item["status"].get("summary", "") + ("" if name.isdigit() else f" {name}"): (
                str(item["status"].get("id", "")),
                item["status"].get("endpoints", 0),
                conditions(item),
            )
            for name, item in identities(town).items()
            if "status" in item
        }

    def number(app: str) -> str:
        wanted = {"app": app}
        found = {n: i["spec"].get("labels") for n, i in identities(town).items() if n.isdigit()}
        return next((name for name, labels in found.items() if labels == wanted), "none yet")

    def right() -> bool:
        # A first look may have come between two steps; the next one puts it right.
        found = said()
        return (
            len(found) == 5
            and found.items()
            >= {
                "app=a": (number("a"), 1, READY),
                "app=soon soon": (number("soon"), 0, READY),
                "10.244.0.0/25 inside": ("", 0, STALLED),
            }.items()
        )

    until(right, "statuses of all, and each its own", SECONDS)
    found = identities(town)
    inside = found.pop("inside")
    assert kstatus(inside, *found.values()) == ["Failed", *["Current"] * len(found)]


def test_taint_goes_when_the_node_has_a_state_in_force(town: Town) -> None:
    populate(town)
    for name, number, taints in (("n1", 0, [OTHER, TAINT]), ("n2", 1, [TAINT])):
        tree = node(name, number)
        tree["spec"]["taints"] = taints
        apply(town.client, tree)
    town.settled()
    town.realise("n1")

    def taints(name: str) -> list[str]:
        spec = json.loads(town.client.get(resources.NODES, name))["spec"]
        return [item["key"] for item in spec.get("taints", [])]

    until(lambda: taints("n1") == [OTHER["key"]], "the taint gone", SECONDS)
    assert taints("n2") == [TAINT["key"]]
    assert town.nodes()["n1"].metadata.name == "n1"
    assert isinstance(town.nodes()["n2"], NodeState)
