"""Policies that are not as they should be fail closed, and mean the same in a folder as in a
cluster; in a folder only until, and unless, there was a valid version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from tidegate_operator import world as folder_world
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster import world as cluster_world
from tidegate_operator.cluster.dump import FIELDS
from tidegate_operator.manifests import CLOSED, STAYS, Folder
from tidegate_operator.objects import DENY_ALL, NOTHING, Policy, PolicyName
from unit.operator.given import put

VERSIONS = {
    "NetworkPolicy": "networking.k8s.io/v1",
    "TrafficPolicy": "tidegate.dev/v1alpha1",
    "ClusterNetworkPolicy": "policy.networking.k8s.io/v1alpha2",
}
EVERYBODY = {"peers": [{"any": True}], "ports": [{"any": True}]}
TRAFFIC: dict[str, Any] = {
    "subject": {"podSelector": {"any": True}},
    "isolates": ["Ingress"],
    "mode": "Enforce",
}
ADMIN: dict[str, Any] = {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}}


def written(kind: str, spec: Any) -> dict[str, Any]:
    meta = {"name": "p"} if kind == "ClusterNetworkPolicy" else {"name": "p", "namespace": "n"}
    return {"apiVersion": VERSIONS[kind], "kind": kind, "metadata": meta, "spec": spec}


def name_of(kind: str) -> PolicyName:
    return PolicyName(kind, "" if kind == "ClusterNetworkPolicy" else "n", "p")


CLOSES = [
    ("an unknown field of a rule", "NetworkPolicy",
     {"podSelector": {}, "ingress": [{"from": [], "via": "x"}, {"ports": [{"port": 80}]}]}),
    ("no network", "NetworkPolicy",
     {"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]}),
    ("an unknown field of the spec", "NetworkPolicy",
     {"podSelector": {"matchLabels": {"a": "b"}}, "ingress": [{}], "mode": "x"}),
    ("an unknown peer that is allowed", "TrafficPolicy",
     {**TRAFFIC, "ingress": [{**EVERYBODY, "action": "Allow", "peers": [{"dns": "x"}]}]}),
    ("an unknown peer that is denied", "TrafficPolicy",
     {**TRAFFIC, "egress": [{**EVERYBODY, "action": "Deny", "peers": [{"dns": "x"}]}]}),
    ("an unknown action", "TrafficPolicy",
     {**TRAFFIC, "egress": [{**EVERYBODY, "action": "Throttle"}]}),
    ("an unknown field beside rules", "TrafficPolicy",
     {**TRAFFIC, "http": [], "ingress": [{**EVERYBODY, "action": "Allow"}]}),
    ("host bits", "TrafficPolicy",
     {**TRAFFIC, "ingress": [{**EVERYBODY, "action": "Allow",
                              "peers": [{"cidrs": [{"cidr": "10.0.0.1/8", "except": []}]}]}]}),
    ("an unknown peer of the Admin tier", "ClusterNetworkPolicy",
     {**ADMIN, "ingress": [{"action": "Accept", "from": [{"external": {}}]}]}),
    ("an unknown peer that is passed on", "ClusterNetworkPolicy",
     {**ADMIN, "egress": [{"action": "Pass", "to": [{"external": {}}]}]}),
    ("an unknown field of its spec", "ClusterNetworkPolicy",
     {**ADMIN, "ingress": [{"action": "Accept", "from": [{"namespaces": {}}]}], "schedule": "x"}),
]  # fmt: skip


def in_folder(folder: Path) -> Policy:
    made, _ = folder_world.build(Folder(folder).read().documents)
    (found,) = made.policies.values()
    return found


def in_cluster(tree: dict[str, Any]) -> Policy:
    field, decode = FIELDS[tree["kind"]]
    meta = tree["metadata"]
    facts = decode(msgspec.json.encode({**tree, "metadata": {**meta, "uid": "u"}}))
    key = meta.get("namespace", ""), meta["name"]
    made, _ = cluster_world.build(cluster_world.Snapshot(**{field: {key: facts}}))
    (found,) = made.policies.values()
    return found


@pytest.mark.parametrize(("reason", "kind", "spec"), CLOSES, ids=[row[0] for row in CLOSES])
def test_what_is_not_understood_fails_closed_and_equal(
    reason: str, kind: str, spec: Any, tmp_path: Path
) -> None:
    tree = written(kind, spec)
    put(tmp_path / "p.yaml", yaml.safe_dump(tree))
    read = Folder(tmp_path).read()
    assert [problem.severity for problem in read.problems] == ["error"] * len(read.problems)
    assert read.problems
    assert all(problem.message.endswith(CLOSED) for problem in read.problems)
    found = in_folder(tmp_path)
    assert found == in_cluster(tree)
    (rules,) = (spec[word] for word in ("ingress", "egress") if word in spec)
    allows = rules[0].get("action", "Allow") in ("Allow", "Accept")
    first, *others = (*found.ingress, *found.egress)
    assert first == (NOTHING if allows else DENY_ALL)
    assert len(others) == len(rules) - 1, "what is understood stays in its place"
    assert found.isolates or kind == "ClusterNetworkPolicy"


@pytest.mark.parametrize(
    ("reason", "kind", "spec"),
    [
        ("the selector may be the misspelt field", "NetworkPolicy", {"podSelectr": {}}),
        ("nobody is selected", "TrafficPolicy", {**TRAFFIC, "subject": {}}),
        ("in force or not", "TrafficPolicy", {**TRAFFIC, "mode": "Perhaps"}),
        ("before or after what", "ClusterNetworkPolicy", {**ADMIN, "tier": "Middle"}),
    ],
)
def test_whom_it_is_about_has_to_be_known(
    reason: str, kind: str, spec: Any, tmp_path: Path
) -> None:
    tree = written(kind, spec)
    put(tmp_path / "p.yaml", yaml.safe_dump(tree))
    read = Folder(tmp_path).read()
    assert (read.documents, bool(read.problems)) == ((), True)
    assert not any(problem.message.endswith((CLOSED, STAYS)) for problem in read.problems)
    with pytest.raises(kinds.DecodeError):
        in_cluster(tree)


VALID = {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}


def test_a_valid_version_stays_and_none_fails_closed_with_the_newest_text(tmp_path: Path) -> None:
    folder = Folder(tmp_path)

    def after(spec: Any) -> tuple[list[bool], list[bool], str]:
        put(tmp_path / "p.yaml", yaml.safe_dump(written("NetworkPolicy", spec)))
        read = folder.read()
        said = " ".join(problem.message for problem in read.problems)
        return (
            [document.stale for document in read.documents],
            [document.closed is not None for document in read.documents],
            "closed" if CLOSED in said else "stays" if STAYS in said else said,
        )

    bad = {**VALID, "ingress": [{"via": 1}]}
    assert after(bad) == ([False], [True], "closed")
    assert after({**bad, "egress": [{"via": 2}]}) == ([False], [True], "closed")
    (document,) = folder.read().documents
    assert document.closed is not None
    assert document.closed.rules == (("egress", 0), ("ingress", 0)), "of the text as it is now"
    assert after(VALID) == ([False], [False], "")
    assert after(bad) == ([True], [False], "stays")
    (tmp_path / "p.yaml").unlink()
    assert folder.read().documents == ()


def test_a_cluster_written_out_fails_closed_too(tmp_path: Path) -> None:
    """`tidegate compile` of it."""
    from tidegate_operator.cluster.dump import snapshot_of  # noqa: PLC0415

    spec = {**TRAFFIC, "ingress": [{**EVERYBODY, "action": "Allow", "peers": [{"dns": "x"}]}]}
    tree = written("TrafficPolicy", spec)
    put(tmp_path / "p.yaml", yaml.safe_dump(tree))
    snapshot, _ = snapshot_of(Folder(tmp_path).read().documents)
    made, _ = cluster_world.build(snapshot)
    assert list(made.policies.values()) == [in_cluster(tree)]
